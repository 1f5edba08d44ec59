"""Plain arrays: npy, npz, safetensors, Parquet; by position or with ids."""

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from featurize.datasets.sample import DataError
from featurize.encoder import Output

BACKWARDS = [f"picture-{number}.jpg" for number in reversed(range(7))]


def save(kind, path, array, **more):
    """The array alone in a file of one kind; returns the file."""
    file = path / f"features.{kind}"
    if kind == "npy":
        np.save(file, array)
    elif kind == "npz":
        np.savez(file, features=array, **more)
    else:
        save_file({"features": torch.from_numpy(array), **{k: torch.as_tensor(v) for k, v in more.items()}}, file)
    return file


@pytest.fixture(params=["npy", "npz", "safetensors"])
def kind(request):
    return request.param


def test_rows_are_the_data_set_s(tmp_path, values, kind, opened, imported):
    array = values(7, 8)
    path = save(kind, tmp_path, array)
    assert opened(path).card.outputs == (Output("pooled", (8,)),)
    np.testing.assert_array_equal(imported(path, "pooled")[0], array)


def test_three_axes_are_regions(tmp_path, values, kind, opened, imported):
    array = values(7, 3, 8)
    path = save(kind, tmp_path, array)
    assert opened(path).card.outputs == (Output("regions", (3, 8)),)
    np.testing.assert_array_equal(imported(path, "regions")[0], array)


@pytest.mark.parametrize("beside", ["ids.txt", "features.ids.txt", "ids.json", "ids.npy", "ids.parquet"])
def test_ids_beside_the_file(tmp_path, values, kind, imported, beside):
    array = values(7, 8)
    path, ids = save(kind, tmp_path, array), tmp_path / beside
    if ids.suffix == ".txt":
        ids.write_text("\r\n".join(BACKWARDS) + "\r\n")
    elif ids.suffix == ".json":
        ids.write_text(json.dumps(BACKWARDS))
    elif ids.suffix == ".npy":
        np.save(ids, np.array(BACKWARDS))
    else:
        pd.DataFrame({"image_id": BACKWARDS}).to_parquet(ids)
    np.testing.assert_array_equal(imported(path, "pooled")[0], array[::-1])


def test_ids_in_an_npz(tmp_path, values, imported):
    array = values(7, 8)
    path = save("npz", tmp_path, array, ids=np.array(BACKWARDS))
    np.testing.assert_array_equal(imported(path, "pooled")[0], array[::-1])


def test_whole_numbers_are_ids_in_safetensors(tmp_path, values, imported, samples):
    from dataclasses import replace

    array = values(7, 8)
    path = save("safetensors", tmp_path, array, ids=np.array([16, 15, 14, 13, 12, 11, 10]))
    coco = [replace(s, image_id=f"COCO_val2014_{10 + row:012d}") for row, s in enumerate(samples)]
    np.testing.assert_array_equal(imported(path, "pooled", of=coco)[0], array[::-1])


def test_bfloat16_in_safetensors(tmp_path, imported):
    save_file({"x": torch.full((7, 8), 1.5, dtype=torch.bfloat16)}, tmp_path / "a.safetensors")
    np.testing.assert_array_equal(imported(tmp_path / "a.safetensors", "pooled")[0], np.full((7, 8), 1.5))


def test_several_arrays_have_names_that_encoders_use(tmp_path, values, opened, imported):
    pooled, grid = values(7, 8), values(7, 4, 8)
    np.savez(tmp_path / "a.npz", pooled=pooled, grid=grid)
    assert [output.name for output in opened(tmp_path / "a.npz").card.outputs] == ["pooled", "grid"]
    np.testing.assert_array_equal(imported(tmp_path / "a.npz", "grid")[0], grid)


def test_captions_by_position(tmp_path, values, kind, opened, imported):
    array = values(35, 8)
    path = save(kind, tmp_path, array)
    assert opened(path, "text").card.outputs == (Output("sentence", (8,)),)
    np.testing.assert_array_equal(imported(path, "sentence", "text")[0], array)


def test_tokens_of_captions_are_ragged(tmp_path, values, kind, opened, imported):
    array = values(35, 6, 8)
    path = save(kind, tmp_path, array)
    assert opened(path, "text").card.outputs == (Output("tokens", (8,), ragged=True),)
    np.testing.assert_array_equal(imported(path, "tokens", "text")[0], array)


