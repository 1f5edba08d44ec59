"""The road of a run on imported features, and columns on their way out, as a user types them."""

import numpy as np
import pytest

from featurize.index import open_dataset
from pipeline import upkeep
from pipeline.__main__ import main
from pipeline.config import RunConfig, absolute_encoders, merge

SMALL = [
    *("--data.scenes.train", "12", "--data.scenes.val", "6", "--data.scenes.test", "2"),
    *("--train.workers", "0", "--train.epochs", "1", "--train.batch", "12", "--train.model.dim", "16"),
]


def type_in(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.fixture
def asked(monkeypatch):
    calls = []
    monkeypatch.setattr(upkeep, "export", lambda *arguments: calls.append(arguments))
    return calls


def test_export_s_arguments_arrive(asked):
    assert type_in("cache", "export", "c/s@1/a@2", "out.h5") == 0
    assert type_in("cache", "export", "c/s@1/a@2", "c/s@1/b@3", "out", "--format", "npy") == 0
    assert asked == [(["c/s@1/a@2"], "out.h5", "h5"), (["c/s@1/a@2", "c/s@1/b@3"], "out", "npy")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["folder"], "the following arguments are required: OUT"),
        (
            ["folder", "out", "--format", "csv"],
            "invalid choice: 'csv' (choose from 'h5', 'npy', 'parquet', 'webdataset')",
        ),
    ],
)
def test_export_s_mistakes_are_answered_in_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        type_in("cache", "export", *arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_a_column_is_a_user_s_mistake(capsys, tmp_path):
    assert type_in("cache", "export", tmp_path, tmp_path / "out.h5") == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: no finished column here")


@pytest.mark.parametrize(
    ("left_out", "text"), [(0, "out.h5 is written\n"), (2, "written, without 2 rows that hold no")]
)
def test_export_says_what_it_left_out(monkeypatch, capsys, left_out, text):
    monkeypatch.setattr(upkeep.features, "export", lambda *_: left_out)
    upkeep.export(["a"], "out.h5", "h5")
    assert text in capsys.readouterr().out


def test_imports_are_known_by_their_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bua.h5").touch()
    changes = {"featurize.images": ("import:bua.h5",), "featurize.texts": ("import:/data/clip",)}
    changed = absolute_encoders(merge(RunConfig(), changes, "")).featurize
    assert (changed.images, changed.texts) == ((f"import:{tmp_path}/bua.h5",), ("import:/data/clip",))


@pytest.mark.slow
def test_a_run_on_features_that_went_out_and_in(tmp_path, capsys, ray_local):
    """Extract, export, train on extracted and imported features together, of which some are ragged, and search."""
    cache, runs = tmp_path / "cache", tmp_path / "runs"
    assert type_in("featurize", "infonce", "--cache", cache, *SMALL) == 0
    (column,) = cache.glob("scenes@*/efficientnet-lite0.pooled@*")
    assert type_in("cache", "export", column, tmp_path / "theirs.h5") == 0
    rng = np.random.default_rng(0)
    parts = {s.image_id: rng.normal(size=(1 + n % 4, 8)) for n, s in enumerate(open_dataset(column.parent).samples)}
    np.savez(tmp_path / "parts.npz", **parts)
    images = ("efficientnet-lite0", *(f"import:{tmp_path / name}" for name in ("theirs.h5", "parts.npz")))
    wanted = ("--featurize.images", ",".join(images), "--train.model.image.parts", "tokens")
    place = ("--cache", cache, "--runs", runs, "--name", "first")
    assert type_in("run", "infonce", *place, *SMALL, *wanted, "--featurize.views", "plain") == 0
    (tars, copies) = (
        sorted(cache.glob(f"scenes@*/{name}.pooled@*/*.tar")) for name in ("efficientnet-lite0", "import-theirs")
    )
    assert [copy.read_bytes() for copy in copies] == [tar.read_bytes() for tar in tars]
    capsys.readouterr()
    assert type_in("search", runs / "first", "two green stars") == 0
    assert "  1  " in capsys.readouterr().out
    picture = next(cache.glob("scenes/**/*.png"), None) or next(cache.glob("scenes/**/*.jpg"))
    assert type_in("search", runs / "first", picture) == 2
    assert (
        "a picture cannot be asked: the model reads import-theirs.pooled, import-parts.tokens of"
        in capsys.readouterr().err
    )
    assert type_in("cache", "verify", cache) == 0
