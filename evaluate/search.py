"""Search with a run: text or a picture in, the nearest images out.

run = Searcher.open("runs/less-scenes-…")
for hit in run.search("two dogs in snow", k=5):
    print(f"{hit.distance:.3f}  {hit.sample.image}")
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from evaluate.embed import embed_image_rows
from evaluate.hubness import HubnessCorrection, augment_gallery, augment_queries
from evaluate.index import Index
from evaluate.ranks import EvaluationError
from featurize.datasets.sample import Sample
from featurize.describe import describe_images, describe_texts, image_encoder, text_encoder
from featurize.encoder import Card
from featurize.images.decode import decode
from featurize.images.views import view
from featurize.imports import is_import
from featurize.manifest import CacheError
from featurize.shards import Array
from train.batches import ColumnRef, FeatureReader, Features
from train.hosts import Embedder
from train.models import open_model


@dataclass(frozen=True)
class Hit:
    """One answer.

    Attributes:
        rank: from 1.
        distance: L2 distance in the joint space.
        sample: the image, with its captions.
    """

    rank: int
    distance: float
    sample: Sample


CORRECTION_FILE = "hubness.safetensors"
"""In a run's `model/`: the hubness correction, where one was fitted."""
_BIAS = "hubness"
"""The column of an index's items with what is taken from each one's score."""


def build_index(
    model: Embedder, reader: FeatureReader, folder: Path, correction: HubnessCorrection | None = None
) -> None:
    """Embed every image of the data set and write the index that searches them.

    Args:
        model: that embeds.
        reader: of the columns that the model was trained on.
        folder: that the index is written to; it is made.
        correction: of the model, if it has one; each image's bias is stored with it.

    Raises:
        train.config.SettingsError: the host has no vectors to index.
        evaluate.ranks.EvaluationError: the correction has other dimensions than the model.
    """
    rows = np.setdiff1d(np.arange(len(reader.dataset.samples)), reader.missing)
    samples = [reader.dataset.samples[row] for row in rows]
    items = pd.DataFrame(
        {
            "item": [sample.image_id for sample in samples],
            "uri": [sample.image for sample in samples],
            "offset": [sample.span[0] if sample.span else -1 for sample in samples],
            "length": [sample.span[1] if sample.span else -1 for sample in samples],
            "split": [sample.split for sample in samples],
            "captions": [list(sample.captions) for sample in samples],
        }
    )
    with torch.inference_mode():
        vectors = model.index_vectors(embed_image_rows(model, reader, rows))
    if correction is not None:
        items[_BIAS] = correction.bias(vectors, "images").numpy()
    Index(vectors.numpy(), items).save(folder)


