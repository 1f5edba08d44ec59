"""Trains and measures every method with several seeds, and writes the tables of docs/results.md.

    python benchmarks/results.py --root DIR [--dataset flickr8k] [--cache DIR] [--runs DIR] [--seeds 3] [--only WORD]
                                 [--jobs 1]

Features must be in the cache (`python -m pipeline featurize METHOD`). A finished run is never trained again and an
interrupted one goes on, so the command may be stopped and typed again. With `--only` all other sections keep the tables
that stand there. Everything is measured on the val part. Seconds are those of one of `--jobs` processes that share the
machine's cores.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch

from evaluate.intervals import Clusters, bootstrap, paired_bootstrap
from featurize.extract import WORKER_ENV
from pipeline.measuring import read_hits
from pipeline.pages import RUN_PAGE

RESULTS = ROOT / "docs" / "results.md"
BEGIN, END = "<!-- tables: benchmarks/results.py -->", "<!-- end of tables -->"
COLUMNS = (
    "",
    "image→text R@1 / 5 / 10",
    "text→image R@1 / 5 / 10",
    "rSum (95 %)",
    "difference (95 %, p)",
    "corrected",
    "in codes",
    "seconds",
    "parameters",
    "bytes",
)


@dataclass(frozen=True)
class Row:
    """One line of a table: a method with changes; the first of a section is what the others are compared with."""

    name: str
    method: str
    changes: dict[str, str] = field(default_factory=dict)
    joined: bool = False
    """Whether the row is the runs of all seeds, joined to one model."""

    def flags(self) -> list[str]:
        """As they are typed; a change is one of training unless it says so."""
        keys = ((key if key.startswith("featurize.") else f"train.{key}", value) for key, value in self.changes.items())
        return [word for key, value in keys for word in (f"--{key}", value)]


def _alone(method: str, first: str, off: dict[str, str], names: dict[str, str], rest: list[Row]) -> list[Row]:
    """The method without its modules, with each of them alone as the recipe sets it, and other rows.

    Args:
        method: the recipe.
        first: what it is without them.
        off: settings that switch the modules off.
        names: what each row with one module is called, by the setting that stays as it is.
        rest: rows that follow.
    """
    without = [
        Row(name, method, {other: value for other, value in off.items() if other != key}) for key, name in names.items()
    ]
    return [Row(first, method, off), *without, *rest]


def _sede(method: str) -> list[Row]:
    names = {
        "objective.erasing.weight": "+ erasing",
        "objective.bank.size": "+ memory bank",
        "objective.infonce.hardness": "+ weighted InfoNCE",
    }
    return _alone(method, "host alone, InfoNCE", dict.fromkeys(names, "0"), names, [Row(f"all: `{method}`", method)])


_PLAIN = {"objective.center.weight": "0", "objective.quantization.weight": "0"}
_FIXED = {**_PLAIN, "objective.hinge.margin.form": "fixed"}
_NO_CODES = {"objective.hinge.margin.form": "fixed", "objective.quantization.weight": "0"}


def _on_parts(aggregator: str) -> dict[str, str]:
    """The hinge alone on pooled vectors beside cells and tokens, which this aggregator pools."""
    read = {"model.image.parts": "efficientnet-lite0.coarse", "model.text.parts": "tokens"}
    return {**_FIXED, **read, "model.image.aggregator": aggregator, "model.text.aggregator": aggregator}


_LOCAL = {
    "model.image.parts": "efficientnet-lite0.coarse",
    "model.text.parts": "minilm.tokens",
    "model.image.aggregator": "none",
    "model.text.aggregator": "none",
    "model.local.dim": "256",
    "model.local.queries": "4",
    "objective.local.weight": "0.5",
}


SECTIONS: dict[str, list[Row]] = {
    "Baselines": [
        *(Row(f"`{name}`", name) for name in ("infonce", "vse0", "vse++", "siglip", "fusemix")),
        Row("`fusemix` without mixing", "fusemix", {"mixup": "0"}),
    ],
    "The best vector": [
        Row("`isthmus`", "isthmus"),
        Row("one head instead of two", "isthmus", {"model.blocks": "1"}),
        Row("without the adaptive margin", "isthmus", {"objective.infonce.margin.form": "fixed"}),
        Row("+ a local space", "isthmus", _LOCAL),
        Row("+ a local space and weighted InfoNCE", "isthmus", {**_LOCAL, "objective.infonce.hardness": "2"}),
        Row("the runs of all seeds joined", "isthmus", joined=True),
    ],
    "LESS": _alone(
        "less",
        "hinge, fixed margin",
        _FIXED,
        {
            "objective.hinge.margin.form": "+ adaptive margin A",
            "objective.center.weight": "+ center loss, images",
            "objective.quantization.weight": "+ product codes",
        },
        [
            Row("+ adaptive margin B", "less", {**_PLAIN, "objective.hinge.margin.form": "B"}),
            Row("+ adaptive margin C", "less", {**_PLAIN, "objective.hinge.margin.form": "C"}),
            Row("+ center loss, caption clusters", "less", {**_NO_CODES, "objective.center.concept": "cluster"}),
            Row("+ center loss, words", "less", {**_NO_CODES, "objective.center.concept": "lexical"}),
            Row("+ center loss without a table", "less", {**_NO_CODES, "objective.center.form": "batch"}),
            Row("all: `less`", "less"),
            Row("all, weights learned", "less", {"objective.weighting": "uncertainty"}),
        ],
    ),
    "LESS on parts, quantization form A": [
        Row("means of cells and of tokens", "less", _on_parts("mean")),
        Row("NetVLAD, a codebook each", "less", _on_parts("netvlad")),
        Row("NetVLAD, one codebook", "less", {**_on_parts("netvlad"), "model.shared_codebook": "true"}),
    ],
    "HIER": [Row("global space alone: `infonce`", "infonce"), Row("global and local: `hier`", "hier")],
    "Storage of the features": [
        Row("float16: `infonce`", "infonce"),
        Row("float32", "infonce", {"featurize.storage": "float32"}),
        Row("int8", "infonce", {"featurize.storage": "int8"}),
    ],
    "SEDE on VSE": _sede("sede-vse"),
    "SEDE on SCAN": _sede("sede-scan"),
    "SEDE on VSRN": _sede("sede-vsrn"),
}


def run_folder(row: Row, seed: int, runs: Path) -> Path:
    """Where a row's run with this seed is; its name tells all of its settings."""
    changes = (f"{key.removeprefix('objective.').removeprefix('model.')}={value}" for key, value in row.changes.items())
    return runs / "_".join([row.method, *changes, f"seed{seed}"])


