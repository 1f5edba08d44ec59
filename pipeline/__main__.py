"""The command line: `python -m pipeline --help`.

Parses, resolves settings and hands over to `pipeline.stages`. Only light modules are imported at the top, so
that help and mistakes are answered at once. A user's mistake ends in `error: ...` and exit code 2, never in a
traceback; anything unexpected keeps its traceback.
"""

import argparse
import errno
import os
import resource
import select
import shlex
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

from evaluate.config import EvaluateConfig
from pipeline.config import (
    CONFIG_FILE,
    ConfigError,
    RayConfig,
    RunConfig,
    absolute_encoders,
    did_you_mean,
    dump_yaml,
    find_run,
    keys,
    load_yaml,
    merge,
)
from pipeline.recipes import RECIPES, resolve
from train.config import PLACEMENT

PROGRAM = "python -m pipeline"
COMMAND_LINE = "command line"

OVERVIEW = """\
isthmus joins images and text. Frozen networks describe each image and caption once (featurize); light heads
learned on these cached features place both in one space where distance is meaning (train); the result is
measured (evaluate) and searched (search). `run` does all of it, and skips what is already done.

A run is a method (recipe) times a data set. The data set `scenes` is drawn on the spot: no download.
"""

EXAMPLES = f"""\
examples:
  {PROGRAM} run less
      the whole road on the data set `scenes`, on this machine
  {PROGRAM} run less --dataset flickr8k --root data/flickr8k --train.lr 5e-4
      another data set, and one setting changed
  {PROGRAM} search latest "two dogs in the snow" --page found.html
      the images that match a text, by the run that was started last
  {PROGRAM} train --resume latest
      go on with a training that was interrupted
  {PROGRAM} submit run less --dataset coco --root /shared/coco --address http://127.0.0.1:8265
      the same run as a job on a Ray cluster

`{PROGRAM} COMMAND --help` explains a command; that of `run` lists all methods and settings.
"""

EMPTY = "''"
"""An empty value, as it is typed."""

METHOD_HELP = "a method's name (see `run --help`) or a YAML file: changes to one, or a run's config.yaml"
RUN_HELP = "a run's folder, its name below --runs, or latest"
ELSEWHERE = tuple(f"train.{name}" for name in PLACEMENT)
"""Settings that may change when a run is continued, beside those of Ray."""

SUBMIT_HELP = """

Settings are resolved and checked here; they and the sources (not the data) are sent. --root, --cache and
--runs are made absolute and must name storage that every node sees. `train --resume` takes an absolute folder
as the cluster sees it; a name, or latest, is looked up here. Ctrl-C stops following, not the job. The exit
code is 0 if the job succeeded.

Without --address the head is RAY_API_SERVER_ADDRESS, RAY_ADDRESS if that is a URL, or http://127.0.0.1:8265
(`ray dashboard cluster.yaml` forwards it). For a head that asks for a token, set RAY_AUTH_MODE=token here too
and put the token into RAY_AUTH_TOKEN or ~/.ray/auth_token.
MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME are passed on; passwords and tokens are not.
"""

CACHE_HELP = """

A data set that changes becomes another version beside the first; what both share is neither described nor stored
twice, and a run keeps to the version that it began with."""

EXPORT_FORMATS = ("h5", "npy", "parquet", "webdataset")

USER_ERRORS = {
    "evaluate.index": "IndexFileError",
    "evaluate.ranks": "EvaluationError",
    "featurize.manifest": "CacheError",
    "featurize.datasets.sample": "DataError",
    "featurize.encoder": "EncoderError",
    "featurize.images.decode": "DecodeError",
    "featurize.images.decoder": "DecoderError",
    "featurize.shards": "ShardError",
    "pipeline.config": "ConfigError",
    "pipeline.jobs": "JobError",
    "pipeline.tracking": "TrackingError",
    "train.config": "SettingsError",
    "train.loop": "DivergenceError",
    "train.models": "ModelError",
    "train.state": "StateError",
}
"""The errors that are answers to the user, by their modules."""


