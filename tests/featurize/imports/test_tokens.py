"""Tokens as .npz: a file an image, or an array an id."""

import numpy as np
import pytest

from featurize.datasets.sample import DataError
from featurize.encoder import Output


@pytest.fixture
def folder(tmp_path, values):
    made = tmp_path / "vit"
    made.mkdir()
    tokens = values(7, 5, 8)
    for number in range(7):
        np.savez(made / f"picture-{number}.npz", tokens=tokens[number], pooled=tokens[number, 0])
    return made, tokens


def test_a_file_an_image(folder, opened, imported):
    path, tokens = folder
    assert set(opened(path).card.outputs) == {Output("tokens", (5, 8)), Output("pooled", (8,))}
    np.testing.assert_array_equal(imported(path, "tokens")[0], tokens)
    np.testing.assert_array_equal(imported(path, "pooled")[0], tokens[:, 0])


def test_a_file_that_is_not_there_is_missing(folder, imported):
    path, tokens = folder
    (path / "picture-3.npz").unlink()
    found, failed = imported(path, "tokens")
    assert failed == {3: "no row in vit"}
    np.testing.assert_array_equal(found[4], tokens[4])


def test_images_with_different_numbers_of_tokens_are_ragged(tmp_path, opened, imported, values):
    rows = {f"picture-{number}": values(2 + number, 8) for number in range(7)}
    np.savez(tmp_path / "vit.npz", **rows)
    assert opened(tmp_path / "vit.npz").card.outputs == (Output("tokens", (8,), ragged=True),)
    found, _ = imported(tmp_path / "vit.npz", "tokens")
    for number in range(7):
        np.testing.assert_array_equal(found[number], rows[f"picture-{number}"])


def test_an_array_an_id_of_one_shape_is_fixed(tmp_path, opened, imported, values):
    rows = {f"picture-{number}": values(8) for number in range(7)}
    np.savez_compressed(tmp_path / "vit.npz", **rows)
    assert opened(tmp_path / "vit.npz").card.outputs == (Output("pooled", (8,)),)
    np.testing.assert_array_equal(imported(tmp_path / "vit.npz", "pooled")[0][6], rows["picture-6"])


def test_files_with_other_arrays_than_the_first(folder, opened, values):
    np.savez(folder[0] / "picture-5.npz", tokens=values(5, 8))
    with pytest.raises(DataError, match=r"picture-5.npz: holds tokens, but picture-0.npz holds pooled, tokens"):
        opened(folder[0])


def test_arrays_of_another_width(tmp_path, opened, values):
    np.savez(tmp_path / "vit.npz", a=values(5, 8), b=values(5, 9))
    with pytest.raises(DataError, match=r"'b' has the shape \(5, 9\), but 'a' has \(5, 8\); expected one width"):
        opened(tmp_path / "vit.npz")


def test_arrays_with_too_many_axes(tmp_path, opened, values):
    np.savez(tmp_path / "vit.npz", a=values(5, 8, 2), b=values(5, 8, 2))
    with pytest.raises(
        DataError, match=r"vit.npz, a: found float32 of shape \(5, 8, 2\), expected numbers \(L, D\) or"
    ):
        opened(tmp_path / "vit.npz")


def test_pickled_objects_are_not_read(tmp_path, opened):
    np.savez(tmp_path / "vit.npz", a=np.array([{}]), b=np.array([{}]))
    with pytest.raises(DataError, match="found object of shape"):
        opened(tmp_path / "vit.npz")
    np.savez(tmp_path / "one.npz", np.array([{}]))
    with pytest.raises(DataError, match=r"not an npy array of plain numbers \(Object arrays cannot be loaded"):
        opened(tmp_path / "one.npz")


def test_a_file_of_another_kind(tmp_path, opened):
    (tmp_path / "a.npz").write_bytes(b"no zip")
    with pytest.raises(DataError, match=r"a.npz: not an npz file"):
        opened(tmp_path / "a.npz")