class Searcher:
    """A trained model, its frozen encoders and an index of images.

    Args:
        run: folder of a finished run.

    Raises:
        train.models.ModelError: the run holds no finished model.
        train.config.SettingsError: its host has no vectors to index.
        evaluate.index.IndexFileError: the run holds no finished index.
    """

    def __init__(self, run: Path) -> None:
        self.model, self.inputs = open_model(run / "model")
        self.model.require_index()
        self.index = Index.open(run / "index")
        self._run = run

    @classmethod
    def open(cls, run: str | Path) -> "Searcher":
        """Open a run by its folder."""
        return cls(Path(run))

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts -> (N, E).

        Raises:
            featurize.manifest.CacheError: the model reads captions' features that were imported.
        """
        _check_describable([*self.inputs.text_vectors, *self.inputs.text_parts, *self.inputs.text_bags], "text")
        answers: dict[str, dict[str, list[Array]]] = {}

        def column(ref: ColumnRef) -> list[Array]:
            if ref.encoder not in answers:
                encoder = text_encoder(ref.encoder, self.inputs.precision)
                _check_weights(ref, encoder.card)
                answers[ref.encoder] = describe_texts(encoder, texts, batch=128)
            return answers[ref.encoder][ref.output]

        vectors = [_stored(np.stack(column(ref)), ref) for ref in self.inputs.text_vectors]
        parts = [_padded([_stored(row, ref) for row in column(ref)]) for ref in self.inputs.text_parts]
        bags = [_padded([torch.from_numpy(row).long() for row in column(ref)]) for ref in self.inputs.text_bags]
        with torch.inference_mode():
            features = Features(
                _joined(vectors, len(texts)),
                tuple(part for part, _ in parts),
                tuple(mask for _, mask in parts),
                tuple(ids for ids, _ in bags),
                tuple(mask for _, mask in bags),
            )
            return self.model.index_vectors(self.model.embed_texts(features))

    def embed_pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Pictures -> (N, E): the mean over the views that the model was trained with.

        Raises:
            featurize.manifest.CacheError: the model reads images' features that were imported.
        """
        groups = self.inputs.image_vectors + self.inputs.image_parts
        _check_describable([ref for views in groups for ref in views], "picture")
        with torch.inference_mode():
            views = [
                self.model.embed_images(self._picture_features(pictures, number)) for number in range(len(groups[0]))
            ]
            return self.model.index_vectors(self.model.mean_of_views(views))

    def _picture_features(self, pictures: Sequence[Image.Image], number: int) -> Features:
        answers: dict[str, dict[str, list[Array]]] = {}

        def column(ref: ColumnRef) -> list[Array]:
            if ref.encoder not in answers:
                encoder = image_encoder(ref.encoder, self.inputs.precision)
                _check_weights(ref, encoder.card)
                prepared = (encoder.prepare(view(picture, ref.view, "query")) for picture in pictures)
                answers[ref.encoder] = describe_images(encoder, prepared, batch=8)
            return answers[ref.encoder][ref.output]

        of_vectors = [views[number] for views in self.inputs.image_vectors]
        of_parts = [views[number] for views in self.inputs.image_parts]
        vectors = [_stored(np.stack(column(ref)), ref) for ref in of_vectors]
        parts = [_padded([_stored(row, ref) for row in column(ref)]) for ref in of_parts]
        return Features(
            _joined(vectors, len(pictures)), tuple(part for part, _ in parts), tuple(mask for _, mask in parts)
        )

    @cached_property
    def corrected_index(self) -> Index:
        """The index with every image set back by its hubness, in memory; made when it is first asked for.

        Raises:
            evaluate.ranks.EvaluationError: the run has no hubness correction.
        """
        if _BIAS not in self.index.items:
            raise EvaluationError(
                f"{self._run / 'index'}: no hubness correction is stored with its images; search without --corrected, "
                "or train with --evaluate.hubness.queries above 0"
            )
        vectors = torch.from_numpy(np.array(self.index.vectors))
        augmented = augment_gallery(vectors, torch.from_numpy(self.index.items[_BIAS].to_numpy(copy=True)))
        return Index(augmented.numpy(), self.index.items)

    def nearest(self, embeddings: Tensor, k: int = 10, *, corrected: bool = False) -> list[list[Hit]]:
        """The k nearest images of each embedding (N, E), nearest first.

        Args:
            embeddings: of texts or pictures.
            k: images for each.
            corrected: whether images that are near to everything are set back; their distances grow.

        Raises:
            ValueError: the embeddings have other dimensions than the index, or k < 1.
        """
        if corrected:
            distances, rows = self.corrected_index.search(augment_queries(embeddings).numpy(), k)
        else:
            distances, rows = self.index.search(embeddings.numpy(), k)
        return [
            [
                Hit(rank, math.sqrt(float(squared)), self._sample(int(row)))
                for rank, (squared, row) in enumerate(zip(of_query, found, strict=True), 1)
            ]
            for of_query, found in zip(distances, rows, strict=True)
        ]

    def search(self, query: str | Path | Image.Image, k: int = 10, *, corrected: bool = False) -> list[Hit]:
        """The k nearest images of a text, or of a picture (a path or an opened image); see `nearest`.

        Raises:
            featurize.images.decode.DecodeError: the picture cannot be read.
        """
        if isinstance(query, str):
            return self.nearest(self.embed_texts([query]), k, corrected=corrected)[0]
        picture = decode(query.read_bytes()) if isinstance(query, Path) else query
        return self.nearest(self.embed_pictures([picture]), k, corrected=corrected)[0]

    def _sample(self, row: int) -> Sample:
        item = self.index.items.iloc[row]
        span = None if item["length"] < 0 else (int(item["offset"]), int(item["length"]))
        return Sample(item["item"], item["uri"], tuple(item["captions"]), item["split"], span)


def _padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows (L_i, ...) as one tensor (N, L, ...), zeros behind them, and its mask (N, L); L is at least 1."""
    lengths = torch.tensor([[len(row)] for row in rows])
    padded = rows[0].new_zeros(len(rows), max(1, int(lengths.max())), *rows[0].shape[1:])
    mask = torch.arange(padded.shape[1]) < lengths
    padded[mask] = torch.cat(list(rows))
    return padded, mask


def _stored(values: Array, ref: ColumnRef) -> Tensor:
    """Values in float32, rounded to float16 where the cache held the column so."""
    return torch.from_numpy(values.astype(np.float16 if ref.dtype == "float16" else np.float32)).float()


def _joined(values: Sequence[Tensor], rows: int) -> Tensor:
    return torch.cat(list(values), 1) if values else torch.empty(rows, 0)


def _check_describable(refs: Sequence[ColumnRef], query: Literal["text", "picture"]) -> None:
    """Refuse queries to a model that reads what no network here can say of them."""
    imported = [ref for ref in refs if is_import(ref.encoder)]
    if imported:
        other, setting = {"text": ("a picture", "texts"), "picture": ("a text", "images")}[query]
        raise CacheError(
            f"a {query} cannot be asked: the model reads {', '.join(ref.name for ref in imported)} of "
            f"{', '.join(dict.fromkeys(ref.encoder for ref in imported))}, features that others extracted, and no "
            f"network here can make them of a new {query}. Ask with {other}, or train a run on encoders only "
            f"(--featurize.{setting})"
        )


def _check_weights(ref: ColumnRef, card: Card) -> None:
    if card.weights != ref.weights:
        raise CacheError(
            f"{ref.encoder}: opens weights {card.weights[:8]}, the model was trained on what {ref.weights[:8]} said; "
            "install the version that extracted the cache, or featurize and train again"
        )