class _Parser(argparse.ArgumentParser):
    """A parser that answers a mistake in one line, with the nearest option for an unknown one."""

    keeps_unknown = False
    """Whether unknown arguments are left to the caller."""

    def parse_known_args(  # type: ignore[override]  # argparse's overloads serve foreign namespaces
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Also refuses unknown arguments, where the parser that knows the options can still be asked."""
        parsed, rest = super().parse_known_args(args, namespace)
        if rest and not self.keeps_unknown:
            self.refuse(rest[0].partition("=")[0])
        return parsed, rest

    def refuse(self, argument: str) -> NoReturn:
        """Ends with an error about an argument that nobody knows."""
        if not argument.startswith("--"):
            self.error(f"unexpected argument {argument!r}")
        names = [name[2:] for name in self._option_string_actions if name.startswith("--")]
        self.error(f"unknown option {argument}; {did_you_mean(argument[2:], names, '--')}".removesuffix("; "))

    def error(self, message: str) -> NoReturn:
        """Prints the message, and where to read more; exit code 2."""
        print(f"error: {message}\n`{self.prog} --help` explains", file=sys.stderr)
        raise SystemExit(2)


def build_parser() -> _Parser:
    """The parser of all commands."""
    parser = _Parser(
        prog=PROGRAM,
        usage=f"{PROGRAM} COMMAND ...",
        description=OVERVIEW,
        epilog=EXAMPLES,
        formatter_class=_layout,
        allow_abbrev=False,
    )
    parser.keeps_unknown = True
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)

    def add(name: str, usage: str, summary: str, more: str = "") -> _Parser:
        added: _Parser = commands.add_parser(
            name,
            help=summary,
            prog=f"{PROGRAM} {name}",
            usage=f"{PROGRAM} {name} {usage}",
            description=f"{summary[0].upper()}{summary[1:]}.{more}",
            formatter_class=_layout,
            allow_abbrev=False,
        )
        return added

    run = add("run", "METHOD [--key value ...]", "featurize, train, evaluate and report", _methods_text())
    _add_method(run, required=True, list_keys=True)
    run.set_defaults(command=_run)

    featurize = add("featurize", "METHOD [--key value ...]", "extract and cache the features that a method needs")
    _add_method(featurize, required=True)
    featurize.set_defaults(command=_featurize)

    train = add(
        "train",
        "METHOD [--key value ...] | --resume RUN",
        "learn on cached features, extracting nothing; or continue an interrupted run",
    )
    _add_method(train, required=False)
    train.add_argument(
        "--resume",
        metavar="RUN",
        help=f"continue this run: {RUN_HELP}. It keeps its settings; only {_beside_resume()} may stand beside it, to "
        "go on elsewhere (--ray.address '' starts Ray on this machine)",
    )
    train.set_defaults(command=_train)

    evaluate = add("evaluate", "RUN [--split NAME] [--protocol NAME]", "measure a run's model")
    _add_run(evaluate)
    evaluate.add_argument("--split", metavar="NAME", help="another split than the run's own, such as test")
    evaluate.add_argument(
        "--protocol",
        choices=get_args(get_type_hints(EvaluateConfig)["protocol"]),
        help="another protocol than the run's own: auto, full, coco",
    )
    evaluate.set_defaults(command=_evaluate)

    search = add("search", "RUN QUERY... [--k 5] [--page FILE.html]", "find images by text or by a picture")
    _add_run(search)
    search.add_argument("queries", nargs="+", metavar="QUERY", help="a text, or the file of a picture")
    search.add_argument("--k", type=_count, default=5, metavar="N", help="answers for each query; default 5")
    search.add_argument(
        "--page", type=Path, metavar="FILE", help="also write the answers as one HTML page with pictures"
    )
    search.add_argument(
        "--corrected", action="store_true", help="set images back that are near to everything (hubness correction)"
    )
    search.set_defaults(command=_search)

    compare = add("compare", "RUN RUN...", "measured runs side by side, with intervals and paired differences")
    compare.add_argument("run", nargs="+", metavar="RUN", help=f"the first is compared with: {RUN_HELP}")
    compare.add_argument(
        "--runs", default=RunConfig.runs, metavar="DIR", help="the folder of runs; default %(default)s"
    )
    compare.set_defaults(command=_compare)

    join = add("join", "RUN RUN... [--name NAME]", "several trained runs as one model with one index")
    join.add_argument("run", nargs="+", metavar="RUN", help=RUN_HELP)
    join.add_argument("--name", default="", metavar="NAME", help="of the new run; made of data set and time without")
    join.add_argument("--runs", default=RunConfig.runs, metavar="DIR", help="the folder of runs; default %(default)s")
    join.set_defaults(command=_join)

    _add_cache(add("cache", "ls|verify|explain|repair|export|gc ...", "look after the feature cache", CACHE_HELP))

    submit = add(
        "submit",
        "run|featurize|train ... [--address URL]",
        "send run, featurize or train as a job to a Ray cluster",
        SUBMIT_HELP,
    )
    submit.keeps_unknown = True
    submit.add_argument("--address", metavar="URL", help="the head's dashboard; see above")
    submit.add_argument("--python", default="python", help="the cluster's Python; default %(default)s")
    submit.add_argument("--no-wait", action="store_true", help="do not follow the job's log")
    submit.set_defaults(command=_submit)
    return parser


def _add_cache(cache: _Parser) -> None:
    """The `cache` commands."""
    actions = cache.add_subparsers(title="actions", metavar="ACTION", required=True, parser_class=_Parser)

    def add(name: str, summary: str, *, whole: bool = True) -> _Parser:
        prog = f"{PROGRAM} cache {name}"
        text = f"{summary[0].upper()}{summary[1:]}."
        added: _Parser = actions.add_parser(
            name, help=summary, prog=prog, description=text, formatter_class=_layout, allow_abbrev=False
        )
        if whole:
            added.add_argument(
                "cache", nargs="?", default=RunConfig.cache, metavar="CACHE", help="the cache; default %(default)s"
            )
        return added

    ls = add("ls", "list data sets and columns: rows, shape, bytes, and the run that read them last")
    ls.set_defaults(command=_cache_ls)
    verify = add("verify", "read everything and compare it with the manifests; exit code 1 if anything is wrong")
    verify.add_argument(
        "--reextract",
        type=_count,
        default=0,
        metavar="K",
        help="also describe K images of each column, or their captions, again and say how far the result is",
    )
    verify.set_defaults(command=_cache_verify)
    explain = add("explain", "say in what two columns, or two data sets, differ", whole=False)
    explain.add_argument("one", metavar="A", help="folder of a column or of a data set in a cache")
    explain.add_argument("other", metavar="B", help="folder of another one")
    explain.set_defaults(command=_cache_explain)
    repair = add(
        "repair",
        "verify, make broken shards again and go on with unfinished columns; exit code 1 if anything is left",
    )
    repair.add_argument("--address", default="", help="of a running Ray cluster; without it Ray is started here")
    repair.set_defaults(command=_cache_repair)
    gc = add("gc", "list what no run reads; with --delete free it")
    gc.add_argument("--days", type=_days, default=7, metavar="N", help="spare what is younger; default %(default)s")
    gc.add_argument("--delete", action="store_true", help="free what is listed")
    gc.set_defaults(command=_cache_gc)
    export = add("export", "write columns as files for others; import:FILE reads them back", whole=False)
    export.add_argument("columns", nargs="+", metavar="COLUMN_FOLDER", help="of a finished column; several are joined")
    export.add_argument("out", metavar="OUT", help="the file or folder to write; nothing is written over")
    export.add_argument("--format", choices=EXPORT_FORMATS, default="h5", help="default %(default)s")
    export.set_defaults(command=_cache_export)


def _layout(prog: str) -> argparse.RawDescriptionHelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=110)


def _methods_text() -> str:
    """The methods with their descriptions, and what each changes in the defaults."""
    lines = ["", "", "methods:"]
    for name, recipe in RECIPES.items():
        plain = {key.name: key.value for key in keys(RunConfig())}
        changed = [key for key in keys(recipe.config) if key.name != "method" and key.value != plain[key.name]]
        text = f"{recipe.description} Changes: {', '.join(f'{key.name} {key.value or EMPTY}' for key in changed)}."
        lines += [
            f"  {name}",
            *textwrap.wrap(text, 104, initial_indent="      ", subsequent_indent="      ", break_on_hyphens=False),
        ]
    return "\n".join(lines)


def _add_method(parser: _Parser, *, required: bool, list_keys: bool = False) -> None:
    """METHOD, --config and every setting; one command's help shows all of them, the others' what everybody needs."""
    parser.add_argument("recipe", nargs=None if required else "?", metavar="METHOD", help=METHOD_HELP)
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="FILE",
        help="a YAML file with changes to the method; may be repeated, and --key value comes after it",
    )
    if not list_keys:
        parser.epilog = f"Every other setting is `--key value` too; `{PROGRAM} run --help` lists them all."
    short = {
        "data.dataset": "--dataset",
        "data.root": "--root",
        "featurize.max_quarantined": "--max-quarantined",
    }
    groups: dict[str, Any] = {}
    for key in keys(RunConfig()):
        if key.section not in groups:
            groups[key.section] = parser.add_argument_group(key.section)
        text = f"{key.help}; default {key.value or 'empty'}".replace("%", "%%")
        shown = list_keys or key.name in short or "." not in key.name
        groups[key.section].add_argument(
            *filter(None, (short.get(key.name), f"--{key.name}")),
            dest=key.name,
            default=argparse.SUPPRESS,
            metavar=key.type,
            help=text if shown else argparse.SUPPRESS,
        )
    parser.add_argument(
        "--retry-quarantined",
        dest="featurize.retry_quarantined",
        default=argparse.SUPPRESS,
        action="store_const",
        const="true",
        help="describe images again that could not be described before; the same as --featurize.retry_quarantined true",
    )


def _add_run(parser: _Parser) -> None:
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    parser.add_argument("--runs", default=RunConfig.runs, metavar="DIR", help="the folder of runs; default %(default)s")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number of 1 or more")
    return int(text)


def _days(text: str) -> float:
    try:
        days = float(text)
    except ValueError:
        days = -1.0
    if not days >= 0:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number of 0 or more")
    return days


def _settings(args: argparse.Namespace) -> RunConfig:
    """The method's settings, changed by --config files in their order, then by --key value."""
    if args.recipe is None:
        raise ConfigError("train: found neither METHOD nor --resume RUN, expected one of them")
    config = resolve(args.recipe)
    for file in args.config:
        config = merge(config, load_yaml(file), file)
    return absolute_encoders(merge(config, _changes(args), COMMAND_LINE))


def _changes(args: argparse.Namespace) -> dict[str, str]:
    names = {key.name for key in keys(RunConfig())}
    return {name: value for name, value in vars(args).items() if name in names}


@contextmanager
def _interruptible(config: RunConfig) -> Iterator[None]:
    """Lets Ctrl-C say how to go on: with the run that has just been started, or with the same command."""
    before = set(Path(config.runs).glob(f"*/{CONFIG_FILE}"))
    try:
        yield
    except KeyboardInterrupt:
        started = set(Path(config.runs).glob(f"*/{CONFIG_FILE}")) - before
        if not started:
            raise KeyboardInterrupt("the same command goes on: finished shards are kept") from None
        run = shlex.quote(str(started.pop().parent))
        raise KeyboardInterrupt(f"to go on: {PROGRAM} train --resume {run}") from None


def _run(args: argparse.Namespace) -> int:
    config = _settings(args)
    from pipeline import stages

    with _interruptible(config):
        stages.run(config)
    return 0


def _featurize(args: argparse.Namespace) -> int:
    config = _settings(args)
    from pipeline import stages

    with _interruptible(config):
        stages.featurize(config)
    return 0


def _train(args: argparse.Namespace) -> int:
    if args.resume is not None:
        changes = _elsewhere(args)
        run = _resumed(args)
        from pipeline import stages

        stages.resume(run, changes)
        return 0
    config = _settings(args)
    from pipeline import stages

    with _interruptible(config):
        stages.train(config)
    return 0


def _beside_resume() -> str:
    """The options that may stand beside --resume, in words."""
    *names, last = ("--runs", "--ray.*", *(f"--{name}" for name in ELSEWHERE))
    return f"{', '.join(names)} and {last}"


def _elsewhere(args: argparse.Namespace) -> dict[str, str]:
    """What changes in the settings of a run to be continued: where it goes on.

    Raises:
        ConfigError: something else would change, or a value has a wrong type.
    """
    changes = _changes(args)
    changes.pop("runs", None)
    kept = [name for name in changes if name not in ELSEWHERE and not name.startswith("ray.")]
    others = [*filter(None, [args.recipe]), *args.config, *(f"--{name}" for name in kept)]
    if others:
        raise ConfigError(
            f"--resume continues a run with its own settings: found {', '.join(others)}, expected --resume RUN alone "
            f"or with {_beside_resume()}; for other settings start a new run"
        )
    merge(RunConfig(), changes, COMMAND_LINE)
    return changes


def _resumed(args: argparse.Namespace) -> Path:
    """The run to be continued."""
    return find_run(args.resume, _changes(args).get("runs", RunConfig.runs))


def _evaluate(args: argparse.Namespace) -> int:
    run = find_run(args.run, args.runs)
    from pipeline import stages

    stages.evaluate(run, args.split, args.protocol)
    return 0


def _search(args: argparse.Namespace) -> int:
    run = find_run(args.run, args.runs)
    from pipeline import stages

    stages.search(run, args.queries, args.k, args.page, corrected=args.corrected)
    return 0


def _compare(args: argparse.Namespace) -> int:
    runs = [find_run(run, args.runs) for run in args.run]
    from pipeline import stages

    stages.compare(runs)
    return 0


def _join(args: argparse.Namespace) -> int:
    runs = [find_run(run, args.runs) for run in args.run]
    from pipeline import stages

    stages.join(runs, args.name)
    return 0


def _cache_ls(args: argparse.Namespace) -> int:
    from pipeline import upkeep

    upkeep.ls(args.cache)
    return 0


def _cache_verify(args: argparse.Namespace) -> int:
    from pipeline import upkeep

    return 1 if upkeep.check(args.cache, args.reextract) else 0


def _cache_explain(args: argparse.Namespace) -> int:
    from pipeline import upkeep

    upkeep.explain(args.one, args.other)
    return 0


def _cache_repair(args: argparse.Namespace) -> int:
    from pipeline import upkeep

    return 1 if upkeep.repair(args.cache, RayConfig(address=args.address)) else 0


def _cache_export(args: argparse.Namespace) -> int:
    from pipeline import upkeep

    upkeep.export(args.columns, args.out, args.format)
    return 0


def _cache_gc(args: argparse.Namespace) -> int:
    from pipeline import upkeep

    upkeep.gc(args.cache, args.days, delete=args.delete)
    return 0


def _submit(args: argparse.Namespace) -> int:
    """Resolves here what is to run there, so that mistakes are answered before anything is sent."""
    task, unknown = build_parser().parse_known_args(args.rest)
    if unknown or task.command not in (_run, _featurize, _train):
        raise ConfigError(
            f"submit: found {shlex.join(args.rest[:2])!r}, expected run, featurize or train with arguments"
        )
    from pipeline import jobs

    if task.command is _train and task.resume is not None:
        changes = {**_elsewhere(task), "ray.address": "auto"}
        # an absolute folder may be one of the cluster's alone
        run = task.resume if Path(task.resume).is_absolute() else str(_resumed(task).absolute())
        argv = ["train", "--resume", run, *(word for name in changes for word in (f"--{name}", changes[name]))]
        files = {}
    else:
        config = jobs.absolute(_settings(task))
        file = f"{config.name or config.method}.yaml"
        argv, files = [args.rest[0], file, "--ray.address", "auto"], {file: dump_yaml(config)}
    return jobs.submit(argv, args.address, files=files, python=args.python, wait=not args.no_wait)


def _user_errors() -> tuple[type[BaseException], ...]:
    """The errors that are answers to the user; a module that was never imported cannot have raised one."""
    return tuple(getattr(sys.modules[module], name) for module, name in USER_ERRORS.items() if module in sys.modules)


def _open_more_files() -> None:
    """Let this process open as many files as it may: a column keeps one open for each of its shards."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


_STDOUT = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: the arguments behind `python -m pipeline`; None: those of this process.

    Returns:
        The exit code: 0, 1 (a failed job, a cache with problems), 2 (a mistake), 130 (Ctrl-C), 141 (nobody reads what
        is printed any more, as behind `| head`).
    """
    _open_more_files()
    try:
        try:
            return _answered(argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), _STDOUT)  # for what is printed while the process ends
        return 141


