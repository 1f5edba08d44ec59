import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featurize.config import TableConfig
from featurize.datasets.sample import DataError, Sample
from featurize.datasets.table import read_table

PLAIN = TableConfig()


def read(path, config=PLAIN):
    return list(read_table(path, config))


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def write_parquet(path, **columns):
    pq.write_table(pa.table(columns), path)
    return path


def test_csv_with_a_caption_a_row(tmp_path):
    path = write(
        tmp_path / "t.csv",
        b"\xef\xbb\xbfimage,extra,caption,split\r\n"
        b'a.jpg,1,"One, ""quoted""\r\nand broken",train\r\n'
        b"sub/b \xc3\xbc.jpg,2,  two ,val\r\n"
        b"\r\n"
        b"a.jpg,3,caf\xe9,train\r\n"
        b"a.jpg,4,,train\r\n",
    )
    expected = [
        Sample("a.jpg", f"{tmp_path}/a.jpg", ('One, "quoted"\r\nand broken', "caf\udce9", ""), "train"),
        Sample("sub/b \u00fc.jpg", f"{tmp_path}/sub/b \u00fc.jpg", ("two",), "val"),
    ]
    assert read(path) == expected
    assert read(tmp_path) == expected


def test_csv_with_lists(tmp_path):
    path = write(
        tmp_path / "t.csv",
        'image,caption\na.jpg,"[""one"", "" two ""]"\nb.jpg,[a sign] on a wall\nc.jpg,[]\nd.jpg,"[\n""x""]"\n',
    )
    assert [sample.captions for sample in read(path)] == [("one", "two"), ("[a sign] on a wall",), ("[]",), ("x",)]


def test_tsv(tmp_path):
    path = write(tmp_path / "t.TSV", 'image\tcaption\na.jpg\tone, two\nb.jpg\t"[""x"",""y""]"\n')
    assert [sample.captions for sample in read(path)] == [("one, two",), ("x", "y")]


def test_json_lines(tmp_path):
    rows = [
        {"image": "a.jpg", "caption": ["one", " two ", None], "split": "train", "more": 1},
        {"image": "b.jpg", "caption": "three", "split": None},
        {"caption": "[1, 2]", "image": "c.jpg"},
        {"image": "a.jpg", "caption": None, "split": "train"},
    ]
    text = "\r\n\r\n".join(json.dumps(row) for row in rows)
    path = write(tmp_path / "t.jsonl", b"\xef\xbb\xbf" + text.encode())
    assert read(path) == [
        Sample("a.jpg", f"{tmp_path}/a.jpg", ("one", "two", "", ""), "train"),
        Sample("b.jpg", f"{tmp_path}/b.jpg", ("three",), ""),
        Sample("c.jpg", f"{tmp_path}/c.jpg", ("[1, 2]",), ""),
    ]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_with_a_caption_a_row(tmp_path, kind):
    path = write_parquet(
        tmp_path / "t.parquet",
        more=[1.5, 2.5, 3.5],
        image=pa.array(["a.jpg", "b.jpg", "a.jpg"], kind),
        caption=pa.array([" one", None, "two"], kind),
    )
    assert read(path) == [
        Sample("a.jpg", f"{tmp_path}/a.jpg", ("one", "two"), ""),
        Sample("b.jpg", f"{tmp_path}/b.jpg", ("",), ""),
    ]


@pytest.mark.parametrize("list_of", [pa.list_, pa.large_list])
def test_parquet_with_lists_and_foreign_text(tmp_path, list_of):
    foreign = pa.array([b"caf\xe9", b"two", b"three"]).cast(pa.binary()).view(pa.string())
    lists = pa.ListArray.from_arrays([0, 2, 2, 3], foreign).cast(list_of(pa.string()))
    path = write_parquet(
        tmp_path / "t.parquet",
        image=["a.jpg", "b.jpg", "c.jpg"],
        caption=lists,
        split=["train", "val", None],
        number=[10, 11, 12],
    )
    assert read(path, TableConfig(id="number")) == [
        Sample("10", f"{tmp_path}/a.jpg", ("caf\udce9", "two"), "train"),
        Sample("11", f"{tmp_path}/b.jpg", (), "val"),
        Sample("12", f"{tmp_path}/c.jpg", ("three",), ""),
    ]


def test_columns_of_other_names(tmp_path):
    path = write(tmp_path / "t.csv", "key,file,text,fold,split\nk/1,a.jpg,one,train,x\nk/1,a.jpg,two,train,y\n")
    config = TableConfig(image="file", caption="text", split="fold", id="key")
    assert read(path, config) == [Sample("k/1", f"{tmp_path}/a.jpg", ("one", "two"), "train")]


