"""How a run is measured: plain, corrected for hubness and in codes, with intervals, and against other runs."""

import dataclasses
import hashlib
import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch

from evaluate.codes import CODEBOOK_FILE, fit_codebook, open_codebook, rank_codes
from evaluate.config import HubnessConfig
from evaluate.embed import EmbeddedSplit, embed_caption_rows, embed_image_rows, embed_split
from evaluate.hubness import HubnessCorrection
from evaluate.intervals import Clusters, bootstrap, paired_bootstrap
from evaluate.metrics import Report
from evaluate.protocols import Rank, evaluate_host, rank_corrected, rank_vectors
from evaluate.ranks import EvaluationError
from evaluate.search import CORRECTION_FILE
from featurize.places import publish
from train.batches import FeatureReader, Inputs
from train.config import QuantizationConfig
from train.hosts import Embedder
from train.quantize import ProductCodebook

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

    def embed(self, model: Embedder) -> EmbeddedSplit:
        """The split's embeddings, for as many reports as are wanted."""
        return embed_split(model, self.reader, self.split)

    def content(self) -> str:
        """The sha256 of the split's image ids and captions, in order; the same in every cache that holds them."""
        content = hashlib.sha256()
        for row in self.reader.split(self.split)[0]:
            sample = self.reader.dataset.samples[row]
            content.update(json.dumps([sample.image_id, sample.captions]).encode())
        return content.hexdigest()

    def report(self, model: Embedder, embedded: EmbeddedSplit, rank: Rank = rank_vectors) -> Report:
        """The full report of a model from its embeddings, ranked by squared distance or in another way."""
        return evaluate_host(model, *embedded, split=self.split, protocol=self.protocol, tile=self.tile, rank=rank)

    def __call__(self, model: Embedder) -> Mapping[str, float]:
        """The report as flat numbers, for the training loop."""
        return self.report(model, self.embed(model)).as_flat()

    def __getstate__(self) -> dict[str, object]:
        """Leave the opened cache behind."""
        return {key: value for key, value in self.__dict__.items() if key != "reader"}


def fit_correction(
    model: Embedder, reader: FeatureReader, split: str, config: HubnessConfig, seed: int
) -> HubnessCorrection | None:
    """The hubness correction of a model from queries of the training split; None if none is wanted or possible.

    Args:
        model: trained.
        reader: of the columns that it was trained on.
        split: whose images and captions are the queries; the correction tells nothing of this split itself.
        config: how many queries, strength and sharpness.
        seed: of the choice of queries.
    """
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


def fit_codes(model: Embedder, reader: FeatureReader, split: str, config: QuantizationConfig) -> ProductCodebook:
    """The codebook of a model's index vectors of the training split.

    Raises:
        train.config.SettingsError: what `evaluate.codes.check_codes` refuses.
    """
    images, captions, _ = embed_split(model, reader, split)
    return fit_codebook(config, model.index_vectors(images), model.index_vectors(captions))


@dataclasses.dataclass(frozen=True)
class Measured:
    """A trained model measured in another way than by its plain distances.

    Attributes:
        name: of its file and its metrics in MLflow ("codes").
        title: in words ("in codes of 16 bytes").
        report: what was measured.
        note: what is told behind its rSum.
    """

    name: str
    title: str
    report: Report
    note: str = ""

    def __str__(self) -> str:
        return f"{self.title}: rSum {self.report.rsum:.1f}{self.note}"


