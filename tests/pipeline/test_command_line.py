"""The command line: help that names everything, mistakes that end in one line, arguments that arrive."""

import ast
import errno
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import pipeline
from pipeline.__main__ import USER_ERRORS, main
from pipeline.config import RunConfig, dump_yaml, keys, merge
from pipeline.recipes import RECIPES
from train.config import PLACEMENT

ROOT = Path(__file__).parents[2]


def python_m_pipeline(*argv, cwd=ROOT):
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *argv],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )


class Stages(SimpleNamespace):
    """Stands for pipeline.stages, and remembers what it was asked."""

    def __init__(self, **answers):
        super().__init__(calls=[])
        for name in (
            "run",
            "featurize",
            "train",
            "resume",
            "evaluate",
            "search",
            "compare",
            "join",
        ):
            setattr(self, name, self._recorder(name, answers.get(name)))

    def _recorder(self, name, answer):
        def call(*arguments, **options):
            self.calls.append((name, *arguments, *([options] if options else [])))
            return answer(*arguments) if callable(answer) else answer

        return call


@pytest.fixture
def stages(monkeypatch):
    def put(**answers):
        fake = Stages(**answers)
        monkeypatch.setitem(sys.modules, "pipeline.stages", fake)
        monkeypatch.setattr(pipeline, "stages", fake, raising=False)
        return fake

    return put


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_yaml(RunConfig()))
    return folder


def mistake(capsys, *argv):
    """The error line of a command that must fail with exit code 2."""
    try:
        code = main(argv)
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    return err


# help


def test_help_answers_within_a_second_and_reads_as_a_start():
    before = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    done = python_m_pipeline("--help")
    assert sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - before < 1  # CPU seconds; 0.15 when written
    assert done.returncode == 0
    assert done.stderr == ""
    for word in ("featurize", "train", "evaluate", "search", "compare", "join", "cache", "submit", "scenes"):
        assert word in done.stdout
    assert done.stdout.count("  python -m pipeline ") == 5
    assert max(map(len, done.stdout.splitlines())) <= 110