def test_no_split_column_wanted(tmp_path):
    path = write(tmp_path / "t.csv", "image,caption,split\na.jpg,one,train\n")
    assert read(path, TableConfig(split=""))[0].split == ""


def test_columns_without_a_name_are_no_split_and_no_id(tmp_path):
    samples = [Sample(f"{name}.jpg", f"{tmp_path}/{name}.jpg", ("one",), "") for name in "ab"]
    two = write(tmp_path / "two.csv", "image,caption,,\na.jpg,one,,\nb.jpg,one,,x\n")
    assert read(two) == samples
    assert read(two, TableConfig(split="")) == samples
    of_pandas = write(tmp_path / "index.csv", ",image,caption\n0,a.jpg,one\n1,b.jpg,one\n")
    assert read(of_pandas, TableConfig(split="")) == samples
    lines = write(tmp_path / "t.jsonl", '{"": "x", "image": "a.jpg", "caption": "one"}\n')
    assert read(lines, TableConfig(split="")) == samples[:1]


def test_a_quote_that_swallows_rows_of_a_tsv(tmp_path):
    rows = 'a.jpg\tone\n\nb.jpg\t"no end\nc.jpg\ttwo\nd.jpg\tthree\ne.jpg\t5"\n'
    message = (
        r"t\.tsv, lines 4 to 7: a quote opens a cell that holds tabs and line breaks, so it has swallowed rows; "
        r"expected .*double it and quote the whole cell$"
    )
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / "t.tsv", f"image\tcaption\n{rows}"))
    with pytest.raises(DataError, match=r"lines 2 to 3: a quote opens"):
        read(write(tmp_path / "t.tsv", 'image\tcaption\n"a.jpg\tone\r\nb.jpg"\ttwo\r\n'))


def test_quoted_cells_of_a_tsv(tmp_path):
    rows = 'a.jpg\t"[""one"",\n ""two""]"\nb.jpg\t"a\tb"\nc.jpg\t"""no end"\n'
    path = write(tmp_path / "t.tsv", f"image\tcaption\n{rows}")
    assert [sample.captions for sample in read(path)] == [("one", "two"), ("a\tb",), ('"no end',)]


def test_absolute_paths_and_uris(tmp_path):
    path = write(tmp_path / "t.csv", "image,caption\n/data/a.jpg,one\ns3://bucket/b//c.jpg,two\n")
    assert [sample.image for sample in read(path)] == ["/data/a.jpg", "s3://bucket/b//c.jpg"]


def test_empty_tables_hold_nothing(tmp_path):
    assert read(write(tmp_path / "a.csv", "image,caption\n")) == []
    assert read(write(tmp_path / "b.jsonl", "\n")) == []
    empty = pa.array([], pa.string())
    assert read(write_parquet(tmp_path / "c.parquet", image=empty, caption=empty)) == []


def test_a_folder_needs_exactly_one_table(tmp_path):
    with pytest.raises(DataError, match=r"exactly one table \(\.csv, \.tsv, \.jsonl, \.parquet\), found none; give"):
        read(tmp_path)
    write(tmp_path / "a.csv", "")
    write(tmp_path / "b.jsonl", "")
    with pytest.raises(DataError, match=r"found a\.csv, b\.jsonl; give the file as --data\.root"):
        read(tmp_path)


@pytest.mark.parametrize(("name", "found"), [("a.xlsx", r"'\.xlsx'"), ("a", "'no extension'")])
def test_a_file_of_another_kind(tmp_path, name, found):
    with pytest.raises(DataError, match=rf"{name}: expected a table .*, found {found}"):
        read(write(tmp_path / name, ""))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            PLAIN,
            r"no column 'image' \(did you mean 'Image'\?\); found 'Image', 'text', 'fold'\. .*--data\.table\.image",
        ),
        (TableConfig(image="Image"), r"no column 'caption'; found 'Image', 'text', 'fold'\. .*--data\.table\.caption"),
        (TableConfig("Image", "text", "folds"), r"no column 'folds' \(did you mean 'fold'\?\); .*--data\.table\.split"),
        (TableConfig("Image", "text", id="key"), r"no column 'key'; .*--data\.table\.id"),
    ],
)
def test_a_missing_column(tmp_path, config, message):
    write_parquet(tmp_path / "t.parquet", Image=["a"], text=["b"], fold=["c"])
    write(tmp_path / "t.csv", "Image,text,fold\na,b,c\n")
    write(tmp_path / "t.jsonl", '{"Image": "a", "text": "b", "fold": "c"}\n')
    for name, where in (("t.parquet", ""), ("t.csv", ""), ("t.jsonl", ", line 1")):
        with pytest.raises(DataError, match=f"{name}{where}: {message}"):
            read(tmp_path / name, config)


