"""The road of a run on a small data set: everything real, each command a user would type."""

import json
import shlex
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from mlflow import MlflowClient
from safetensors.torch import load_file

from evaluate.codes import encode, open_codebook, search_codes
from evaluate.embed import embed_split
from evaluate.hubness import HubnessCorrection
from evaluate.search import Searcher
from evaluate.tune import SHARES
from featurize.datasets.sample import Sample
from featurize.texts import open_text_encoder
from pipeline.__main__ import main
from pipeline.config import RayConfig, RunConfig, load_yaml, merge
from train.batches import FeatureReader

SMALL = [
    *("--data.scenes.train", "40", "--data.scenes.val", "16", "--data.scenes.test", "8"),
    *("--featurize.images", "efficientnet-lite0", "--featurize.views", "plain"),
    *("--train.objective.quantization.codewords", "16"),
    *("--train.workers", "0", "--train.epochs", "2", "--train.batch", "32", "--train.model.dim", "64"),
]


def type_in(*arguments):
    """What the shell would do with `python -m pipeline ...`: the exit code."""
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("place")


@pytest.fixture(scope="module")
def done(place, ray_local):
    """One finished run of `less`."""
    code = type_in("run", "less", "--cache", place / "cache", "--runs", place / "runs", "--name", "first", *SMALL)
    assert code == 0
    return place / "runs" / "first"


def client(place):
    return MlflowClient(f"sqlite:///{place / 'runs' / 'mlflow.db'}")


def test_metrics_have_the_agreed_shape(done):
    metrics = json.loads((done / "metrics.json").read_text())
    assert set(metrics) == {"split", "protocol", "i2t", "t2i", "rsum"}
    for direction in ("i2t", "t2i"):
        assert set(metrics[direction]) == {"r1", "r5", "r10", "medr", "meanr", "map_r", "r_precision"}
    recalls = [metrics[d][k] for d in ("i2t", "t2i") for k in ("r1", "r5", "r10")]
    assert metrics["rsum"] == pytest.approx(sum(recalls))
    assert metrics["split"] == "val"


def test_mlflow_holds_the_whole_run(place, done):
    known = json.loads((done / "mlflow.json").read_text())
    run = client(place).get_run(known["run_id"])
    metrics = json.loads((done / "metrics.json").read_text())
    assert run.info.status == "FINISHED"
    assert run.data.params["train.lr"] == str(merge(RunConfig(), load_yaml(done / "config.yaml"), "").train.lr)
    assert run.data.metrics["rsum"] == pytest.approx(metrics["rsum"])
    assert {"train/loss", "train/loss/hinge", "train/margin", "val/rsum"} <= set(run.data.metrics)
    epochs = [point.step for point in client(place).get_metric_history(known["run_id"], "val/rsum")]
    assert len(epochs) == 2
    assert run.data.tags["cache.dataset"][:8] in next((place / "cache").glob("scenes@*")).name
    assert any(key.startswith("cache.minilm") for key in run.data.tags)
    assert {entry.dataset.name for entry in run.inputs.dataset_inputs} == {"scenes-train", "scenes-val"}
    artifacts = {file.path for file in client(place).list_artifacts(known["run_id"])}
    assert artifacts == {"checkpoint", "config.yaml", "metrics.json", "report.html"}


def test_hubness_is_corrected_beside_the_plain_score(place, done, capsys):
    plain, corrected = (json.loads((done / f"metrics{name}.json").read_text()) for name in ("", "-corrected"))
    assert plain["rsum"] != corrected["rsum"]
    run = client(place).get_run(json.loads((done / "mlflow.json").read_text())["run_id"])
    assert run.data.metrics["corrected/rsum"] == pytest.approx(corrected["rsum"])
    assert "corrected for hubness" in (done / "report.html").read_text("utf-8")
    assert type_in("evaluate", done) == 0
    assert f"corrected for hubness: rSum {corrected['rsum']:.1f}" in capsys.readouterr().out
    again = json.loads((done / "metrics-val-corrected.json").read_text())
    assert again["rsum"] == pytest.approx(corrected["rsum"])