def test_help_imports_nothing_heavy():
    code = (
        "import sys, pipeline.__main__ as m; m.build_parser().format_help();"
        "print(sorted({'torch','ray','mlflow','pydantic','numpy','pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_run_s_help_lists_every_method_and_setting(capsys):
    with pytest.raises(SystemExit) as end:
        main(["run", "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    joined = " ".join(text.split()).replace("- ", "-")  # lines may be broken behind a hyphen
    for key in keys(RunConfig()):
        assert f"--{key.name} {key.type}" in joined
        assert f"{key.help}; default {key.value or 'empty'}".replace("- ", "-") in joined
        assert f"{key.section}:" in text
    for name, recipe in RECIPES.items():
        assert f"\n  {name}\n" in text
        assert recipe.description in joined
    assert "train.objective.center.weight 0.05" in joined  # what `less` changes
    for short in ("--dataset", "--root", "--cache", "--runs", "--name"):
        assert f"\n  {short} " in text


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("featurize", ["METHOD", "--config", "run --help"]),
        ("train", ["METHOD", "--resume RUN", "latest", "--ray.*", "--train.workers", "--train.checkpoint_steps"]),
        ("evaluate", ["RUN", "--split", "--protocol", "--runs DIR"]),
        ("search", ["QUERY", "--k", "--page", "HTML", "--corrected"]),
        ("compare", ["RUN", "--runs DIR", "compared with"]),
        ("join", ["RUN", "--name NAME", "one model with one index"]),
        ("cache", ["ls", "verify", "explain", "repair", "gc", "keeps to the version"]),
        ("cache verify", ["CACHE", "--reextract K", "default cache"]),
        ("cache explain", ["A", "B", "folder of a column"]),
        ("cache repair", ["--address", "default cache"]),
        ("cache gc", ["--days N", "--delete", "default 7"]),
        ("submit", ["--address", "--python", "--no-wait", "http://127.0.0.1:8265", "RAY_AUTH_MODE", "Ctrl-C"]),
    ],
)
def test_every_command_explains_itself(capsys, command, words):
    with pytest.raises(SystemExit) as end:
        main([*command.split(), "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert f"usage: python -m pipeline {command}" in text
    for word in words:
        assert word in text


# mistakes


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "error: the following arguments are required: COMMAND\n`python -m pipeline --help` explains"),
        (["fly"], "error: argument COMMAND: invalid choice: 'fly' (choose from 'run', "),
        (["--fly"], "error: the following arguments are required: COMMAND"),
        (["--fly", "cache", "ls"], "error: unknown option --fly\n"),
        (["run"], "error: the following arguments are required: METHOD\n`python -m pipeline run --help` explains"),
        (["run", "les"], "or a .yaml file; did you mean less?"),
        (["run", "gone.yaml"], "error: gone.yaml: expected a YAML file; "),
        (["run", "less", "--lr", "1"], "error: unknown option --lr; did you mean --train.lr?"),
        (["run", "less", "--lr=1"], "error: unknown option --lr; did you mean --train.lr?"),
        (["run", "less", "--datset", "x"], "error: unknown option --datset; did you mean --dataset"),
        (["run", "less", "--train.l", "1"], "error: unknown option --train.l; did you mean --train.lr"),
        (["run", "less", "coco"], "error: unexpected argument 'coco'"),
        (["run", "less", "--train.lr"], "error: argument --train.lr: expected one argument"),
        (["run", "less", "--train.lr", "x"], "error: command line: train.lr: found 'x', expected number"),
        (["run", "less", "--name", "a/b"], "error: command line: name: found 'a/b', expected letters"),
        (["run", "less", "--config", "gone.yaml"], "error: gone.yaml: expected a YAML file"),
        (["train"], "error: train: found neither METHOD nor --resume RUN, expected one of them"),
        (["train", "--resume", "gone"], "error: found no run 'gone'"),
        (
            ["train", "less", "--resume", "x", "--train.lr", "1", "--config", "a.yaml"],
            "error: --resume continues a run with its own settings: found less, a.yaml, --train.lr, expected",
        ),
        (
            ["train", "--resume", "x", "--train.workers", "0", "--ray.address", "", "--cache", "c"],
            "own settings: found --cache, expected --resume RUN alone or with --runs, --ray.*, --train.workers, ",
        ),
        (
            ["train", "--resume", "gone", "--train.workers", "two"],
            "error: command line: train.workers: found 'two', expected integer",
        ),
        (["evaluate", "gone"], "error: found no run 'gone'"),
        (["evaluate", "gone", "--protocol", "x"], "error: argument --protocol: invalid choice: 'x' (choose from"),
        (["evaluate", "gone", "--spilt", "x"], "error: unknown option --spilt; did you mean --split?"),
        (["search", "latest"], "error: the following arguments are required: QUERY"),
        (["search", "gone", "a dog"], "error: found no run 'gone'"),
        (["search", "gone", "a", "--k", "0"], "error: argument --k: found '0', expected a whole number of 1 or more"),
        (["cache", "rm"], "error: argument ACTION: invalid choice: 'rm' (choose from 'ls', 'verify', 'explain', "),
        (["cache", "ls", "gone"], "gone: no data sets here; `python -m pipeline featurize` makes some"),
        (["cache", "explain", "one"], "error: the following arguments are required: B"),
        (["cache", "verify", "--reextract", "0"], "error: argument --reextract: found '0', expected a whole number"),
        (["cache", "gc", "--days", "-1"], "error: argument --days: found '-1', expected a number of 0 or more"),
        (["submit"], "error: the following arguments are required: COMMAND"),
        (["submit", "search", "latest", "x"], "error: submit: found 'search latest', expected run, featurize or train"),
        (["submit", "train", "--resume", "gone"], "error: found no run 'gone'"),
        (["submit", "train", "--resume", "/x", "--train.lr", "1"], "own settings: found --train.lr, expected"),
        (["submit", "train", "--resume", "/x", "--ray.cpus", "all"], "ray.cpus: found 'all', expected integer"),
        (["submit", "train"], "error: train: found neither METHOD nor --resume RUN, expected one of them"),
        (["submit", "run", "less", "--lr", "1"], "error: unknown option --lr; did you mean --train.lr?"),
        (["submit", "--fly", "run", "less"], "error: submit: found '--fly run', expected run, featurize or train"),
        (["submit", "run", "less", "--train.lr", "x"], "error: command line: train.lr: found 'x', expected number"),
    ],
)
def test_mistakes_are_answered_in_one_line(capsys, argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in mistake(capsys, *argv)


def test_a_mistake_in_a_process_of_its_own(tmp_path):
    done = python_m_pipeline("run", "less", "--lr", "1e-3", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "error: unknown option --lr; did you mean --train.lr?\n`python -m pipeline run --help` explains\n"
    )


def test_every_error_class_of_the_packages_is_an_answer_to_the_user():
    defined = set()
    for package in ("featurize", "train", "evaluate", "pipeline"):
        for path in (ROOT / package).rglob("*.py"):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.ClassDef) and node.name.endswith("Error"):
                    defined.add((module, node.name, ast.unparse(node.bases[0])))
    known = set(USER_ERRORS.values())
    caught = {("featurize.copies", "NoRoomError")}  # where shards are read: what has no room is streamed
    answers = {(module, name) for module, name, base in defined if base not in known}
    assert answers - caught == set(USER_ERRORS.items())


