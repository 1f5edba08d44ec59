"""Search with a run: text or a picture in, the nearest images out.

run = Searcher.open("runs/less-scenes-…")
for hit in run.search("two dogs in snow", k=5):
    print(f"{hit.distance:.3f}  {hit.sample.image}")
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from evaluate.embed import embed_image_rows
from evaluate.index import Index
from featurize.cache import CacheError
from featurize.datasets.sample import Sample
from featurize.encoder import Card
from featurize.extract import describe_images, describe_texts, image_encoder, text_encoder
from featurize.images.decode import decode
from featurize.images.views import view
from featurize.shards import Array
from train.batches import ColumnRef, FeatureReader, Features
from train.state import open_model
from train.towers import DualEncoder


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


def build_index(model: DualEncoder, reader: FeatureReader, folder: Path) -> None:
    """Embed every image of the data set and write the index that searches them."""
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
    Index(embed_image_rows(model, reader, rows).numpy(), items).save(folder)


class Searcher:
    """A trained model, its frozen encoders and an index of images.

    Args:
        run: folder of a finished run.

    Raises:
        train.state.StateError: the run holds no finished model.
        evaluate.index.IndexFileError: the run holds no finished index.
    """

    def __init__(self, run: Path) -> None:
        self.model, self.inputs = open_model(run / "model")
        self.index = Index.open(run / "index")

    @classmethod
    def open(cls, run: str | Path) -> "Searcher":
        """Open a run by its folder."""
        return cls(Path(run))

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts -> (N, E)."""
        answers: dict[str, dict[str, list[Array]]] = {}

        def column(ref: ColumnRef) -> list[Array]:
            if ref.encoder not in answers:
                encoder = text_encoder(ref.encoder, self.inputs.precision)
                _check_weights(ref, encoder.card)
                answers[ref.encoder] = describe_texts(encoder, texts, batch=128)
            return answers[ref.encoder][ref.output]

        vectors = [np.stack(column(ref)) for ref in self.inputs.text_vectors]
        parts = [
            torch.nn.utils.rnn.pad_sequence([_stored(row) for row in column(ref)], batch_first=True)
            for ref in self.inputs.text_parts
        ]
        masks = [
            torch.arange(int(part.shape[1])) < torch.tensor([[len(row)] for row in column(ref)])
            for part, ref in zip(parts, self.inputs.text_parts, strict=True)
        ]
        with torch.inference_mode():
            return self.model.embed_texts(Features(_joined(vectors, len(texts)), tuple(parts), tuple(masks)))

    def embed_pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Pictures -> (N, E): the mean over the views that the model was trained with."""
        groups = self.inputs.image_vectors + self.inputs.image_parts
        with torch.inference_mode():
            return self.model.mean_of_views(
                self.model.embed_images(self._picture_features(pictures, number)) for number in range(len(groups[0]))
            )

    def _picture_features(self, pictures: Sequence[Image.Image], number: int) -> Features:
        answers: dict[str, dict[str, Array]] = {}

        def column(ref: ColumnRef) -> Array:
            if ref.encoder not in answers:
                encoder = image_encoder(ref.encoder, self.inputs.precision)
                _check_weights(ref, encoder.card)
                prepared = (encoder.prepare(view(picture, ref.view, "query")) for picture in pictures)
                answers[ref.encoder] = describe_images(encoder, prepared, batch=8)
            return answers[ref.encoder][ref.output]

        parts = tuple(_stored(column(views[number])) for views in self.inputs.image_parts)
        return Features(
            _joined([column(views[number]) for views in self.inputs.image_vectors], len(pictures)),
            parts,
            tuple(torch.ones(part.shape[:2], dtype=torch.bool) for part in parts),
        )

    def nearest(self, embeddings: Tensor, k: int = 10) -> list[list[Hit]]:
        """The k nearest images of each embedding (N, E), nearest first."""
        distances, rows = self.index.search(embeddings.numpy(), k)
        return [
            [
                Hit(rank, math.sqrt(float(squared)), self._sample(int(row)))
                for rank, (squared, row) in enumerate(zip(of_query, found, strict=True), 1)
            ]
            for of_query, found in zip(distances, rows, strict=True)
        ]

    def search(self, query: str | Path | Image.Image, k: int = 10) -> list[Hit]:
        """The k nearest images of a text, or of a picture (a path or an opened image).

        Raises:
            featurize.images.decode.DecodeError: the picture cannot be read.
        """
        if isinstance(query, str):
            return self.nearest(self.embed_texts([query]), k)[0]
        picture = decode(query.read_bytes()) if isinstance(query, Path) else query
        return self.nearest(self.embed_pictures([picture]), k)[0]

    def _sample(self, row: int) -> Sample:
        item = self.index.items.iloc[row]
        span = None if item["length"] < 0 else (int(item["offset"]), int(item["length"]))
        return Sample(item["item"], item["uri"], tuple(item["captions"]), item["split"], span)


def _stored(values: Array) -> Tensor:
    """Values as the cache would hold them (float16), back in float32."""
    return torch.from_numpy(values.astype(np.float16)).float()


def _joined(values: Sequence[Array], rows: int) -> Tensor:
    return torch.cat([_stored(value) for value in values], 1) if values else torch.empty(rows, 0)


def _check_weights(ref: ColumnRef, card: Card) -> None:
    if card.weights != ref.weights:
        raise CacheError(
            f"{ref.encoder}: opens weights {card.weights[:8]}, the model was trained on what {ref.weights[:8]} said; "
            "install the version that extracted the cache, or featurize and train again"
        )
