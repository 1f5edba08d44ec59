"""What takes an encoder's place: the card, the values as they are stored, what is remembered of files."""

import os

import numpy as np
import pytest

from featurize import imports
from featurize.datasets.sample import DataError
from featurize.encoder import EncoderError, Output
from featurize.imports import check_imports, is_import, open_import, remembered, tsv
from featurize.imports.reader import FeatureFile


@pytest.fixture
def path(tmp_path, values):
    file = tmp_path / "features.npy"
    np.save(file, values(7, 8))
    return file


def test_the_card_says_what_was_read(path, opened):
    import hashlib

    card = opened(path).card
    assert card.name == "import:features"
    assert card.weights == hashlib.sha256(path.read_bytes()).hexdigest()
    assert card.preprocessing == {"reader": 1, "rows": "images", "format": "npy"}


def test_a_moved_file_is_the_same(path, tmp_path, opened):
    before = opened(path).card
    (tmp_path / "elsewhere").mkdir()
    path.rename(tmp_path / "elsewhere" / path.name)
    assert opened(tmp_path / "elsewhere" / path.name).card == before


def test_ids_beside_the_file_are_part_of_it(path, tmp_path, opened):
    before = opened(path).card.weights
    (tmp_path / "ids.txt").write_text("".join(f"picture-{number}\n" for number in range(7)))
    with_ids = opened(path).card.weights
    (tmp_path / "ids.txt").write_text("".join(f"picture-{number}\n" for number in reversed(range(7))))
    assert len({before, with_ids, opened(path).card.weights}) == 3


@pytest.fixture
def hashed(monkeypatch):
    """The files that are hashed, in a process that has opened nothing yet."""
    from featurize.imports import _open

    names = []
    real = remembered._sha256

    def noted(path, progress):
        names.append(path.name)
        return real(path, progress)

    monkeypatch.setattr(remembered, "_sha256", noted)
    _open.cache_clear()
    yield names
    _open.cache_clear()


def test_a_file_is_hashed_once_for_all_processes(path, opened, hashed):
    from featurize.imports import _open

    first = opened(path).card
    _open.cache_clear()
    assert opened(path).card == first
    assert hashed == ["features.npy"]


def test_a_changed_file_is_hashed_again(path, opened, hashed, values):
    before = opened(path).card.weights
    array = values(7, 8) + 1
    np.save(path, array)
    os.utime(path, ns=(1, 1))
    assert opened(path).card.weights != before
    assert hashed == ["features.npy"] * 2


def test_of_many_files_only_changed_ones_are_hashed_again(tmp_path, opened, hashed, values):
    from featurize.imports import _open

    for number in range(3):
        np.savez(tmp_path / f"{number}.npz", tokens=values(2, 8))
    before = opened(tmp_path).card.weights
    np.savez(tmp_path / "1.npz", tokens=values(2, 8) + 1)
    os.utime(tmp_path / "1.npz", ns=(1, 1))
    _open.cache_clear()
    assert opened(tmp_path).card.weights != before
    assert hashed == ["0.npz", "1.npz", "2.npz", "1.npz"]


def test_a_damaged_memory_is_made_again(path, opened, hashed, tmp_path):
    from featurize.imports import _open

    first = opened(path).card
    (memory,) = (tmp_path / "cache" / "imports").glob("*.json")
    memory.write_text("{")
    _open.cache_clear()
    assert opened(path).card == first
    assert hashed == ["features.npy"] * 2


def test_a_text_file_is_scanned_once(tmp_path, opened, hashed, monkeypatch):
    import base64

    from featurize.imports import _open

    numbers = base64.b64encode(np.zeros((1, 4), np.float32)).decode()
    (tmp_path / "a.tsv").write_text("".join(f"picture-{n}\t4\t4\t1\t{numbers}\t{numbers}\n" for n in range(7)))
    opened(tmp_path / "a.tsv")
    _open.cache_clear()
    monkeypatch.setattr(tsv, "read_lines", lambda _: pytest.fail("the file is scanned again"))
    assert opened(tmp_path / "a.tsv").source.keys.ids == [f"picture-{n}" for n in range(7)]


@pytest.mark.parametrize("value", [1e5, -65520.0])
def test_values_beyond_float16_are_refused(path, imported, values, value):
    array = values(7, 8)
    array[3, 2] = value
    np.save(path, array)
    with pytest.raises(DataError, match=r"row 3 of features.npy holds .* in 'pooled', beyond the 65504 that can"):
        imported(path, "pooled")


def test_float32_has_room_for_them(path, opened, samples, values):
    array = values(7, 8)
    array[3, 2] = 1e5 + 0.25
    np.save(path, array)
    features = opened(path)
    wide = [Output("pooled", (8,), dtype="float32")]
    found, _ = features.read(wide, features.places(samples, frozenset()))
    np.testing.assert_array_equal(found["pooled"], array)
    np.save(path, array.astype(np.float64) * 1e38)
    features = opened(path)
    with pytest.raises(DataError, match=r"row .* beyond the 3.40282e\+38 that can be stored as float32"):
        features.read(wide, features.places(samples, frozenset()))


def test_the_row_is_named_by_its_id(path, tmp_path, imported, values):
    array = values(7, 8)
    array[3, 2] = 1e5
    np.save(path, array)
    (tmp_path / "ids.txt").write_text("".join(f"picture-{number}\n" for number in range(7)))
    with pytest.raises(DataError, match=r"row 3 \('picture-3'\) holds 100000 in 'pooled'"):
        imported(path, "pooled")