def test_known_errors_of_a_stage_are_answers_and_others_keep_their_traceback(stages, capsys):
    from featurize.datasets.sample import DataError

    def fail(error):
        def call(*_):
            raise error

        return call

    stages(run=fail(DataError("data.csv:3: found no image")))
    assert mistake(capsys, "run", "less") == "error: data.csv:3: found no image\n"
    stages(run=fail(ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError):
        main(["run", "less"])


def test_a_known_error_from_a_ray_task_is_shown_without_ray_s_traceback(stages, capsys):
    from ray.exceptions import RayTaskError

    from featurize.datasets.sample import DataError

    raised = RayTaskError("extract", "Traceback ...", DataError("broken.jpg"), "p", 1, "127.0.0.1")

    def call(_):
        raise raised.as_instanceof_cause()

    stages(featurize=call)
    assert mistake(capsys, "featurize", "less") == "error: broken.jpg\n"


# what arrives


@pytest.mark.parametrize("command", ["run", "featurize", "train"])
def test_settings_come_from_recipe_then_files_then_command_line(stages, tmp_path, command):
    fake = stages()
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("train: {lr: 0.1, epochs: 11}\nfeaturize: {views: [plain, flip]}\n")
    second.write_text("train: {epochs: 12, batch: 64}\n")
    argv = ["--dataset", "flickr8k", "less", "--config", str(first), "--config", str(second), "--train.batch", "32"]
    argv += ["--root=/data", "--cache", "c", "--runs", "r", "--name", "n", "--data.holdout", "0.1"]
    assert main([command, *argv]) == 0
    ((called, config),) = fake.calls
    assert called == command
    assert config == merge(
        RECIPES["less"].config,
        {
            "data": {"dataset": "flickr8k", "root": "/data", "holdout": 0.1},
            "train": {"lr": 0.1, "epochs": 12, "batch": 32},
            "featurize.views": "plain,flip",
            "cache": "c",
            "runs": "r",
            "name": "n",
        },
        "",
    )


def test_a_setting_has_its_long_name_too(stages):
    fake = stages()
    main(["run", "less", "--data.dataset", "coco", "--data.root", "x"])
    assert (fake.calls[0][1].data.dataset, fake.calls[0][1].data.root) == ("coco", "x")


def test_an_error_in_a_config_file_names_its_line(tmp_path, capsys):
    path = tmp_path / "a.yaml"
    path.write_text("train:\n  rate: 1\n")
    assert mistake(capsys, "run", "less", "--config", str(path)).startswith(f"error: {path}:2: unknown key train.rate")


def test_a_run_is_repeated_by_its_config(stages, run_folder):
    fake = stages()
    assert main(["run", str(run_folder / "config.yaml"), "--train.seed", "1"]) == 0
    assert fake.calls == [("run", merge(RunConfig(), {"train.seed": 1}, ""))]


def test_resume_evaluate_and_search_find_their_run(stages, run_folder):
    fake = stages()
    runs = ["--runs", str(run_folder.parent)]
    assert main(["train", "--resume", "latest", *runs]) == 0
    assert main(["evaluate", str(run_folder), "--split", "test", "--protocol", "coco"]) == 0
    assert main(["evaluate", "one", *runs]) == 0
    assert main(["search", "one", "two dogs", "cat.jpg", "--k", "3", "--page", "found.html", *runs]) == 0
    assert main(["search", "latest", "a", "--corrected", *runs]) == 0
    assert main(["compare", "one", str(run_folder), *runs]) == 0
    assert main(["join", "one", str(run_folder), "--name", "both", *runs]) == 0
    assert fake.calls == [
        ("resume", run_folder, {}),
        ("evaluate", run_folder, "test", "coco"),
        ("evaluate", run_folder, None, None),
        ("search", run_folder, ["two dogs", "cat.jpg"], 3, Path("found.html"), {"corrected": False}),
        ("search", run_folder, ["a"], 5, None, {"corrected": True}),
        ("compare", [run_folder, run_folder]),
        ("join", [run_folder, run_folder], "both"),
    ]


def test_a_run_may_be_resumed_elsewhere(stages, run_folder):
    fake = stages()
    places = {
        "ray.address": "",
        "ray.cpus": "2",
        "ray.object_store_mb": "100",
        **{f"train.{name}": "1" for name in PLACEMENT},
    }
    argv = [word for name, value in places.items() for word in (f"--{name}", value)]
    assert main(["train", "--resume", "one", "--runs", str(run_folder.parent), *argv]) == 0
    assert fake.calls == [("resume", run_folder, places)]


# Ctrl-C


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("command", ["run", "train"])
def test_ctrl_c_names_the_run_that_can_be_continued(stages, capsys, run_folder, command):
    def begin(config):
        folder = Path(config.runs) / "two words"
        folder.mkdir()
        (folder / "config.yaml").write_text("")
        raise KeyboardInterrupt

    stages(**{command: begin})
    assert main([command, "less", "--runs", str(run_folder.parent)]) == 130
    expected = f"stopped; to go on: python -m pipeline train --resume '{run_folder.parent / 'two words'}'\n"
    assert capsys.readouterr().err.lstrip("\n") == expected


@pytest.mark.parametrize("command", ["run", "featurize"])
def test_ctrl_c_before_a_run_has_begun(stages, capsys, command, tmp_path):
    stages(**{command: interrupt})
    assert main([command, "less", "--runs", str(tmp_path)]) == 130
    assert "stopped; the same command goes on: finished shards are kept" in capsys.readouterr().err


def test_ctrl_c_elsewhere(stages, capsys, run_folder):
    stages(resume=interrupt)
    assert main(["train", "--resume", str(run_folder)]) == 130
    assert "stopped; the same command starts again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/cache"), "error: not allowed ([Errno 13] Permission"),
        (OSError(errno.EROFS, "Read-only file system", "/cache"), "error: not allowed ([Errno 30] Read-only"),
        (OSError(errno.ENOSPC, "No space left on device"), "error: no room on the disk ([Errno 28] No space"),
    ],
)
def test_places_that_cannot_be_written_to(stages, capsys, error, told):
    def refused(*_):
        raise error

    stages(run=refused)
    assert main(["run", "less"]) == 2
    assert told in capsys.readouterr().err