def folders_of(row: Row, seeds: int, runs: Path) -> list[Path]:
    """The runs that a row is the mean of."""
    if row.joined:
        return [runs / f"{row.method}_joined_{seeds}"]
    return [run_folder(row, seed, runs) for seed in range(seeds)]


def asked(title: str, given: argparse.Namespace) -> bool:
    """Whether a section is to be made."""
    return given.only.lower() in title.lower()


def finished(folder: Path) -> bool:
    """Whether a run came to its end."""
    return (folder / RUN_PAGE).exists()


def train(row: Row, seed: int, folder: Path, given: argparse.Namespace) -> None:
    """Train and measure one run in a process of its own, on its share of the cores."""
    command = [sys.executable, "-m", "pipeline", "train"]
    if (folder / "config.yaml").exists():
        command += ["--resume", str(folder)]
    else:
        places = ["--dataset", given.dataset, "--root", str(given.root.absolute())]
        places += ["--cache", str(given.cache.absolute()), "--runs", str(folder.parent), "--name", folder.name]
        command += [row.method, *places, "--train.workers", "0", "--train.seed", str(seed), *row.flags()]
    print(" ".join(command), flush=True)
    cores = max(1, len(os.sched_getaffinity(0)) // given.jobs)
    environment = {**os.environ, **WORKER_ENV, "OMP_NUM_THREADS": str(cores)}  # as a worker of Ray Train has it
    if given.jobs > 1:  # several progress bars on one line tell nothing
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "output.txt").open("a") as output:
            subprocess.run(command, cwd=ROOT, check=True, env=environment, stdout=output, stderr=subprocess.STDOUT)
    else:
        subprocess.run(command, cwd=ROOT, check=True, env=environment)


def mean_hits(folders: list[Path]) -> Clusters:
    """What the runs of several seeds found, on average."""
    held = [read_hits(folder) for folder in folders]
    return Clusters(torch.stack([clusters.found for clusters in held]).mean(0), held[0].captions)


