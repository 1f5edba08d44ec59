"""What a data set and its columns lack is listed once, in order."""

from dataclasses import replace

from featurize.fill import left_out
from featurize.index import index
from featurize.quarantine import read_quarantine, write_quarantine


def test_an_image_and_a_reason_are_named_once_and_in_order(make_samples, make_column, tmp_path):
    samples = make_samples(tmp_path / "in")
    samples[2] = replace(samples[2], captions=("", "kept"))
    dataset = index(samples, "set", tmp_path / "cache", max_quarantined=0)
    columns = [make_column(dataset, name, quarantined=(4, 1))[0] for name in ("one.pooled", "one.grid")]
    gone = replace(columns[0].shards[0], reasons=("FileNotFoundError: gone",))
    columns.append(replace(columns[0], name="two.pooled", shards=(gone, columns[0].shards[1])))
    columns.append(replace(columns[0], name="three.pooled", reference="import:/data/three.npy"))
    found = left_out(dataset, columns)
    assert [(problem.image_id, problem.stage, problem.reason, problem.columns) for problem in found] == [
        ("id1", "decode", "DecodeError: cut", ("one.grid", "one.pooled")),
        ("id1", "import", "DecodeError: cut", ("three.pooled",)),
        ("id1", "read", "FileNotFoundError: gone", ("two.pooled",)),
        ("id4", "decode", "DecodeError: cut", ("one.grid", "one.pooled", "two.pooled")),
        ("id4", "import", "DecodeError: cut", ("three.pooled",)),
    ]
    assert [problem.sha256 for problem in found] == [dataset.digests[row] for row in (1, 1, 1, 4, 4)]
    assert left_out(dataset, columns[::-1]) == found
    write_quarantine(dataset.folder, [*dataset.quarantine, *found])
    assert read_quarantine(dataset.folder) == [*dataset.quarantine, *found]
    assert [problem.columns for problem in dataset.quarantine] == [()]