def test_encoders_in_files_are_known_by_their_absolute_path(stages, tmp_path, monkeypatch):
    """Workers have other working directories, and so may whoever searches later."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dino").mkdir()
    fake = stages()
    assert main(["featurize", "less", "--featurize.images", "transformers:dino"]) == 0
    ((_, config),) = fake.calls
    assert config.featurize.images == (f"transformers:{tmp_path}/dino",)


# submit


@pytest.fixture
def submitted(monkeypatch):
    from pipeline import jobs

    sent = []
    monkeypatch.setattr(jobs, "submit", lambda *args, **kwargs: sent.append((args, kwargs)) or 1)
    return sent


@pytest.mark.parametrize("command", ["run", "featurize", "train"])
def test_submit_resolves_settings_here(submitted, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text("recipe: infonce\ntrain: {lr: 0.5}\n")
    argv = ["submit", "--no-wait", command, "my.yaml", "--dataset", "coco", "--root", "d", "--address", "http://h:1"]
    assert main([*argv, "--python", "python3", "--train.epochs", "2", "--name", "mine", "--cache", "s3://b/c"]) == 1
    config = merge(
        RECIPES["infonce"].config,
        {
            "train": {"lr": 0.5, "epochs": 2},
            "data": {"dataset": "coco", "root": str(tmp_path / "d")},
            "cache": "s3://b/c",
            "runs": str(tmp_path / "runs"),
            "name": "mine",
        },
        "",
    )
    assert submitted == [
        (
            ([command, "mine.yaml", "--ray.address", "auto"], "http://h:1"),
            {"files": {"mine.yaml": dump_yaml(config)}, "python": "python3", "wait": False},
        )
    ]


def test_submit_s_defaults(submitted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["submit", "run", "less"])
    ((arguments, options),) = submitted
    assert arguments == (["run", "less.yaml", "--ray.address", "auto"], None)
    assert options["python"] == "python"
    assert options["wait"] is True
    assert "root: ''" in options["files"]["less.yaml"]


def test_a_submitted_run_is_resumed_by_its_absolute_folder(submitted, run_folder, monkeypatch):
    monkeypatch.chdir(run_folder.parent.parent)
    main(["submit", "train", "--resume", "latest"])
    main(["submit", "train", "--resume", "runs/one", "--runs", "runs"])
    for arguments, options in submitted:
        assert arguments[0] == ["train", "--resume", str(run_folder), "--ray.address", "auto"]
        assert options["files"] == {}


def test_a_folder_that_only_the_cluster_has_is_resumed_there(submitted, stages, run_folder):
    """What is sent is a command that its Python understands."""
    argv = ["--train.workers", "2", "--ray.cpus", "3", "--ray.address", "h:1"]
    main(["submit", "train", "--resume", "/shared only/runs/X", *argv, "--address", "http://h:1"])
    main(["submit", "train", "--resume", str(run_folder), "--train.workers", "0"])
    ((there, address), _), (here, _) = submitted
    assert there[:3] == ["train", "--resume", "/shared only/runs/X"]
    assert address == "http://h:1"
    assert dict(zip(there[3::2], there[4::2], strict=True)) == {
        "--train.workers": "2",
        "--ray.cpus": "3",
        "--ray.address": "auto",
    }
    fake = stages()
    assert main(here[0]) == 0
    assert fake.calls == [("resume", run_folder, {"train.workers": "0", "ray.address": "auto"})]


def test_a_process_may_open_a_file_for_each_shard(tmp_path):
    code = f"""
import resource
from pipeline.__main__ import main
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
main(["cache", "ls", {str(tmp_path)!r}])
soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
print(soft, 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    soft, wanted = done.stdout.splitlines()[-1].split()
    assert soft == wanted


def test_a_pipe_that_breaks_elsewhere_is_no_reader_that_left(monkeypatch):
    def broken(_):
        raise BrokenPipeError("of a worker")

    monkeypatch.setattr("pipeline.__main__._train", broken)
    with pytest.raises(BrokenPipeError, match="of a worker"):
        main(["train", "less"])