def test_captions_by_image_and_number(tmp_path, values, kind, imported):
    array = values(35, 8)
    path = save(kind, tmp_path, array)
    (tmp_path / "ids.txt").write_text("\n".join(f"{name}#{number}" for name in BACKWARDS for number in (4, 3, 2, 1, 0)))
    np.testing.assert_array_equal(imported(path, "sentence", "text")[0], array[::-1])


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones(7, np.float32), r"found rows of shape \(\), expected \(D,\), one vector a row, or \(K, D\)"),
        (np.ones((7, 2, 2, 2), np.float32), r"found rows of shape \(2, 2, 2\)"),
        (np.ones((7, 0), np.float32), r"found rows of shape \(0,\)"),
        (np.ones((7, 8), np.int64), "found values of type int64, expected floating point numbers"),
        (np.array(1.0, np.float32), "found a single number, expected an array with a row for each image"),
    ],
)
def test_arrays_that_are_no_features(tmp_path, kind, opened, array, message):
    path = save(kind, tmp_path, array)
    with pytest.raises(DataError, match=message):
        opened(path)


def test_other_rows_than_the_data_set_s(tmp_path, values, kind, imported):
    path = save(kind, tmp_path, values(6, 8))
    with pytest.raises(DataError, match="found 6 rows without ids, expected as many as the data set's 7 images"):
        imported(path, "pooled")


def test_other_rows_than_captions(tmp_path, values, kind, imported):
    path = save(kind, tmp_path, values(7, 8))
    with pytest.raises(DataError, match="found 7 rows without ids, expected as many as the data set's 35 captions"):
        imported(path, "sentence", "text")


def test_arrays_of_different_length(tmp_path, values, opened):
    np.savez(tmp_path / "a.npz", pooled=values(7, 8), grid=values(6, 4, 8))
    with pytest.raises(DataError, match=r"arrays of different length: \{'pooled': 7, 'grid': 6\}"):
        opened(tmp_path / "a.npz")


def test_several_arrays_of_other_names(tmp_path, values, opened):
    save_file({"one": torch.ones(7, 8), "two": torch.ones(7, 8)}, tmp_path / "a.safetensors")
    with pytest.raises(
        DataError, match="found the arrays 'one', 'two', expected one array, or names out of pooled, grid"
    ):
        opened(tmp_path / "a.safetensors")


@pytest.mark.parametrize("kind", ["npy", "safetensors", "parquet"])
def test_files_of_another_kind(tmp_path, opened, kind):
    (tmp_path / f"a.{kind}").write_bytes(b"something else")
    with pytest.raises(DataError, match=r"not an? .* file"):
        opened(tmp_path / f"a.{kind}")


def test_pickled_arrays_are_not_read(tmp_path, opened):
    np.save(tmp_path / "a.npy", np.array([{}]))
    with pytest.raises(DataError, match="not an npy file of plain numbers"):
        opened(tmp_path / "a.npy")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("ids.txt", "a\nb\n", "ids.txt: found 2 ids for 7 rows, expected one a row"),
        ("ids.json", "[", "ids.json: not valid JSON"),
        ("ids.json", '"a"', "ids.json: expected a JSON list of ids, or an object"),
        ("ids.json", '{"a": 0, "b": 2}', "ids.json: expected ids with their rows 0 to 1, each once"),
        ("ids.json", "[1.5]", "ids.json: found the id 1.5, expected text or a whole number"),
        ("ids.npy", "no array", "ids.npy: not an npy file of text or numbers"),
        ("ids.parquet", "no table", "ids.parquet: not a Parquet file"),
    ],
)
def test_ids_that_do_not_fit(tmp_path, values, opened, name, content, message):
    path = save("npy", tmp_path, values(7, 8))
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        opened(path)


def test_a_table_of_ids_without_ids(tmp_path, values, opened):
    path = save("npy", tmp_path, values(7, 8))
    pd.DataFrame({"names": BACKWARDS}).to_parquet(tmp_path / "ids.parquet")
    with pytest.raises(DataError, match="found the columns names, expected one of"):
        opened(path)


def test_two_files_of_ids(tmp_path, values, opened):
    path = save("npy", tmp_path, values(7, 8))
    (tmp_path / "ids.txt").write_text("\n".join(BACKWARDS))
    (tmp_path / "ids.json").write_text(json.dumps(BACKWARDS))
    with pytest.raises(DataError, match=r"found ids in ids.txt and in ids.json; keep one"):
        opened(path)


def write_table(path, **columns):
    pq.write_table(pa.table(columns), path, row_group_size=3)
    return path


