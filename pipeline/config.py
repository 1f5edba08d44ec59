"""The settings of a whole run, and the one road by which YAML files and the command line change them.

A run is one frozen `RunConfig`: a small config of each package, and nothing else. `merge` applies changes to
it: nested mappings (YAML) or dotted keys (`--train.lr 1e-3`). Both are checked against the dataclasses, so an
unknown key, a wrong type or a wrong choice is an error that names the key, the place and the nearest name.
"""

import contextlib
import dataclasses
import difflib
import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import yaml

from evaluate.config import EvaluateConfig
from featurize.config import DataConfig, FeaturizeConfig, require
from train.config import TrainConfig

CONFIG_FILE = "config.yaml"
"""The resolved settings inside a run folder; a folder that holds it is a run."""

_PLAIN = r"\w[\w.@+=,-]*"


class ConfigError(ValueError):
    """Settings that cannot be used: what was found, what was expected, and where it stands."""


@dataclass(frozen=True)
class RayConfig:
    """Where Ray runs."""

    address: str = field(
        default="",
        metadata={
            "help": "empty: start Ray on this machine; auto or HOST:PORT: attach to the cluster that this machine is in"
        },
    )
    cpus: int = field(default=0, metadata={"help": "CPU cores of the Ray started here; 0: all"})
    object_store_mb: int = field(
        default=512,
        metadata={"help": "shared memory of the Ray started here, in MiB (Ray wants at least 80)"},
    )

    def __post_init__(self) -> None:
        """Refuses sizes that Ray would refuse later and less clearly."""
        require(self, lambda n: n >= 0, "0 (all) or more", "cpus")
        require(self, lambda n: n >= 80, "80 or more", "object_store_mb")


@dataclass(frozen=True)
class RunConfig:
    """What is run, and where its files go."""

    method: str = field(default="plain", metadata={"help": "the method's name in run names and in MLflow"})
    data: DataConfig = field(default_factory=DataConfig)
    featurize: FeaturizeConfig = field(default_factory=FeaturizeConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    cache: str = field(default="cache", metadata={"help": "folder or URI of the feature cache"})
    runs: str = field(default="runs", metadata={"help": "folder that gets one sub-folder for each run"})
    name: str = field(
        default="", metadata={"help": "name of the run's folder; empty: made from method, data set and time"}
    )

    def __post_init__(self) -> None:
        """Refuses names that cannot be a folder's, and runs where none can be written."""
        for key, text in (("method", self.method), ("name", self.name or "unnamed")):
            if not re.fullmatch(_PLAIN, text) or text == "latest":
                raise ValueError(
                    f"{key}: found {text!r}, expected letters, digits and . _ - @ + = , (it names a folder; "
                    "`latest` is taken)"
                )
        if "://" in self.runs:
            raise ValueError(
                f"runs: found the URI {self.runs}, expected a folder, which driver and workers share: runs are written "
                "on a file system; MLFLOW_TRACKING_URI may name a server that keeps what they hold"
            )


class Key(NamedTuple):
    """One setting as the help shows it: dotted name, type in words, value in words, help, section's title."""

    name: str
    type: str
    value: str
    help: str
    section: str


def keys(config: RunConfig) -> list[Key]:
    """Every setting of a config, in the order of the dataclasses; a section's own before those below it."""
    return list(_keys(config, ""))


def _keys(section: Any, prefix: str) -> Iterator[Key]:
    hints = get_type_hints(type(section))
    summary = (type(section).__doc__ or "").partition("\n")[0].removesuffix(".")
    below = []
    for item in dataclasses.fields(section):
        name, value = prefix + item.name, getattr(section, item.name)
        if dataclasses.is_dataclass(value):
            below.append((value, f"{name}."))
        else:
            title = f"{prefix.rstrip('.') or 'run'}: {summary}"
            yield Key(name, _type_text(hints[item.name]), _value_text(value), item.metadata["help"], title)
    for deeper, name in below:
        yield from _keys(deeper, name)


def _type_text(hint: Any) -> str:
    """A type in words: `number`, `hardest|all`, `text,text,...`."""
    if get_origin(hint) is Literal:
        return "|".join(get_args(hint))
    if get_origin(hint) is tuple:
        one = _type_text(get_args(hint)[0])
        return f"{one},..." if "|" in one else f"{one},{one},..."
    return {str: "text", int: "integer", float: "number", bool: "true|false"}[hint]


def _value_text(value: Any) -> str:
    """A value as it would be typed on the command line."""
    if isinstance(value, tuple):
        return ",".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def merge(config: RunConfig, changes: Mapping[str, Any], where: str) -> RunConfig:
    """A config with some settings changed.

    Values are converted to the field's type: "1e-3" to a number, "a,b" to a tuple, "true" to a bool.

    Args:
        config: what the changes apply to.
        changes: nested mappings or dotted keys: {"train": {"lr": 1e-3}} or {"train.lr": "1e-3"}. Of two
            values for one setting the later one counts.
        where: where the changes come from, for errors; a mapping from `load_yaml` adds its line.

    Raises:
        ConfigError: unknown key, wrong type, wrong choice, a value in a section's place, or values that a
            config refuses together.
    """
    merged = _apply(config, list(_leaves(changes, where, ())), (), [key.name for key in keys(config)])
    assert isinstance(merged, RunConfig)
    return merged


class _Leaf(NamedTuple):
    """One changed setting."""

    path: tuple[str, ...]
    value: Any
    where: str


def _leaves(changes: Mapping[str, Any], where: str, prefix: tuple[str, ...]) -> Iterator[_Leaf]:
    """The changes one by one; a dotted key is the same as nested ones."""
    for key, value in changes.items():
        at = f"{where}:{changes.lines[key]}" if isinstance(changes, _Lines) else where
        path = (*prefix, *key.split("."))
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, where, path)
        else:
            yield _Leaf(path, value, at)