@pytest.mark.parametrize(
    ("value", "held"), [(np.nan, "NaN"), (np.inf, "infinity"), (-np.inf, "infinity"), ([np.inf, np.nan], "NaN")]
)
def test_an_image_with_nan_or_infinity_has_no_values(path, imported, values, value, held):
    array = values(7, 8)
    array[4, 5:7] = value
    np.save(path, array)
    found, failed = imported(path, "pooled")
    assert failed == {4: f"row 4 of features.npy holds {held}"}
    assert np.isnan(found[4]).all()
    np.testing.assert_array_equal(found[5], array[5])


def test_values_beyond_the_type_are_seen_beside_infinity(path, imported, values):
    array = values(7, 8)
    array[4, 5:7] = -np.inf, 1e5
    np.save(path, array)
    with pytest.raises(DataError, match=r"row 4 of features.npy holds 100000 in 'pooled', beyond the 65504"):
        imported(path, "pooled")


def test_a_row_without_values_has_none_in_any_output(tmp_path, opened, samples, values):
    pooled, grid = values(7, 8), values(7, 4, 8)
    grid[2, 0, 0] = np.nan
    np.savez(tmp_path / "a.npz", pooled=pooled, grid=grid)
    features = opened(tmp_path / "a.npz")
    found, failed = features.read(features.card.outputs, features.places(samples, frozenset()))
    assert list(failed) == [2]
    assert np.isnan(found["pooled"][2]).all()
    np.testing.assert_array_equal(found["pooled"][3], pooled[3])


@pytest.mark.parametrize(("value", "held"), [(np.nan, "NaN"), (np.inf, "infinity")])
def test_a_caption_with_nan_or_infinity_is_refused(path, imported, values, value, held):
    array = values(35, 8)
    array[4, 5] = value
    np.save(path, array)
    message = rf"row 4 of features.npy holds {held} in 'sentence', and every caption must have"
    with pytest.raises(DataError, match=message):
        imported(path, "sentence", "text")


def test_whole_numbers_beyond_32_bits_are_refused(tmp_path, imported):
    np.savez(tmp_path / "a.npz", lemmas=np.full((35, 2), 2**40))
    with pytest.raises(DataError, match=r"row 0 of a.npz holds numbers beyond 32 bits"):
        imported(tmp_path / "a.npz", "lemmas", "text")


def test_an_absent_ragged_row_is_empty(tmp_path, imported, values):
    np.savez(tmp_path / "a.npz", **{f"picture-{number}": values(2 + number, 8) for number in range(6)})
    found, failed = imported(tmp_path / "a.npz", "tokens")
    assert failed == {6: "no row in a.npz"}
    assert (found[6].shape, found[6].dtype) == ((0, 8), np.float32)


def test_rows_are_read_in_the_file_s_order(opened, path, samples, monkeypatch):
    from dataclasses import replace

    features = opened(path)
    asked = []
    feature = features.source.features[0]

    def read(rows):
        asked.extend(rows.tolist())
        return feature.read(rows)

    source = replace(features.source, features=(replace(feature, read=read),))
    found, _ = FeatureFile(path, "image", features.card, source).read([Output("pooled", (8,))], [(5,), (), (2,), (6,)])
    assert asked == [2, 5, 6]
    np.testing.assert_array_equal(found["pooled"][0], np.load(path)[5])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone.h5", "gone.h5: there is nothing; expected a .tsv of bottom-up attention, .h5"),
        ("a.csv", "a.csv: unknown format '.csv'; expected a .tsv"),
        ("features", "features: unknown format ''; expected a .tsv"),
        ("folder", "folder: unknown format; found notes.md; expected a .tsv"),
    ],
)
def test_files_of_no_known_format(tmp_path, opened, name, message):
    for file in ("a.csv", "features"):
        (tmp_path / file).write_text("a,b")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.md").write_text("notes")
    with pytest.raises(DataError, match=message):
        opened(tmp_path / name)


@pytest.mark.parametrize("count", [10, 40])
def test_each_file_of_a_folder_is_recognised_by_its_own_name_alone(tmp_path, opened, values, monkeypatch, count):
    """Not by comparing it with all others: a folder may hold a file for each of 100,000 images."""
    folder = tmp_path / "vit"
    folder.mkdir()
    for number in range(count):
        np.savez(folder / f"picture-{number}.npz", tokens=values(2, 8))
    looked_at = []
    real = imports._kind
    monkeypatch.setattr(imports, "_kind", lambda path: looked_at.append(path) or real(path))
    opened(folder)
    assert len(looked_at) == 2 * count  # once for the stamps of the files, once to open them


def test_a_path_may_be_relative_or_at_home(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    cards = [open_import(f"import:{name}", "image", tmp_path / "c").card for name in ("features.npy", "~/features.npy")]
    assert cards[0] == cards[1]
    assert cards[0].outputs == (Output("pooled", (8,)),)


def test_references():
    assert is_import("import:/data/bua.h5")
    assert not is_import("efficientnet-lite0")


def test_two_imports_of_one_name_are_refused():
    with pytest.raises(EncoderError, match=r"import:a/f.h5, import:b/f.npy: two imports would be called 'import:f'"):
        check_imports(("import:a/f.h5", "efficientnet-lite0", "import:b/f.npy"), (), ("plain",))
    check_imports(("import:a/f.h5",), ("import:a/f.h5",), ("plain",))


def test_imports_have_one_view():
    with pytest.raises(
        EncoderError, match=r"import:f.h5 holds one view .* --featurize.views is plain,flip; expected pla"
    ):
        check_imports(("import:f.h5",), (), ("plain", "flip"))
    check_imports(("efficientnet-lite0",), ("import:f.h5",), ("plain", "flip"))