def test_codes_are_stored_and_measured_beside_the_plain_score(place, done, capsys):
    plain, coded = (json.loads((done / f"metrics{name}.json").read_text()) for name in ("", "-codes"))
    assert coded.keys() == plain.keys()
    run = client(place).get_run(json.loads((done / "mlflow.json").read_text())["run_id"])
    assert run.data.metrics["codes/rsum"] == pytest.approx(coded["rsum"])
    assert "in codes of 16 bytes" in (done / "report.html").read_text("utf-8")
    assert type_in("evaluate", done) == 0
    share = 100 * coded["rsum"] / plain["rsum"]
    told = f"in codes of 16 bytes: rSum {coded['rsum']:.1f} ({share:.1f} % of the float score)"
    assert told in capsys.readouterr().out
    assert json.loads((done / "metrics-val-codes.json").read_text())["rsum"] == pytest.approx(coded["rsum"])


def test_stored_codes_find_what_was_measured(done):
    searcher = Searcher.open(done)
    images, captions, owner = embed_split(searcher.model, FeatureReader(searcher.inputs), "val")
    codebook = open_codebook(done / "model")
    codes = encode(codebook, searcher.model.index_vectors(images))
    assert codes.shape == (16, 16)
    distances, rows = search_codes(codebook, searcher.model.index_vectors(captions), codes, k=16)
    own = distances[rows == owner[:, None]]
    places = (distances <= own[:, None] + 1e-6).sum(1)  # images of equal codes tie, and a tie counts against
    measured = json.loads((done / "metrics-codes.json").read_text())["t2i"]
    for k in (1, 5, 10):
        assert 100 * (places <= k).double().mean().item() == pytest.approx(measured[f"r{k}"])


def test_codes_are_fitted_to_what_is_indexed(place, done, capsys):
    """A local space (256 dimensions) is part of the index vector beside the global one (64)."""
    arguments = ("--cache", place / "cache", "--runs", place / "runs", "--name", "both")
    assert type_in("run", "hier", *arguments, *SMALL, "--train.objective.quantization.weight", "0.01") == 0
    assert "in codes of 16 bytes: rSum" in capsys.readouterr().out
    searcher = Searcher.open(place / "runs" / "both")
    codebook = open_codebook(place / "runs" / "both" / "model")
    assert codebook.rotation.shape == (320, 320)
    vectors = torch.from_numpy(searcher.index.vectors.copy())
    left = (vectors - codebook.decode(encode(codebook, vectors))).square().sum(1).mean()
    assert left < 0.5 * (vectors - vectors.mean(0)).square().sum(1).mean()


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("less", {"objective.quantization.codewords": 257}, "found 257 codewords in a sub-space; expected at most 256"),
        ("less", {"objective.quantization.codewords": 256}, "found 240 embeddings of the training split for 256 code"),
        (
            "hier",
            {"objective.quantization.weight": 0.01, "model.local.dim": 24},
            "found 16 sub-spaces for index vectors of 88 dimensions (model.dim and, with a local space, model.local",
        ),
    ],
)
def test_codes_that_could_not_be_stored_are_refused_before_training(place, done, capsys, method, settings, message):
    name = "-".join(["refused", method, *map(str, settings.values())])
    arguments = ("--cache", place / "cache", "--runs", place / "runs", "--name", name, *SMALL)
    changes = [word for key, value in settings.items() for word in (f"--train.{key}", value)]
    assert type_in("run", method, *arguments, *changes) == 2
    assert message in capsys.readouterr().err
    assert not (place / "runs" / name / "checkpoints").exists()