def _apply(section: Any, leaves: list[_Leaf], prefix: tuple[str, ...], names: list[str]) -> Any:
    """The section at `prefix` with the leaves below it set."""
    grouped: dict[str, list[_Leaf]] = {}
    for leaf in leaves:
        grouped.setdefault(leaf.path[len(prefix)], []).append(leaf)
    hints = get_type_hints(type(section))
    changed = {}
    for name, group in grouped.items():
        path = (*prefix, name)
        deeper = [leaf for leaf in group if len(leaf.path) > len(path)]
        if name in hints and dataclasses.is_dataclass(getattr(section, name)):
            for leaf in group:
                if leaf not in deeper and leaf.value not in (None, {}):
                    below = ", ".join([key for key in names if key.startswith(".".join(path) + ".")][:3])
                    raise ConfigError(
                        f"{leaf.where}: {'.'.join(path)}: found {leaf.value!r}, expected keys below it ({below}, ...)"
                    )
            changed[name] = _apply(getattr(section, name), deeper, path, names)
        elif name not in hints or deeper:
            leaf = (deeper or group)[0]
            key = ".".join(leaf.path)
            advice = did_you_mean(key, names) or "`python -m pipeline run --help` lists all keys"
            raise ConfigError(f"{leaf.where}: unknown key {key}; {advice}")
        else:
            changed[name] = _convert(hints[name], group[-1])
    try:
        return dataclasses.replace(section, **changed)
    except ValueError as error:
        raise ConfigError(f"{leaves[-1].where}: {'.'.join((*prefix, str(error)))}") from None


def _convert(hint: Any, leaf: _Leaf) -> Any:
    """The value as the field's type."""
    from pydantic import ValidationError

    value = leaf.value
    if get_origin(hint) is tuple and isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    if not isinstance(value, bool) or hint is bool:  # pydantic would take a number's `true` for 1
        with contextlib.suppress(ValidationError):
            return _adapter(hint).validate_python(value)
    raise ConfigError(f"{leaf.where}: {'.'.join(leaf.path)}: found {leaf.value!r}, expected {_type_text(hint)}")


@functools.cache
def _adapter(hint: Any) -> Any:
    from pydantic import ConfigDict, TypeAdapter

    return TypeAdapter(hint, config=ConfigDict(allow_inf_nan=False, coerce_numbers_to_str=True))


def did_you_mean(key: str, names: Iterable[str], dashes: str = "") -> str:
    """Advice for an unknown key: the nearest dotted names, wherever in the tree; "" if none is near."""
    names = list(names)
    last = key.rpartition(".")[2]
    ends = {name: name.rpartition(".")[2] for name in names}
    alike = difflib.get_close_matches(last, set(ends.values()), n=2, cutoff=0.75)
    near = [
        *(name for name in names if name.endswith("." + key)),
        *difflib.get_close_matches(key, names, n=1, cutoff=0.75),
        *(name for name in names if ends[name] == last),
        *(name for name in names if ends[name] in alike),
    ]
    first = [dashes + name for name in dict.fromkeys(near)][:3]
    return f"did you mean {' or '.join(first)}?" if first else ""


