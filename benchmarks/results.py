"""Trains and measures every method with several seeds, and writes the tables of docs/results.md.

    python benchmarks/results.py --root DIR [--dataset flickr8k] [--cache DIR] [--runs DIR] [--seeds 3] [--only WORD]

Features must be in the cache (`python -m pipeline featurize`). A finished run is never trained again and an
interrupted one goes on, so the command may be stopped and typed again; rows without all their runs are left out.
Everything is measured on the val part.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch

from evaluate.intervals import Clusters, bootstrap, paired_bootstrap
from pipeline.measuring import read_hits

RESULTS = ROOT / "docs" / "results.md"
BEGIN, END = "<!-- tables: benchmarks/results.py -->", "<!-- end of tables -->"
COLUMNS = (
    "",
    "image→text R@1 / 5 / 10",
    "text→image R@1 / 5 / 10",
    "rSum (95 %)",
    "difference (95 %, p)",
    "corrected",
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

    def flags(self) -> list[str]:
        """As they are typed."""
        return [word for key, value in self.changes.items() for word in (f"--train.{key}", value)]


def _sede(method: str) -> list[Row]:
    """The host alone, each module alone, all together."""
    none = {"objective.erasing.weight": "0", "objective.bank.size": "0", "objective.infonce.hardness": "0"}
    bank = "256" if method == "sede-scan" else "2048"
    return [
        Row("host alone, InfoNCE", method, none),
        Row("+ erasing", method, {**none, "objective.erasing.weight": "0.2"}),
        Row("+ memory bank", method, {**none, "objective.bank.size": bank}),
        Row("+ weighted InfoNCE", method, {**none, "objective.infonce.hardness": "2"}),
        Row(f"all: `{method}`", method),
    ]


_HINGE = {"objective.center.weight": "0", "objective.quantization.weight": "0"}
_GLOBAL = {"objective.local.weight": "0", "model.local.dim": "0"}
SECTIONS: dict[str, list[Row]] = {
    "Baselines": [
        *(Row(f"`{name}`", name) for name in ("infonce", "vse0", "vse++", "siglip", "fusemix")),
        Row("`isthmus`", "isthmus"),
    ],
    "LESS": [
        Row("hinge, fixed margin", "less", {**_HINGE, "objective.hinge.margin.form": "fixed"}),
        Row("adaptive margin A", "less", _HINGE),
        Row("adaptive margin B", "less", {**_HINGE, "objective.hinge.margin.form": "B"}),
        Row("adaptive margin C", "less", {**_HINGE, "objective.hinge.margin.form": "C"}),
        Row("A + center loss, images", "less", {"objective.quantization.weight": "0"}),
        Row(
            "A + center loss, caption clusters",
            "less",
            {"objective.quantization.weight": "0", "objective.center.concept": "cluster"},
        ),
        Row(
            "A + center loss, words",
            "less",
            {"objective.quantization.weight": "0", "objective.center.concept": "lexical"},
        ),
        Row(
            "A + center loss without a table",
            "less",
            {"objective.quantization.weight": "0", "objective.center.form": "batch"},
        ),
        Row("A + product codes", "less", {"objective.center.weight": "0"}),
        Row("all: `less`", "less"),
        Row("all, weights learned", "less", {"objective.weighting": "uncertainty"}),
    ],
    "HIER": [Row("global space alone", "hier", _GLOBAL), Row("global and local: `hier`", "hier")],
    "SEDE on VSE": _sede("sede-vse"),
    "SEDE on SCAN": _sede("sede-scan"),
    "SEDE on VSRN": _sede("sede-vsrn"),
}


def run_folder(row: Row, seed: int, runs: Path) -> Path:
    """Where a row's run with this seed is; its name tells all of its settings."""
    name = "_".join([row.method, *(f"{key.rpartition('.')[2]}-{value}" for key, value in row.changes.items())])
    return runs / f"{re.sub(r'[^A-Za-z0-9_+.-]', '-', name)}_seed{seed}"


def train(row: Row, seed: int, folder: Path, given: argparse.Namespace) -> None:
    """Train and measure one run in a process of its own."""
    command = [sys.executable, "-m", "pipeline", "train"]
    if (folder / "config.yaml").exists():
        command += ["--resume", str(folder)]
    else:
        places = ["--dataset", given.dataset, "--root", str(given.root.absolute())]
        places += ["--cache", str(given.cache.absolute()), "--runs", str(folder.parent), "--name", folder.name]
        command += [row.method, *places, "--train.workers", "0", "--train.seed", str(seed), *row.flags()]
    print(" ".join(command), flush=True)
    subprocess.run(command, cwd=ROOT, check=True)


def mean_hits(folders: list[Path]) -> Clusters:
    """What the runs of several seeds found, on average."""
    held = [read_hits(folder) for folder in folders]
    return Clusters(torch.stack([clusters.found for clusters in held]).mean(0), held[0].captions)


def bytes_of(folder: Path) -> int:
    """Bytes that one image takes in the index; of a host without an index, its parts."""
    index = folder / "index" / "index.json"
    if index.exists():
        return 4 * int(json.loads(index.read_text())["dimensions"])
    model = json.loads((folder / "model" / "model.json").read_text())
    views = max(len(columns) for columns in model["inputs"]["image_parts"])
    return 4 * 9 * views * int(model["model"]["dim"])  # nine cells of each view


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
    corrected = [folder / "metrics-corrected.json" for folder in folders]
    found = [json.loads(path.read_text())["rsum"] for path in corrected if path.exists()]
    shown.append(f"{sum(found) / len(found):.1f}" if found else "")
    took = [json.loads((folder / "training.json").read_text()) for folder in folders]
    shown.append(f"{sum(one['seconds'] for one in took) / len(took):.0f}")
    shown.append(f"{took[0]['parameters'] / 1e6:.1f} M")
    shown.append(f"{bytes_of(folders[0])}")
    return f"| {row.name} | " + " | ".join(shown) + " |"


def tables(given: argparse.Namespace) -> Iterator[str]:
    """The tables of all sections with finished runs."""
    for title, rows in SECTIONS.items():
        done: list[tuple[Row, list[Path]]] = []
        for row in rows:
            folders = [run_folder(row, seed, given.runs.absolute()) for seed in range(given.seeds)]
            if all((folder / "hits.npz").exists() for folder in folders):
                done.append((row, folders))
        if done and done[0][0] is rows[0]:
            yield from ["", f"### {title}", "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
            yield from (line(row, folders, done[0][1]) for row, folders in done)


def main() -> None:
    """Train what is missing, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--dataset", default="flickr8k")
    parser.add_argument("--cache", type=Path, default=Path("cache"))
    parser.add_argument("--runs", type=Path, default=Path("runs/results"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", metavar="WORD", help="train only sections whose title holds this word")
    given = parser.parse_args()
    for title, rows in SECTIONS.items():
        for row in rows if given.only.lower() in title.lower() else []:
            for seed in range(given.seeds):
                folder = run_folder(row, seed, given.runs.absolute())
                if not (folder / "metrics.json").exists():
                    train(row, seed, folder, given)
    before, _, rest = RESULTS.read_text("utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    RESULTS.write_text("\n".join([before + BEGIN, *tables(given), "", END + after]), "utf-8")


if __name__ == "__main__":
    main()