def test_a_corrected_search_sets_hubs_back(done):
    searcher = Searcher.open(done)
    query = searcher.embed_texts(["a red ball"])
    vectors = torch.from_numpy(searcher.index.vectors.copy())
    bias = HubnessCorrection.open(done / "model" / "hubness.safetensors").bias(vectors, "images")
    order = (-(query - vectors).square().sum(1) / 2 - bias).argsort(descending=True)[:5]
    hits = searcher.search("a red ball", k=5, corrected=True)
    items = searcher.index.items["item"]
    assert [hit.sample.image_id for hit in hits] == [items[int(row)] for row in order]


def test_the_bias_of_an_image_is_stored_with_the_index(done, monkeypatch):
    searcher = Searcher.open(done)
    vectors = torch.from_numpy(searcher.index.vectors.copy())
    expected = HubnessCorrection.open(done / "model" / "hubness.safetensors").bias(vectors, "images")
    assert searcher.index.items["hubness"].to_numpy() == pytest.approx(expected.numpy())
    monkeypatch.setattr(HubnessCorrection, "bias", lambda *_: pytest.fail("computed again"))
    assert len(searcher.search("a red ball", k=5, corrected=True)) == 5


def test_a_correction_is_not_measured_on_what_it_was_fitted_to(done, capsys):
    assert type_in("evaluate", done, "--split", "train") == 0
    assert "corrected" not in capsys.readouterr().out
    assert not (done / "metrics-train-corrected.json").exists()


def test_without_training_queries_there_is_no_correction(place, done, capsys):
    arguments = ("--cache", place / "cache", "--runs", place / "runs", "--name", "plain")
    assert type_in("run", "less", *arguments, *SMALL, "--evaluate.hubness.queries", "0") == 0
    assert not (place / "runs" / "plain" / "metrics-corrected.json").exists()
    assert type_in("search", place / "runs" / "plain", "a red ball", "--corrected") == 2
    assert "no hubness correction" in capsys.readouterr().err


@pytest.fixture(scope="module")
def reseeded(place, done):
    """A run that differs from the first in its seed."""
    arguments = ("--cache", place / "cache", "--runs", place / "runs", "--name", "reseeded", "--train.seed", "1")
    assert type_in("run", "less", *arguments, *SMALL) == 0
    return place / "runs" / "reseeded"


def test_runs_are_compared(place, done, reseeded, capsys):
    capsys.readouterr()
    assert type_in("compare", done, reseeded, done) == 0
    *_, first, second, same = capsys.readouterr().out.splitlines()
    metrics = json.loads((done / "metrics.json").read_text())
    numbers = [metrics[d][k] for d in ("i2t", "t2i") for k in ("r1", "r5", "r10")]
    assert [float(number) for number in first.split()[1:7]] == [pytest.approx(number, abs=0.051) for number in numbers]
    assert f"{metrics['rsum']:.1f} (" in first
    assert ", p " in second
    assert "+0.0 (+0.0 to +0.0, p 1.000)" in same
    assert type_in("compare", done, place / "cache") == 2


def test_runs_are_joined_to_one_model(place, done, reseeded, capsys):
    assert type_in("join", done, reseeded, "--name", "joined") == 0
    joined_run = place / "runs" / "joined"
    assert f"python -m pipeline compare {done} {reseeded} {joined_run}" in capsys.readouterr().out
    members = [Searcher.open(run) for run in (done, reseeded)]
    vectors = [member.embed_texts(["a red star"]) for member in members]
    searcher = Searcher.open(joined_run)
    torch.testing.assert_close(searcher.embed_texts(["a red star"]), torch.cat(vectors, 1) / 2**0.5)
    assert searcher.search("a red star", k=3)[0].rank == 1
    metrics = json.loads((joined_run / "metrics.json").read_text())
    assert type_in("evaluate", joined_run) == 0
    assert json.loads((joined_run / "metrics-val.json").read_text()) == metrics
    assert (joined_run / "metrics-corrected.json").exists()
    took = [json.loads((run / "training.json").read_text()) for run in (done, reseeded, joined_run)]
    for name in ("seconds", "steps", "parameters"):
        assert took[2][name] == pytest.approx(took[0][name] + took[1][name])
    experiment = client(place).get_experiment_by_name("isthmus")
    (run,) = [
        run
        for run in client(place).search_runs([experiment.experiment_id])
        if run.data.tags["mlflow.runName"] == "joined"
    ]
    assert run.info.status == "FINISHED"
    assert run.data.metrics["rsum"] == pytest.approx(metrics["rsum"])
    assert type_in("train", "--resume", joined_run) == 2
    assert "joins other runs and has nothing to train" in capsys.readouterr().err
    assert type_in("join", joined_run, done, "--name", "three") == 2
    assert "is an ensemble, and ensembles are not joined" in capsys.readouterr().err
    assert type_in("join", done) == 2
    assert "found one run to join, first; name two or more" in capsys.readouterr().err
    assert type_in("join", done, place, "--name", "more") == 2
    capsys.readouterr()
    assert type_in("join", done, reseeded, "--name", "my run") == 2
    assert "error: join: name: found 'my run', expected letters, digits and" in capsys.readouterr().err
    assert not (place / "runs" / "three").exists()


