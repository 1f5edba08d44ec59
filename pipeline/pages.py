"""The pages of a run: what it learned, and what a search found."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evaluate.embed import EmbeddedSplit
from evaluate.metrics import Report
from evaluate.report import Answer, Curve, run_page, search_page
from evaluate.report import Hit as Shown
from evaluate.search import Hit
from featurize.datasets.sample import Sample
from featurize.index import Dataset
from pipeline.config import RunConfig, to_dict
from pipeline.tracking import metrics_of
from train.batches import FeatureReader
from train.embeddings import Embeddings
from train.hosts import Embedder
from train.losses.distances import squared_distances

RUN_PAGE = "report.html"
"""In a run's folder: written last, so that a run which has it is finished."""
EXAMPLES = 5
SHOWN = 5


def write_search_page(path: Path, run: str, answers: Sequence[tuple[str | Path, list[Hit]]]) -> None:
    """A page with the pictures that were found for each query, a text or a picture's file."""
    search_page(
        path,
        f"Search in {run}",
        [
            Answer(
                query.read_bytes() if isinstance(query, Path) else query,
                [
                    Shown(
                        hit.rank,
                        hit.sample.image_id,
                        hit.distance,
                        hit.sample.captions[:1],
                        _bytes(hit.sample),
                    )
                    for hit in hits
                ],
                str(query),
            )
            for query, hits in answers
        ],
    )


def write_run_page(
    folder: Path,
    config: RunConfig,
    reports: Mapping[str, Report],
    model: Embedder,
    reader: FeatureReader,
    embedded: EmbeddedSplit,
) -> Path:
    """The page of a run: metrics, curves, retrievals in both directions on the evaluate split, settings.

    Args:
        folder: of the run.
        config: its settings.
        reports: what was measured, by name, the trained model first.
        model: the trained model.
        reader: of its cache.
        embedded: the evaluate split.
    """
    path = folder / RUN_PAGE
    split = config.data.evaluate
    images, captions, owner = embedded

    def nearest_images(caption: int) -> list[tuple[int, float]]:
        return _nearest(_distances(model, images, captions[caption : caption + 1])[:, 0])

    def nearest_captions(image: int) -> list[tuple[int, float]]:
        return _nearest(_distances(model, images[image : image + 1], captions)[0])

    image_rows, caption_rows = reader.split(split)
    chosen = np.linspace(0, len(image_rows) - 1, min(EXAMPLES, len(image_rows))).astype(int)
    first_captions = [int((owner == image).nonzero()[0]) for image in chosen]
    texts = reader.dataset.captions
    run_page(
        path,
        folder.name,
        note=f"{config.method} on {config.data.dataset}, {len(image_rows)} images of split {split}",
        reports=reports,
        curves=_curves(metrics_of(folder)),
        text_to_image=[
            Answer(
                texts[caption_rows[caption]],
                [
                    _shown_image(reader.dataset, int(image_rows[row]), rank, d, right=row == int(owner[caption]))
                    for rank, (row, d) in enumerate(nearest_images(caption), 1)
                ],
            )
            for caption in first_captions
        ],
        image_to_text=[
            Answer(
                _asked(reader.dataset.samples[image_rows[image]]),
                [
                    Shown(rank, str(row), d, (texts[caption_rows[row]],), right=int(owner[row]) == image)
                    for rank, (row, d) in enumerate(nearest_captions(int(image)), 1)
                ],
                reader.dataset.samples[image_rows[image]].image_id,
            )
            for image in chosen
        ],
        settings=to_dict(config),
    )
    return path


def _distances(model: Embedder, images: Embeddings, captions: Embeddings) -> Tensor:
    """L2 distances (N, M) as they are measured."""
    with torch.inference_mode():
        if model.indexable:
            squared = squared_distances(model.index_vectors(images), model.index_vectors(captions))
        else:
            squared = model.distances(images, captions)
        return squared.sqrt()


def _nearest(distances: Tensor) -> list[tuple[int, float]]:
    found = distances.topk(min(SHOWN, len(distances)), largest=False)
    return [(int(row), float(d)) for row, d in zip(found.indices, found.values, strict=True)]


def _shown_image(dataset: Dataset, row: int, rank: int, distance: float, *, right: bool) -> Shown:
    sample = dataset.samples[row]
    return Shown(rank, sample.image_id, distance, sample.captions[:1], _bytes(sample), right)


def _asked(sample: Sample) -> bytes | str:
    """The picture of a query, or words in its place."""
    return _bytes(sample) or f"{sample.image_id} (its picture is not at hand)"


def _bytes(sample: Sample) -> bytes | None:
    """The picture, if its file is still where it was."""
    try:
        return sample.read()
    except OSError:
        return None


def _curves(lines: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """What changed over training, from what the run logged."""

    def curve(name: str, title: str, best: str) -> list[Curve]:
        points = {line["step"]: line["metrics"][name] for line in lines if name in line["metrics"]}
        steps = sorted(points)
        made = Curve(
            title,
            "step",
            steps,
            [points[step] for step in steps],
            "highest" if best == "highest" else "lowest",
        )
        return [made] if len(steps) > 1 else []

    return [
        *curve("val/rsum", "val rSum", "highest"),
        *curve("train/loss", "loss", "lowest"),
        *curve("train/margin", "margin", "highest"),
        *curve("train/gap", "gap between negatives and positives", "highest"),
    ]