class _Lines(dict[str, Any]):
    """A mapping of a YAML file that knows its keys' lines."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: dict[str, int] = {}


class _Loader(yaml.SafeLoader):
    """Safe YAML with the lines of keys, in which a key given twice is an error and not a silent loss."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> Iterator[_Lines]:
    found = _Lines()
    yield found  # PyYAML's way: the object first, its contents once anchors are known
    for key_node, value_node in node.value:
        key, line = loader.construct_object(key_node, deep=True), key_node.start_mark.line + 1
        where = f"{key_node.start_mark.name}:{line}: found the key {key!r}"
        if not isinstance(key, str):
            raise ConfigError(f"{where}, expected text (YAML reads a bare yes, no, on or off as true or false)")
        if key in found.lines:
            raise ConfigError(f"{where} that already stands in line {found.lines[key]}, expected it once")
        found.lines[key] = line
        found[key] = loader.construct_object(value_node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The changes that a YAML file holds, for `merge`; an empty file holds none.

    Raises:
        ConfigError: the file is missing, no YAML, or not a mapping.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8") as file:
            found = yaml.load(file, Loader=_Loader)  # noqa: S506 - _Loader is a SafeLoader
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: expected a YAML file; {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"this is not YAML: {error}") from None
    if found is None:
        return {}
    if not isinstance(found, _Lines):
        raise ConfigError(f"{path}: found {type(found).__name__}, expected `key: value` lines")
    return found


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The config as nested dicts of plain values; tuples become lists."""

    def plain(items: list[tuple[str, Any]]) -> dict[str, Any]:
        return {key: list(value) if isinstance(value, tuple) else value for key, value in items}

    return dataclasses.asdict(config, dict_factory=plain)


def dump_yaml(config: RunConfig) -> str:
    """The whole config as YAML; `merge(RunConfig(), load_yaml(...), ...)` gives it back."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def absolute_encoders(config: RunConfig) -> RunConfig:
    """The config with encoders' files and folders by absolute paths, which mean the same on workers and later."""

    def behind(mark: str, reference: str) -> str:
        kind, _, rest = reference.partition(mark)
        return f"{kind}{mark}{Path(rest).absolute()}" if rest and Path(rest).exists() else reference

    def encoder(reference: str) -> str:
        if reference.startswith("regions:"):
            detector, *pieces = reference.split("+")
            return "+".join([behind("@", detector), *map(encoder, pieces)])
        return behind("@" if reference.startswith("torchvision:") else ":", reference)

    images, texts = (tuple(map(encoder, group)) for group in (config.featurize.images, config.featurize.texts))
    return dataclasses.replace(config, featurize=dataclasses.replace(config.featurize, images=images, texts=texts))


def run_name(config: RunConfig, now: datetime) -> str:
    """The name of the run's folder: the given one, or method-dataset-time."""
    dataset = re.sub(r"[^\w.@+=,-]+", "_", config.data.dataset)
    return config.name or f"{config.method}-{dataset}-{now:%Y%m%d-%H%M%S}"


def find_run(run: str, runs: str | Path) -> Path:
    """The folder of a run.

    Args:
        run: a run's folder, its name below `runs`, or `latest`: the one that was started last.
        runs: the folder of runs.

    Raises:
        ConfigError: there is none; names those that there are.
    """
    if run != "latest":
        for folder in (Path(run), Path(runs) / run):
            if (folder / CONFIG_FILE).is_file():
                return folder
    started = sorted(Path(runs).glob(f"*/{CONFIG_FILE}"), key=lambda file: file.stat().st_mtime_ns, reverse=True)
    if run == "latest" and started:
        return started[0].parent
    names = ", ".join(file.parent.name for file in started[:5])
    there = f"the latest runs there are {names}" if names else "there are no runs there"
    raise ConfigError(
        f"found no run {run!r}: expected a folder with a {CONFIG_FILE}, a name below {runs}, or latest; "
        f"{there} (--runs names another folder)"
    )