def test_a_join_that_was_interrupted_is_made_again(place, done, reseeded, monkeypatch, capsys):
    from pipeline import stages

    with monkeypatch.context() as patch:
        patch.setattr(stages, "_conclude", interrupt)
        assert type_in("join", done, reseeded, "--name", "broken-join") == 130
    assert "the same command starts again" in capsys.readouterr().err
    folder = place / "runs" / "broken-join"
    with FileLock(folder / ".lock"):
        assert type_in("join", done, reseeded, "--name", "broken-join") == 2
    assert "another process is at work on this run" in capsys.readouterr().err
    assert type_in("join", done, reseeded, "--name", "broken-join") == 0
    finished = (folder / "metrics.json").read_bytes()
    assert type_in("join", done, reseeded, "--name", "broken-join") == 2
    assert "exists; give another --name" in capsys.readouterr().err
    assert (folder / "metrics.json").read_bytes() == finished
    assert type_in("join", done, reseeded, "--name", done.name) == 2
    assert (done / "metrics.json").exists()


def interrupt(*_):
    raise KeyboardInterrupt


def test_a_member_that_is_not_finished_is_told_before_a_run_is_made(place, done, reseeded, tmp_path, capsys):
    member = tmp_path / "member"
    shutil.copytree(reseeded, member)
    (member / "training.json").unlink()
    assert type_in("join", done, member, "--name", "early") == 2
    assert f"{member} is not finished" in capsys.readouterr().err
    assert not (place / "runs" / "early").exists()