def test_an_empty_file(tmp_path, opened):
    np.savez(tmp_path / "a.npz")
    with pytest.raises(DataError, match=r"a.npz: holds no arrays"):
        opened(tmp_path / "a.npz")


@pytest.fixture(params=[(8,), (5, 8)])
def arrays(tmp_path, values, request):
    """An .npy an image, as ruotianluo's cocobu_fc and cocobu_att have them; their folder."""
    made = tmp_path / "cocobu"
    made.mkdir()
    rows = values(7, *request.param)
    for number in range(7):
        np.save(made / f"picture-{number}.npy", rows[number])
    return made, rows


def test_an_npy_an_image(arrays, opened, imported):
    path, rows = arrays
    name = "pooled" if rows.ndim == 2 else "tokens"
    assert opened(path).card.outputs == (Output(name, rows.shape[1:]),)
    assert opened(path).card.preprocessing["format"] == "npy by id"
    found, failed = imported(path, name)
    np.testing.assert_array_equal(found, rows)
    assert failed == {}


def test_an_npy_that_is_not_there_is_missing(arrays, imported):
    path, rows = arrays
    (path / "picture-3.npy").unlink()
    found, failed = imported(path, "pooled" if rows.ndim == 2 else "tokens")
    assert failed == {3: "no row in cocobu"}
    np.testing.assert_array_equal(found[4], rows[4])


def test_npy_of_different_numbers_of_regions_are_ragged(tmp_path, opened, imported, values):
    rows = [values(2 + number, 8) for number in range(7)]
    (tmp_path / "att").mkdir()
    for number, row in enumerate(rows):
        np.save(tmp_path / "att" / f"picture-{number}.npy", row)
    assert opened(tmp_path / "att").card.outputs == (Output("tokens", (8,), ragged=True),)
    for row, back in zip(rows, imported(tmp_path / "att", "tokens")[0], strict=True):
        np.testing.assert_array_equal(back, row)


def test_shapes_of_many_npy_are_read_once(arrays, opened, monkeypatch):
    from featurize.imports import _open, tokens

    card = opened(arrays[0]).card
    _open.cache_clear()
    monkeypatch.setattr(tokens, "read_npy_shapes", lambda _: pytest.fail("the files are read again"))
    assert opened(arrays[0]).card == card


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.ones((2, 9), np.float32), r"'picture-6' has the shape \(2, 9\), but 'picture-0' has \("),
        (
            np.ones((2, 2, 2), np.float32),
            r"picture-6.npy: found float32 of shape \(2, 2, 2\), expected numbers \(L, D\)",
        ),
        (np.array([{}]), "picture-6.npy: found object of shape"),
        (None, "picture-6.npy: not an npy array"),
    ],
)
def test_an_npy_that_does_not_fit_the_others(arrays, opened, content, message):
    file = arrays[0] / "picture-6.npy"
    if content is None:
        file.write_bytes(b"no array")
    else:
        np.save(file, content)
    with pytest.raises(DataError, match=message):
        opened(arrays[0])


@pytest.mark.parametrize("other", ["pooled.npy", "sentence.npy", "picture-0.offsets.npy", "ids.npy", "ids.txt"])
def test_npy_of_rows_are_not_taken_for_one_an_image(arrays, opened, other, monkeypatch):
    """They are refused by their names alone: a system maps only some ten thousand files."""
    if other == "ids.txt":
        (arrays[0] / other).write_text("a\nb\n")
    else:
        np.save(arrays[0] / other, np.ones((2, 2)))
    monkeypatch.setattr("featurize.imports.arrays.load_npy", lambda path: pytest.fail(f"{path} is mapped"))
    with pytest.raises(
        DataError, match=r"found the arrays '.*'picture-3', .*\.\.\. \([78] in all\), expected one array"
    ):
        opened(arrays[0])


def test_a_member_that_is_no_array(tmp_path, opened):
    import zipfile

    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        file.writestr("a.npy", b"no array")
        file.writestr("b.npy", b"no array")
    with pytest.raises(DataError, match=r"a.npz, a: not an npy array"):
        opened(tmp_path / "a.npz")
