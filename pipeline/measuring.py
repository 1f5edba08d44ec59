"""How a run is measured: plain and corrected for hubness, with intervals, and against other runs."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from evaluate.config import HubnessConfig
from evaluate.embed import embed_caption_rows, embed_image_rows, embed_split
from evaluate.hubness import HubnessCorrection
from evaluate.intervals import Clusters, bootstrap, paired_bootstrap
from evaluate.metrics import Report
from evaluate.protocols import evaluate_host
from evaluate.ranks import EvaluationError
from featurize.shards import publish
from train.batches import FeatureReader, Inputs
from train.hosts import Host

HITS_FILE = "hits.npz"


@dataclasses.dataclass
class Validation:
    """Measures a model on a split; travels to workers and opens the cache there, once.

    Attributes:
        inputs: the columns.
        split: to measure on.
        protocol: "full" or "coco".
        tile: rows scored at once.
    """

    inputs: Inputs
    split: str
    protocol: str
    tile: int

    @cached_property
    def reader(self) -> FeatureReader:
        """The cache, opened in this process."""
        return FeatureReader(self.inputs)

    def report(self, model: Host, correction: HubnessCorrection | None = None) -> Report:
        """The full report; corrected for hubness, if a correction is given."""
        return evaluate_host(
            model,
            *embed_split(model, self.reader, self.split),
            split=self.split,
            protocol=self.protocol,
            tile=self.tile,
            correction=correction,
        )

    def __call__(self, model: Host) -> Mapping[str, float]:
        """The report as flat numbers, for the training loop."""
        return self.report(model).as_flat()

    def __getstate__(self) -> dict[str, object]:
        """Leave the opened cache behind."""
        return {key: value for key, value in self.__dict__.items() if key != "reader"}


def fit_correction(
    model: Host, reader: FeatureReader, split: str, config: HubnessConfig, seed: int
) -> HubnessCorrection | None:
    """The hubness correction of a model from queries of the training split; None if none is wanted or possible."""
    if not config.queries or not model.indexable:
        return None
    rng = np.random.default_rng([seed, 5])
    images, captions = (np.sort(rng.permutation(rows)[: config.queries]) for rows in reader.split(split))
    with torch.inference_mode():
        banks = (
            model.index_vectors(embed_image_rows(model, reader, images)),
            model.index_vectors(embed_caption_rows(model, reader, captions)),
        )
    return HubnessCorrection(*banks, config.strength, config.sharpness)


def keep(folder: Path, name: str, report: Report, caption_image: torch.Tensor | None = None) -> None:
    """Write `metrics<name>.json`, and with caption owners which queries found their items, for `compare`."""
    publish(folder / f"metrics{name}.json", json.dumps(report.as_dict(), indent=1).encode())
    if caption_image is not None:
        to_text, to_image = report.ranks
        clusters = Clusters.of(to_text, to_image, caption_image)
        np.savez(folder / HITS_FILE, found=clusters.found.numpy(), captions=clusters.captions.numpy())


def read_hits(run: Path) -> Clusters:
    """What a finished run found.

    Raises:
        EvaluationError: the run is not finished.
    """
    try:
        with np.load(run / HITS_FILE) as held:
            return Clusters(torch.from_numpy(held["found"]), torch.from_numpy(held["captions"]))
    except (OSError, KeyError, ValueError) as error:
        raise EvaluationError(f"{run}: no {HITS_FILE} of a finished run ({error}); train it to its end") from error


def comparison(runs: Sequence[Path]) -> str:
    """A table of runs measured on one split: recalls, 95 % intervals, and the difference of rSum from the first run.

    Raises:
        EvaluationError: a run is not finished, or the runs were measured on different images and captions.
    """
    measured = [read_hits(run) for run in runs]
    whole = [clusters.metrics(torch.ones(1, len(clusters.captions), dtype=torch.float64))[0] for clusters in measured]
    width = max(len(run.name) for run in runs)
    names = ("R@1", "R@5", "R@10")
    lines = [
        f"{'':{width}}  image to text         text to image         rSum",
        f"{'run':{width}}  " + "".join(f"{name:>6}" for name in names) + "    " + "".join(f"{n:>6}" for n in names),
    ]
    for run, clusters, values in zip(runs, measured, whole, strict=True):
        interval = bootstrap(clusters)["rsum"]
        numbers = [f"{value:6.1f}" for value in values]
        line = f"{run.name:{width}}  {''.join(numbers[:3])}    {''.join(numbers[3:6])}   {numbers[6]}"
        line += f" ({interval.low:.1f} to {interval.high:.1f})"
        if run is not runs[0]:
            change = paired_bootstrap(measured[0], clusters)["rsum"]
            between = f"{change.interval.low:+.1f} to {change.interval.high:+.1f}"
            line += f"  {change.value:+.1f} ({between}, p {change.p:.3f})"
        lines.append(line)
    return "\n".join(lines)