def test_an_unfinished_run_cannot_be_compared(done, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text((done / "config.yaml").read_text())
    assert type_in("compare", done, tmp_path) == 2
    assert "no hits.npz of a finished run" in capsys.readouterr().err


def test_runs_on_other_splits_are_not_compared(place, done, capsys):
    """Both splits have 16 images with 5 captions each."""
    arguments = ("--cache", place / "cache", "--runs", place / "runs", "--name", "on-test", *SMALL)
    splits = ("--data.scenes.test", "16", "--data.evaluate", "test")
    assert type_in("run", "less", *arguments, *splits) == 0
    assert type_in("compare", done, place / "runs" / "on-test") == 2
    found = "found 16 images with 80 captions of the split 'test' and 16 images with 80 captions of the split 'val'"
    assert found in capsys.readouterr().err


def test_what_compare_reads_is_renewed_by_evaluate(done, capsys):
    file = done / "hits.npz"
    before = file.read_bytes()
    file.unlink()
    assert type_in("evaluate", done, "--split", "test") == 0
    assert not file.exists()
    assert type_in("evaluate", done) == 0
    assert file.read_bytes() == before


def test_what_training_took_is_kept(done):
    took = json.loads((done / "training.json").read_text())
    assert took["steps"] == 2 * 8  # of 40 images, two captions at once: 120 groups in batches of at most 16
    assert took["epoch"] in (1, 2)
    assert took["seconds"] > 0
    weights = load_file(done / "model" / "weights.safetensors")
    fitted = {"mean", "scale", "ids", "idf"}
    learned = [value for name, value in weights.items() if name.rpartition(".")[2] not in fitted]
    assert took["parameters"] == sum(value.numel() for value in learned)


@pytest.fixture(scope="module", params=["hier", "sede-vse", "sede-scan", "sede-vsrn", "vse++", "siglip", "fusemix"])
def other(place, done, request):
    """One finished run of every method that has a state or a host of its own."""
    arguments = ("--cache", place / "cache", "--runs", place / "runs", "--name", request.param)
    assert type_in("run", request.param, *arguments, *SMALL) == 0
    return place / "runs" / request.param


def test_every_method_runs_and_is_measured_again(other, capsys):
    metrics = json.loads((other / "metrics.json").read_text())
    assert 0 < metrics["rsum"] <= 600
    page = (other / "report.html").read_text("utf-8")
    assert page.count("data:image/jpeg;base64,") >= 20
    assert type_in("evaluate", other) == 0
    assert json.loads((other / "metrics-val.json").read_text())["rsum"] == pytest.approx(metrics["rsum"])
    assert not (other / "model" / "codebook.safetensors").exists()  # `less` alone learns codes
    assert not (other / "metrics-codes.json").exists()
    capsys.readouterr()
    code = type_in("search", other, "a red ball", "--k", "2")
    out = capsys.readouterr()
    if other.name == "sede-scan":
        assert code == 2
        assert "there is no vector to index or to search" in out.err
    else:
        assert code == 0
        assert len([line for line in out.out.splitlines() if line.startswith("    ")]) == 2


def test_the_local_share_is_tuned_and_stored(place, done):
    arguments = ("--cache", place / "cache", "--runs", place / "runs", "--name", "shared")
    assert type_in("run", "hier", *arguments, *SMALL, "--train.model.local.share", "0.999") == 0
    weights = load_file(place / "runs" / "shared" / "model" / "weights.safetensors")
    assert float(weights["share"]) in [pytest.approx(share) for share in SHARES]


def test_the_page_shows_pictures_and_numbers(done):
    page = (done / "report.html").read_text("utf-8")
    assert page.count("data:image/jpeg;base64,") >= 20
    assert f"{json.loads((done / 'metrics.json').read_text())['rsum']:.1f}" in page


def test_the_page_has_names_where_pictures_are_gone(done, tmp_path, monkeypatch):
    monkeypatch.setattr(Sample, "read", lambda _: (_ for _ in ()).throw(FileNotFoundError()))
    run = tmp_path / "elsewhere"
    shutil.copytree(done, run)
    assert type_in("train", "--resume", run) == 0
    page = (run / "report.html").read_text("utf-8")
    assert page.count("(its picture is not at hand)") == 5
    assert "data:image/jpeg;base64," not in page


def test_half_a_line_of_metrics_does_not_cost_the_page(done, tmp_path):
    run = tmp_path / "torn"
    shutil.copytree(done, run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "ti\n\0\0\0\n')
    (run / "report.html").unlink()
    assert type_in("train", "--resume", run) == 0
    assert "loss" in (run / "report.html").read_text("utf-8")


def test_what_to_type_next_can_be_typed(place, done, monkeypatch, capsys):
    """In a folder whose name must be quoted, and with settings that no recipe has."""
    monkeypatch.chdir(place)
    arguments = ("--cache", "cache", "--runs", "my runs", "--name", "a+b", *SMALL)
    assert type_in("run", "less", *arguments) == 0
    lines = capsys.readouterr().out.partition("what to type next\n")[2].splitlines()
    search, again = (shlex.split(line, comments=True) for line in lines[:2])
    assert search[:5] == ["python", "-m", "pipeline", "search", "my runs/a+b"]
    assert type_in(*search[3:]) == 0
    assert again[:5] == ["python", "-m", "pipeline", "run", "my runs/a+b/config.yaml"]
    capsys.readouterr()
    assert type_in(*again[3:]) == 0
    assert "columns found, 0 rows to extract" in capsys.readouterr().out


def test_a_split_that_does_not_fit_the_protocol_is_told_before_a_run_is_made(place, done, capsys):
    arguments = ("--cache", place / "cache", "--runs", place / "runs", "--name", "coco", *SMALL)
    assert type_in("train", "less", *arguments, "--evaluate.protocol", "coco") == 2
    expected = "the split 'val' has 16 images with features, and COCO's protocol, five folds of 1,000, needs 5000; mea"
    assert expected in capsys.readouterr().err
    assert not (place / "runs" / "coco").exists()


def test_a_second_experiment_extracts_nothing(place, done, capsys):
    arguments = ("--cache", place / "cache", "--runs", place / "runs", "--name", "second")
    assert type_in("run", "less", *arguments, *SMALL, "--train.lr", "1e-3") == 0
    out = capsys.readouterr().out
    assert "columns found, 0 rows to extract" in out
    assert (place / "runs" / "second" / "metrics.json").exists()


def test_a_run_that_another_process_trains_is_left_alone(done, capsys):
    before = (done / "metrics.json").stat().st_mtime_ns
    with FileLock(done / ".lock"):
        assert type_in("train", "--resume", done) == 2
    assert "another process is at work on this run; wait until it has finished" in capsys.readouterr().err
    assert (done / "metrics.json").stat().st_mtime_ns == before


def test_search_answers_text_and_pictures_with_files_and_distances(place, done, capsys):
    searcher = Searcher.open(done)
    picture = searcher.index.items["uri"][3]
    page = place / "found.html"
    assert type_in("search", done, "a red ball", picture, "--k", "3", "--page", page) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("    ")]
    assert [int(line[0]) for line in lines] == [1, 2, 3, 1, 2, 3]
    assert all(Path(line[2]).is_file() for line in lines)
    distances = [float(line[1]) for line in lines]
    assert distances == sorted(distances[:3]) + sorted(distances[3:])
    assert lines[3][2] == picture
    assert distances[3] < 0.05
    assert page.read_text("utf-8").count("data:image/jpeg;base64,") == 7


def test_a_page_that_cannot_be_written_is_told_before_the_model_is_opened(done, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Searcher, "open", lambda _: pytest.fail("the model was opened"))
    (tmp_path / "file").touch()
    for page in (tmp_path, tmp_path / "file" / "page.html", "."):
        assert type_in("search", done, "a red ball", "--page", page) == 2
        assert f"--page {page}: expected an HTML file in a folder that can be written to" in capsys.readouterr().err


def test_a_picture_that_cannot_be_asked_is_told_before_the_model_is_opened(done, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Searcher, "open", lambda _: pytest.fail("the model was opened"))
    (tmp_path / "words.png").write_text("no picture")
    (tmp_path / "folder.gif").mkdir()
    for query, message in (
        ("a dog on quarry.JPG", "error: no such picture 'a dog on quarry.JPG' (No such file or directory): a query"),
        (tmp_path / "folder.gif", "folder.gif' (Is a directory): a query that ends in .gif names a picture"),
        (tmp_path / "words.png", "words.png' cannot be shown to the model: no image format that PIL knows: 10 bytes"),
    ):
        assert type_in("search", done, "a red ball", query) == 2
        assert message in capsys.readouterr().err


def test_a_model_that_was_trained_on_other_weights_is_refused(done, tmp_path, capsys):
    """As after another version of the encoder is installed."""
    run = tmp_path / "older"
    shutil.copytree(done, run)
    weights, settings = open_text_encoder("minilm").card.weights, run / "model" / "model.json"
    assert weights in settings.read_text()
    settings.write_text(settings.read_text().replace(weights, "f" * 64))
    assert type_in("search", run, "a red ball") == 2
    expected = f"opens weights {weights[:8]}, the model was trained on what ffffffff said; install the version"
    assert expected in capsys.readouterr().err


def test_search_from_python_agrees_with_the_index(done):
    searcher = Searcher.open(done)
    hits = searcher.search("two green stars", k=4)
    assert [hit.rank for hit in hits] == [1, 2, 3, 4]
    direct = searcher.nearest(searcher.embed_texts(["something else", "two green stars"]), k=4)[1]
    assert [hit.sample.image_id for hit in direct] == [hit.sample.image_id for hit in hits]


def test_a_query_is_embedded_as_the_same_caption_in_the_cache(done):
    """Sentence and words of captions of several lengths; one without any known word changes nothing for the others."""
    searcher = Searcher.open(done)
    reader = FeatureReader(searcher.inputs)
    captions = reader.dataset.captions
    by_length = sorted(range(len(captions)), key=lambda row: len(captions[row]))
    rows = np.array([by_length[0], by_length[len(captions) // 2], by_length[-1]])
    with torch.inference_mode():
        cached = searcher.model.index_vectors(searcher.model.embed_texts(reader.texts(rows)))
    asked = searcher.embed_texts([*(captions[row] for row in rows), "?"])
    gaps = torch.cdist(asked[:3], cached)  # lengths are 1
    assert gaps.diagonal().max() < 0.02
    assert (gaps + torch.eye(3)).min() > 0.1
    alone = searcher.embed_texts(["?"])
    assert alone.norm(dim=1).item() == pytest.approx(1, abs=1e-5)
    assert (alone - asked[3:]).norm() < 0.02


def test_a_run_is_evaluated_again_on_another_split(done, capsys):
    assert type_in("evaluate", done, "--split", "test") == 0
    assert "test, full: rSum" in capsys.readouterr().out
    assert json.loads((done / "metrics-test.json").read_text())["split"] == "test"


def test_evaluation_is_repeatable(done):
    assert type_in("evaluate", done) == 0
    again = json.loads((done / "metrics-val.json").read_text())
    assert again["rsum"] == pytest.approx(json.loads((done / "metrics.json").read_text())["rsum"])


def test_training_without_features_says_what_to_type(place, done, capsys):
    arguments = ("--cache", place / "cache", "--runs", place / "runs", "--name", "third", *SMALL)
    code = type_in("train", "less", *arguments, "--featurize.images", "efficientnet-lite1")
    assert code == 2
    assert "run `python -m pipeline featurize` first" in capsys.readouterr().err
    assert not (place / "runs" / "third").exists()


def test_training_alone_uses_the_cache(place, done):
    arguments = ("--cache", place / "cache", "--runs", place / "runs", "--name", "fourth", *SMALL)
    assert type_in("train", "less", *arguments) == 0
    assert (place / "runs" / "fourth" / "metrics.json").exists()


def test_a_run_repeated_from_its_own_settings_gives_the_same_numbers(place, done):
    arguments = ("--runs", place / "runs", "--name", "again")
    assert type_in("run", done / "config.yaml", *arguments) == 0
    one, two = (json.loads((place / "runs" / name / "metrics.json").read_text()) for name in ("first", "again"))
    assert one == two


def test_a_taken_name_is_refused(place, done, capsys):
    assert type_in("run", "less", "--cache", place / "cache", "--runs", place / "runs", "--name", "first", *SMALL) == 2
    assert "exists; give another --name, or continue it" in capsys.readouterr().err


def test_an_interrupted_run_is_resumed_in_its_mlflow_run(place, done, monkeypatch):
    from train import loop

    arguments = ("--cache", place / "cache", "--runs", place / "runs", "--name", "broken", *SMALL)
    validate = loop._Trainer.validate

    def stop_at_the_second(self, epoch):
        if epoch == 1:
            raise KeyboardInterrupt
        return validate(self, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Trainer, "validate", stop_at_the_second)
        assert type_in("train", "less", *arguments) == 130
    folder = place / "runs" / "broken"
    run_id = json.loads((folder / "mlflow.json").read_text())["run_id"]
    assert client(place).get_run(run_id).info.status == "KILLED"
    assert type_in("train", "--resume", folder) == 0
    assert json.loads((folder / "mlflow.json").read_text())["run_id"] == run_id
    assert client(place).get_run(run_id).info.status == "FINISHED"
    metrics = [json.loads((place / "runs" / name / "metrics.json").read_text()) for name in ("first", "broken")]
    assert metrics[0] == metrics[1]


def test_a_run_goes_on_with_the_data_it_began_with(place, done, monkeypatch, capsys):
    """Its source holds other pictures by then; the version that it is pinned to is still in the cache."""
    from train import loop

    names = (done.parent / "pinned", "--cache", place / "cache", "--runs", place / "runs", "--name", "pinned")
    with monkeypatch.context() as patch:
        patch.setattr(loop._Trainer, "validate", lambda _self, _epoch: (_ for _ in ()).throw(KeyboardInterrupt))
        assert type_in("train", "less", *names[1:], *SMALL) == 130
    folder = names[0]
    pin = json.loads((folder / "cache.json").read_text())
    assert pin["columns"].keys() == {"efficientnet-lite0.pooled", "minilm.sentence", "lexicon-en.lemmas"}
    monkeypatch.setattr("pipeline.stages.load", lambda *_: pytest.fail("the source was read"))
    assert type_in("train", "--resume", folder) == 0
    assert (folder / "metrics.json").read_bytes() == (done / "metrics.json").read_bytes()


def test_a_run_goes_on_elsewhere(place, done, monkeypatch, capsys):
    """Begun on a cluster of 64 workers, continued in this process; the settings that it began with stay written."""
    from train import loop

    folder = place / "runs" / "moved"
    arguments = ("--cache", place / "cache", "--runs", place / "runs", "--name", "moved", *SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(loop._Trainer, "validate", lambda _self, _epoch: (_ for _ in ()).throw(KeyboardInterrupt))
        assert type_in("train", "less", *arguments) == 130
    text = (folder / "config.yaml").read_text()
    began = text.replace("  workers: 0\n", "  workers: 64\n").replace("  address: ''\n", "  address: auto\n")
    (folder / "config.yaml").write_text(began)
    assert type_in("train", "--resume", folder) == 2
    assert "lower --train.workers" in capsys.readouterr().err
    sessions = []
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.stages.ray_session", lambda config: nullcontext(sessions.append(config)))
        patch.setattr("pipeline.stages._train", lambda *_: None)
        assert type_in("train", "--resume", folder, "--ray.address", "", "--ray.cpus", "3") == 0
    assert sessions == [RayConfig(address="", cpus=3)]
    assert type_in("train", "--resume", folder, "--train.workers", "0") == 0
    assert (folder / "metrics.json").read_bytes() == (done / "metrics.json").read_bytes()
    assert (folder / "config.yaml").read_text() == began


def test_a_run_whose_data_is_gone_is_not_continued(place, done, tmp_path, capsys):
    folder = tmp_path / "lost"
    folder.mkdir()
    for name in ("config.yaml", "cache.json"):
        (folder / name).write_bytes((done / name).read_bytes())
    pin = json.loads((folder / "cache.json").read_text())
    for changes, message in (
        ({"dataset": str(tmp_path / "set@0")}, "not a readable index"),
        ({"id": "0" * 64}, "lost began with 0000"),
        ({"columns": {"minilm.sentence": "0" * 64}}, "not in the cache (there is minilm.sentence@"),
    ):
        (folder / "cache.json").write_text(json.dumps({**pin, **changes}))
        assert type_in("train", "--resume", folder) == 2
        assert message in capsys.readouterr().err


def test_all_four_packages_come_from_this_repository():
    import evaluate
    import featurize
    import pipeline
    import train

    root = Path(__file__).parents[2]
    for package in (evaluate, featurize, pipeline, train):
        assert Path(package.__file__).parent == root / package.__name__