def test_a_table_of_lists(tmp_path, values, opened, imported):
    array = values(7, 8)
    column = pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), 8)
    path = write_table(tmp_path / "a.parquet", id=pa.array(BACKWARDS), pooled=column, other=pa.array(range(7)))
    assert opened(path).card.outputs == (Output("pooled", (8,)),)
    np.testing.assert_array_equal(imported(path, "pooled")[0], array[::-1])


def test_a_table_in_one_large_group(tmp_path, opened):
    array = np.arange(1000, dtype=np.float32).reshape(-1, 1)
    pq.write_table(
        pa.table({"pooled": pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), 1)}), tmp_path / "a.parquet"
    )
    read = opened(tmp_path / "a.parquet").source.features[0].read
    rows = np.array([3, 255, 256, 700, 999])
    np.testing.assert_array_equal(list(read(rows)), array[rows])


@pytest.mark.parametrize(
    ("name", "cell", "kind", "message"),
    [
        ("pooled", [1.0, 2.0], pa.list_(pa.float32(), 2), r"pooled: cannot be read .* every row must hold a list"),
        (
            "tokens",
            [[1.0, 2.0]],
            pa.list_(pa.list_(pa.float32(), 2)),
            r"row 6 of a.parquet has the shape \(0,\), expected \(L, 2\) in 'tokens'",
        ),
        (
            "tokens",
            [[1.0, 2.0]],
            pa.list_(pa.list_(pa.float32())),
            r"row 6 of a.parquet has the shape \(0,\), expected \(L, 2\) in 'tokens'",
        ),
        (
            "pooled",
            [1.0, 2.0],
            pa.list_(pa.float32()),
            r"row 6 of a.parquet has the shape \(0,\), expected \(2,\) in 'pooled'",
        ),
    ],
)
def test_an_empty_cell_is_refused(tmp_path, imported, name, cell, kind, message):
    path = write_table(tmp_path / "a.parquet", **{name: pa.array([cell] * 6 + [None], kind)})
    with pytest.raises(DataError, match=message):
        imported(path, name)


def test_offsets_that_do_not_fit(tmp_path, values, opened):
    folder = tmp_path / "out"
    folder.mkdir()
    np.save(folder / "regions.npy", values(9, 8))
    np.save(folder / "regions.offsets.npy", np.array([0, 4, 3, 9]))
    with pytest.raises(DataError, match="regions: offsets must rise from 0 to the 9 rows of the values"):
        opened(folder)


def test_a_table_without_ids(tmp_path, values, imported):
    array = values(7, 8)
    column = pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), 8)
    path = write_table(tmp_path / "a.parquet", pooled=column)
    np.testing.assert_array_equal(imported(path, "pooled")[0], array)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"vector": pa.array([[1.0]])}, "found the columns vector, expected some of pooled, grid"),
        ({"pooled": pa.array([1.0])}, r"pooled: found double in lists of the sizes \[\]"),
        ({"tokens": pa.array([[[[1.0]]]])}, r"tokens: found double in lists of the sizes \[-1, -1, -1\]"),
        (
            {"tokens": pa.array([[], [[]], None, [None]], pa.list_(pa.list_(pa.float32())))},
            "tokens: found no row with num",
        ),
        (
            {"pooled": pa.array([[], None], pa.list_(pa.float32()))},
            "pooled: found no row with numbers, expected a list",
        ),
        ({"pooled": pa.array([["a"]])}, "pooled: found values of type object, expected floating point"),
        ({"pooled": pa.array([[1]])}, "pooled: found values of type int64, expected floating point"),
        ({str(n): pa.array([1.0]) for n in range(2048)}, r"found the columns 0, 1, 2, 3, 4, ... \(2048 in all\), exp"),
    ],
)
def test_tables_of_other_types(tmp_path, opened, columns, message):
    path = write_table(tmp_path / "a.parquet", **columns)
    with pytest.raises(DataError, match=message):
        opened(path)


@pytest.fixture(params=[pa.list_, pa.large_list], ids=["pandas", "polars"])
def lists(request):
    """The type of lists that leave their size open, by the type inside."""
    return request.param


@pytest.mark.parametrize(("name", "modality", "rows"), [("pooled", "image", 7), ("sentence", "text", 35)])
def test_vectors_in_lists_of_open_size(tmp_path, values, opened, imported, lists, name, modality, rows):
    array = values(rows, 8)
    path = write_table(tmp_path / "a.parquet", **{name: pa.array([*map(list, array)], lists(pa.float64()))})
    assert opened(path, modality).card.outputs == (Output(name, (8,)),)
    np.testing.assert_array_equal(imported(path, name, modality)[0], array)