def bytes_of(folder: Path) -> str:
    """Bytes that one image takes in the index in float32; nothing for a host that compares parts and has none."""
    index = folder / "index" / "index.json"
    return str(4 * int(json.loads(index.read_text())["dimensions"])) if index.exists() else ""


def mean_rsum(folders: list[Path], name: str) -> str:
    """Mean rSum of a further measurement of the runs; nothing if they have none."""
    found = [json.loads(path.read_text())["rsum"] for folder in folders if (path := folder / name).exists()]
    return f"{sum(found) / len(found):.1f}" if found else ""


def line(row: Row, folders: list[Path], first: list[Path]) -> str:
    """A row of a table."""
    clusters = mean_hits(folders)
    values = clusters.metrics(torch.ones(1, len(clusters.captions), dtype=torch.float64))[0].tolist()
    interval = bootstrap(clusters)["rsum"]
    shown = [" / ".join(f"{value:.1f}" for value in part) for part in (values[:3], values[3:6])]
    shown.append(f"**{values[6]:.1f}** ({interval.low:.1f} to {interval.high:.1f})")
    if folders == first:
        shown.append("")
    else:
        change = paired_bootstrap(mean_hits(first), clusters)["rsum"]
        shown.append(
            f"{change.value:+.1f} ({change.interval.low:+.1f} to {change.interval.high:+.1f}, p {change.p:.3f})"
        )
    shown += [mean_rsum(folders, f"metrics-{name}.json") for name in ("corrected", "codes")]
    took = [json.loads((folder / "training.json").read_text()) for folder in folders]
    shown.append(f"{sum(one['seconds'] for one in took) / len(took):.0f}")
    shown.append(f"{took[0]['parameters'] / 1e6:.1f} M")
    shown.append(bytes_of(folders[0]))
    return f"| {row.name} | " + " | ".join(shown) + " |"


def tables(given: argparse.Namespace, standing: str) -> Iterator[str]:
    """The tables of the sections that are asked for, and of the others what stands in the file."""
    earlier = {text.partition("\n")[0]: text.rstrip() for text in standing.split("### ")[1:]}
    for title, rows in SECTIONS.items():
        if asked(title, given):
            folders = [folders_of(row, given.seeds, given.runs.absolute()) for row in rows]
            yield from ["", f"### {title}", "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
            yield from (line(row, own, folders[0]) for row, own in zip(rows, folders, strict=True))
        elif title in earlier:
            yield from ["", f"### {earlier[title]}"]


def main() -> None:
    """Train what is missing, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--dataset", default="flickr8k")
    parser.add_argument("--cache", type=Path, default=Path("cache"))
    parser.add_argument("--runs", type=Path, default=Path("runs/results"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--only", default="", metavar="WORD", help="make only the sections whose title holds this word")
    given = parser.parse_args()
    wanted = [rows for title, rows in SECTIONS.items() if asked(title, given)]
    if not wanted:
        parser.error(f"--only {given.only}: no section's title holds it; there are {', '.join(SECTIONS)}")
    runs = given.runs.absolute()
    every = ((row, seed) for seed in range(given.seeds) for rows in wanted for row in rows if not row.joined)
    missing = {run_folder(*one, runs): one for one in every if not finished(run_folder(*one, runs))}
    with ThreadPoolExecutor(given.jobs) as pool:
        try:
            for done in as_completed([pool.submit(train, *one, folder, given) for folder, one in missing.items()]):
                done.result()
        except BaseException:  # a run that failed, or Ctrl-C: nothing further is begun
            pool.shutdown(cancel_futures=True)
            raise
    for row in (row for rows in wanted for row in rows if row.joined):
        (folder,) = folders_of(row, given.seeds, runs)
        members = [str(run_folder(row, seed, runs)) for seed in range(given.seeds)]
        if not finished(folder):
            subprocess.run(
                [sys.executable, "-m", "pipeline", "join", *members, "--name", folder.name], cwd=ROOT, check=True
            )
    before, _, rest = RESULTS.read_text("utf-8").partition(BEGIN)
    standing, _, after = rest.partition(END)
    RESULTS.write_text("\n".join([before + BEGIN, *tables(given, standing), "", END + after]), "utf-8")


if __name__ == "__main__":
    main()