def test_an_empty_file_has_no_columns(tmp_path):
    with pytest.raises(DataError, match=r"t\.csv: no column 'image'; found none\."):
        read(write(tmp_path / "t.csv", ""))


def test_a_column_that_later_rows_lack(tmp_path):
    with pytest.raises(DataError, match=r"t\.jsonl, line 2: no column 'caption'; found 'image'"):
        read(write(tmp_path / "t.jsonl", '{"image": "a", "caption": "b"}\n{"image": "a"}\n'))


def test_columns_of_one_name(tmp_path):
    with pytest.raises(DataError, match=r"t\.csv: 2 columns are named 'caption'; rename all but one"):
        read(write(tmp_path / "t.csv", "image,caption,caption\n"))


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("1,b.jpg,two,train", "image 'b.jpg', split 'train'; line 2 has image 'a.jpg', split 'train'"),
        ("1,a.jpg,two,val", "image 'a.jpg', split 'val'; line 2 has image 'a.jpg', split 'train'"),
    ],
)
def test_rows_of_one_id_that_disagree(tmp_path, second, message):
    path = write(tmp_path / "t.csv", f"id,image,caption,split\n1,a.jpg,one,train\n{second}\n1,a.jpg,three,train\n")
    first, other = read(path, TableConfig(id="id"))
    assert (first.captions, first.problem, other.captions) == (("one", "three"), "", ("two",))
    advice = "Rows of one id are captions of one image"
    assert other.problem == f"duplicate image id: line 3 of t.csv has {message}. {advice}"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a.jpg,one,two", r"line 2: 3 cells under 2 columns; quote a cell that holds the delimiter"),
        ("a.jpg", r"line 2: 1 cells under 2 columns"),
        ('a.jpg,"one', r"line 2: unexpected end of data; quote a cell that holds quotes"),
        ('a.jpg,"one" two', r"line 2: ',' expected after '\"'; quote a cell"),
        (",one", r"line 2: 'image' is empty, so the row belongs to no image"),
        ("a.jpg,\"['one', 'two']\"", r"line 2: a list of captions must be JSON .* write it with json\.dumps"),
        ('a.jpg,"[""one"", 3.5]"', r"line 2: 'caption' is 3\.5, expected text"),
    ],
)
def test_csv_rows_of_another_form(tmp_path, row, message):
    with pytest.raises(DataError, match=r"t\.csv, " + message):
        read(write(tmp_path / "t.csv", f"image,caption\n{row}\n"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", r"line 1: not valid JSON \(.*\); expected one object a line"),
        ("[1]", r"line 1: expected a JSON object, found list"),
        ('{"image": null, "caption": "one"}', r"line 1: 'image' is empty"),
        ('{"image": ["a"], "caption": "one"}', r"line 1: 'image' is \['a'\], expected text"),
        ('{"image": "a", "caption": {"x": 1}}', r"line 1: 'caption' is \{'x': 1\}, expected text"),
        ('{"image": "a", "caption": NaN}', r"line 1: 'caption' is nan, expected text"),
    ],
)
def test_json_rows_of_another_form(tmp_path, row, message):
    with pytest.raises(DataError, match=r"t\.jsonl, " + message):
        read(write(tmp_path / "t.jsonl", row))


def test_parquet_of_another_form(tmp_path):
    with pytest.raises(DataError, match=r"t\.parquet: not a Parquet file"):
        read(write(tmp_path / "t.parquet", "PAR1 and nothing of the kind"))
    path = write_parquet(tmp_path / "u.parquet", image=["a", "b", None], caption=["x", "y", "z"])
    with pytest.raises(DataError, match=r"u\.parquet, row 3: 'image' is empty"):
        read(path)


def test_parquet_rows_are_counted_across_batches(tmp_path):
    rows = 70_000
    path = write_parquet(tmp_path / "t.parquet", image=["a"] * (rows - 1) + [None], caption=pa.nulls(rows, pa.string()))
    with pytest.raises(DataError, match=r"row 70000: 'image' is empty"):
        read(path)