def test_the_width_is_that_of_the_first_row_that_has_numbers(tmp_path, opened):
    path = write_table(tmp_path / "a.parquet", pooled=pa.array([None, [], [1.0, 2.0, 3.0]]))
    assert opened(path).card.outputs == (Output("pooled", (3,)),)


def test_a_vector_of_another_width_is_refused(tmp_path, values, imported):
    rows = [*map(list, values(6, 8)), [1.0] * 9]
    path = write_table(tmp_path / "a.parquet", ids=pa.array(BACKWARDS), pooled=pa.array(rows))
    with pytest.raises(DataError, match=r"row 6 \('picture-0.jpg'\) has the shape \(9,\), expected \(8,\) in 'pooled'"):
        imported(path, "pooled")


@pytest.mark.parametrize(("name", "kind"), [("scores", pa.float32()), ("labels", pa.int64())])
def test_scores_and_labels_are_lists_of_numbers(tmp_path, opened, imported, lists, name, kind):
    rows = [[number] * (number % 3) for number in range(7)]
    path = write_table(tmp_path / "a.parquet", **{name: pa.array(rows, lists(kind))})
    dtype = "float16" if name == "scores" else "int32"
    assert opened(path).card.outputs == (Output(name, (), ragged=True, dtype=dtype),)
    assert [row.tolist() for row in imported(path, name)[0]] == rows


def test_parts_in_lists_of_open_size(tmp_path, values, opened, imported, lists):
    rows = [values(number, 8) for number in (0, 3, 1, 4, 1, 5, 2)]
    cells = pa.array([[*map(list, row)] for row in rows], lists(lists(pa.float32())))
    path = write_table(tmp_path / "a.parquet", regions=cells)
    assert opened(path).card.outputs == (Output("regions", (8,), ragged=True),)
    for row, back in zip(rows, imported(path, "regions")[0], strict=True):
        np.testing.assert_array_equal(back, row)


def test_parts_of_one_number_in_lists_of_open_size(tmp_path, values, opened, imported):
    array = values(7, 3, 8)
    cells = pa.array([[*map(list, row)] for row in array], pa.list_(pa.list_(pa.float32()), 3))
    path = write_table(tmp_path / "a.parquet", grid=cells)
    assert opened(path).card.outputs == (Output("grid", (3, 8)),)
    np.testing.assert_array_equal(imported(path, "grid")[0], array)


@pytest.mark.parametrize("odd", [[1.0], None])
def test_a_part_of_another_width_is_refused(tmp_path, imported, odd):
    rows = [[[1.0, 2.0]]] * 5 + [[[1.0, 2.0], odd]] * 2
    path = write_table(tmp_path / "a.parquet", regions=pa.array(rows))
    found = 0 if odd is None else 1
    with pytest.raises(
        DataError, match=rf"a.parquet, regions: row 5 holds a list of {found} numbers, expected 2, as in the rows"
    ):
        imported(path, "regions")


def test_a_width_that_was_found_is_part_of_the_card(tmp_path, values, opened):
    """A column that an earlier version made of such a table, of single numbers, is another one."""
    path = write_table(tmp_path / "a.parquet", pooled=pa.array([*map(list, values(7, 8))]))
    expected = {"reader": 1, "rows": "images", "format": "parquet", "width": "of the first row: pooled"}
    assert opened(path).card.preprocessing == expected
    path = write_table(tmp_path / "b.parquet", scores=pa.array([[1.0]] * 7))
    assert "width" not in opened(path).card.preprocessing


def test_ids_alone_are_no_features(tmp_path, opened):
    folder = tmp_path / "out"
    folder.mkdir()
    np.save(folder / "ids.npy", np.array(BACKWARDS))
    with pytest.raises(DataError, match=r"out: found the arrays \(none\), expected one array, or names out of"):
        opened(folder)


def test_offsets_of_single_numbers_are_no_vectors(tmp_path, values, opened):
    folder = tmp_path / "out"
    folder.mkdir()
    np.save(folder / "pooled.npy", values(9))
    np.save(folder / "pooled.offsets.npy", np.array([0, 4, 9]))
    with pytest.raises(DataError, match="out, pooled: found rows that are lists of numbers of any length"):
        opened(folder)