def measure(
    folder: Path, name: str, validation: Validation, model: Embedder, embedded: EmbeddedSplit, fitted: str
) -> tuple[Report, list[Measured]]:
    """Measure a run's model plainly, and by its hubness correction and its codebook where they are stored.

    The correction is left out on the split that it was fitted on: its queries would be those that are asked.

    Writes `metrics<name>.json`, `metrics<name>-corrected.json` and `metrics<name>-codes.json`.

    Args:
        folder: of the run.
        name: what the files' names have behind `metrics`.
        validation: split and protocol.
        model: the run's.
        embedded: the split.
        fitted: the split that the run learned from.

    Raises:
        EvaluationError: what is stored is damaged or does not fit the model.
    """
    plain = validation.report(model, embedded)
    keep(folder, name, plain)
    others = []
    stored = folder / "model"
    if (stored / CORRECTION_FILE).exists() and validation.split != fitted:
        correction = HubnessCorrection.open(stored / CORRECTION_FILE)
        report = validation.report(model, embedded, partial(rank_corrected, correction=correction))
        others.append(Measured("corrected", "corrected for hubness", report))
    if (stored / CODEBOOK_FILE).exists():
        codebook = open_codebook(stored)
        report = validation.report(model, embedded, partial(rank_codes, codebook=codebook))
        note = f" ({100 * report.rsum / plain.rsum:.1f} % of the float score)" if plain.rsum else ""
        others.append(Measured("codes", f"in codes of {len(codebook.codewords)} bytes", report, note))
    for other in others:
        keep(folder, f"{name}-{other.name}", other.report)
    return plain, others


def keep(folder: Path, name: str, report: Report) -> None:
    """Write `metrics<name>.json`."""
    publish(folder / f"metrics{name}.json", json.dumps(report.as_dict(), indent=1).encode())


def keep_hits(folder: Path, report: Report, caption_image: torch.Tensor, content: str) -> None:
    """Write which queries found their items, for `compare`.

    Args:
        folder: of the run.
        report: with its ranks.
        caption_image: (M,) int64, row of the image that each caption belongs to.
        content: of the split, see `Validation.content`.
    """
    to_text, to_image = report.ranks
    clusters = Clusters.of(to_text, to_image, caption_image)
    held = io.BytesIO()
    np.savez(
        held,
        found=clusters.found.numpy(),
        captions=clusters.captions.numpy(),
        split=np.array(report.split),
        content=np.array(content),
    )
    publish(folder / HITS_FILE, held.getvalue())


def read_hits(run: Path) -> Clusters:
    """What a finished run found.

    Raises:
        EvaluationError: the run is not finished, or the file is damaged.
    """
    return _Hits.read(run).clusters


@dataclasses.dataclass(frozen=True)
class _Hits:
    """What a finished run found, and on what.

    Attributes:
        clusters: what was found.
        split: its name.
        content: of the split; "" in a file of an older version.
    """

    clusters: Clusters
    split: str
    content: str

    @classmethod
    def read(cls, run: Path) -> "_Hits":
        try:
            with np.load(io.BytesIO((run / HITS_FILE).read_bytes())) as held:
                clusters = Clusters(torch.from_numpy(held["found"]), torch.from_numpy(held["captions"]))
                split, content = (str(held[name]) if name in held else "" for name in ("split", "content"))
        except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise EvaluationError(f"{run}: no {HITS_FILE} of a finished run ({error}); train it to its end") from error
        return cls(clusters, split, content)

    def __str__(self) -> str:
        images, captions = len(self.clusters.captions), int(self.clusters.captions.sum())
        return f"{images} images with {captions} captions of the split {self.split!r}"


def _check_same_content(runs: Sequence[Path], measured: Sequence[_Hits]) -> None:
    """Whether all runs were measured on the same images and captions.

    Raises:
        EvaluationError: they were not, or a run does not say on what.
    """
    for run, hits in zip(runs, measured, strict=True):
        if not hits.content:
            raise EvaluationError(
                f"{run} was measured by an older version, which did not keep on what; measure it again: "
                f"`python -m pipeline evaluate {run}`"
            )
        if hits.content != measured[0].content:
            raise EvaluationError(
                f"{run} was measured on other images or captions than {runs[0]}: found {hits} and {measured[0]}, "
                "expected the same ones in the same order; compare runs of the same data and the same --data.evaluate"
            )


def comparison(runs: Sequence[Path]) -> str:
    """A table of runs measured on one split: recalls, 95 % intervals, and the difference of rSum from the first run.

    Raises:
        EvaluationError: a run is not finished, the runs were measured on different images and captions, or an older
            version measured one of several.
    """
    read = [_Hits.read(run) for run in runs]
    if len(runs) > 1:
        _check_same_content(runs, read)
    measured = [hits.clusters for hits in read]
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