def _nobody_reads() -> bool:
    """Whether stdout is a pipe whose reader has left."""
    poll = select.poll()
    poll.register(_STDOUT, select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _answered(argv: Sequence[str] | None) -> int:
    """Runs a command; the exit code, with a line on what went wrong."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    args.rest = rest
    if rest and args.command is not _submit:
        parser.refuse(rest[0])
    try:
        return int(args.command(args))
    except KeyboardInterrupt as stop:
        print(f"\nstopped; {str(stop) or 'the same command starts again'}", file=sys.stderr)
        return 130
    except OSError as error:
        from featurize.places import is_full

        what = getattr(error, "cause", error)
        if is_full(error):
            advice = "what is finished stays: free some space (`cache gc` may help) and run the same command again"
            print(f"error: no room on the disk ({what}); {advice}", file=sys.stderr)
        elif isinstance(error, PermissionError) or error.errno == errno.EROFS:
            advice = "name folders, or a store, that this user may read and write: --cache, --runs, ISTHMUS_LOCAL"
            print(f"error: not allowed ({what}); {advice}", file=sys.stderr)
        else:
            raise
        return 2
    except _user_errors() as error:
        # Ray hands on a task's error as a copy whose text is a traceback; its cause is the error itself.
        print(f"error: {getattr(error, 'cause', error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
