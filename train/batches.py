"""Batches: what towers and losses see, and how it comes from mapped columns."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from featurize.columns import open_column
from featurize.config import View
from featurize.index import Dataset, open_dataset
from featurize.manifest import read_manifest
from featurize.places import Place
from featurize.plan import PlannedColumn
from featurize.shards import Array, Column
from featurize.texts.lexicon import language_of, stop_ids
from train.config import ObjectiveConfig, SettingsError, TrainConfig
from train.lexicon import Lemmas, Vocabulary, image_labels
from train.schedule import Draw


@dataclass(frozen=True)
class Features:
    """Frozen features of N rows of one modality.

    Attributes:
        vectors: (N, V) float32, all vector columns side by side; V may be 0.
        parts: one (N, K_c, D_c) float32 tensor for each part column (grid, regions, tokens).
        masks: one (N, K_c) bool tensor for each part column; True where a part is real.
        bags: one (N, L_c) int64 tensor of lemma ids for each bag column.
        bag_masks: one (N, L_c) bool tensor for each bag column; True where there is a lemma.
    """

    vectors: Tensor
    parts: tuple[Tensor, ...] = ()
    masks: tuple[Tensor, ...] = ()
    bags: tuple[Tensor, ...] = ()
    bag_masks: tuple[Tensor, ...] = ()

    def map(self, change: Callable[[Tensor], Tensor]) -> "Features":
        """The same with every tensor changed."""
        groups = (self.parts, self.masks, self.bags, self.bag_masks)
        return Features(change(self.vectors), *(tuple(map(change, group)) for group in groups))


@dataclass(frozen=True)
class Batch:
    """One worker's slice of a step: b captions and their g images, of which each may have several.

    Attributes:
        image: features of the g images.
        text: features of the b captions.
        owner: (b,) int64, which of the g images each caption belongs to.
        semantic: (b, S) sentence vectors, or S = 0.
    """

    image: Features
    text: Features
    owner: Tensor
    semantic: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The same with every tensor changed."""
        return Batch(self.image.map(change), self.text.map(change), change(self.owner), change(self.semantic))


@dataclass(frozen=True)
class ColumnRef:
    """A column as it travels to a worker, and as a saved model remembers what to ask of a new picture or caption.

    Attributes:
        name: in the cache.
        id: its identity.
        encoder: reference that opens its encoder.
        weights: sha256 of that encoder's weights.
        output: which of the encoder's outputs.
        view: of the image.
        dtype: that its numbers are stored in.
    """

    name: str
    id: str
    encoder: str
    weights: str
    output: str
    view: View
    dtype: str = "float16"


@dataclass(frozen=True)
class Inputs:
    """The columns that a model reads: plain data, opened where it is used.

    Attributes:
        dataset: folder of the indexed data set.
        image_vectors: for each vector column its views.
        image_parts: for each part column its views.
        text_vectors: vector columns of captions.
        text_parts: part columns of captions.
        semantic: sentence vectors for losses that compare captions, if any does.
        precision: of the encoders' arithmetic.
        text_bags: lemma columns of captions.
        lemmas: lemmas for labels of images, if the run has them.
    """

    dataset: Place
    image_vectors: tuple[tuple[ColumnRef, ...], ...]
    image_parts: tuple[tuple[ColumnRef, ...], ...]
    text_vectors: tuple[ColumnRef, ...]
    text_parts: tuple[ColumnRef, ...]
    semantic: ColumnRef | None
    precision: Literal["bfloat16", "float32"]
    text_bags: tuple[ColumnRef, ...] = ()
    lemmas: ColumnRef | None = None

    @classmethod
    def of(
        cls,
        dataset: Place,
        columns: Sequence[PlannedColumn],
        config: TrainConfig,
        precision: Literal["bfloat16", "float32"],
    ) -> "Inputs":
        """Sort a run's columns by the tower and the branch that reads them."""
        model = config.model

        def views(modality: str, wanted: Sequence[str]) -> tuple[tuple[ColumnRef, ...], ...]:
            groups: dict[tuple[str, str], list[ColumnRef]] = {}
            for name in wanted:
                encoder, _, output = name.rpartition(".")
                for column in columns:
                    own = str(column.ingredients["encoder"])
                    if (column.modality, column.output.name) == (modality, output) and encoder in ("", own):
                        ref = ColumnRef(
                            column.name,
                            column.id,
                            column.encoder,
                            str(column.ingredients["weights"]),
                            output,
                            column.view,
                            column.output.dtype,
                        )
                        group = groups.setdefault((own, output), [])
                        if ref not in group:  # named plainly and by its encoder too
                            group.append(ref)
            return tuple(map(tuple, groups.values()))

        sentences = [ref[0] for ref in views("text", ["sentence"])] if compares_captions(config.objective) else []
        return cls(
            dataset,
            views("image", model.image.vectors),
            views("image", model.image.parts),
            tuple(ref[0] for ref in views("text", model.text.vectors)),
            tuple(ref[0] for ref in views("text", model.text.parts)),
            sentences[0] if sentences else None,
            precision,
            tuple(ref[0] for ref in views("text", model.text.bags)),
            next((ref[0] for ref in views("text", ["lemmas"])), None),
        )

    def identities(self) -> dict[str, Any]:
        """What is read, by role: columns as their identities, however the references to their encoders are typed."""

        def plain(value: Any) -> Any:
            if isinstance(value, tuple):
                return [plain(one) for one in value]
            return value.id if isinstance(value, ColumnRef) else value

        return {role.name: plain(getattr(self, role.name)) for role in fields(self) if role.name != "dataset"}

    def columns(self) -> list[ColumnRef]:
        """All that a model reads of images and of captions."""
        views = [ref for group in self.image_vectors + self.image_parts for ref in group]
        return [*views, *self.text_vectors, *self.text_parts, *self.text_bags]


def compares_captions(config: ObjectiveConfig) -> bool:
    """Whether a loss reads the frozen sentence vectors of captions."""
    clusters = config.center.weight > 0 and config.center.concept == "cluster"
    return clusters or config.margin.form in ("B", "C")


def reads_labels(config: ObjectiveConfig) -> bool:
    """Whether a loss reads the labels that captions' words give an image."""
    return config.local.weight > 0 or (config.center.weight > 0 and config.center.concept == "lexical")


def wanted_outputs(config: TrainConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The encoder outputs that a training run reads: of images, of captions.

    Raises:
        SettingsError: the image tower is to read words, or nothing.
    """
    image, text = config.model.image, config.model.text
    if not image.vectors and not image.parts:
        raise SettingsError(
            "the image tower reads nothing: set model.image.vectors (pooled) or model.image.parts (grid, coarse, "
            "regions) to outputs of its encoders"
        )
    if image.bags:
        raise SettingsError(f"model.image.bags: found {image.bags}, expected none: only captions have words")
    sentence = ("sentence",) if compares_captions(config.objective) else ()
    lemmas = ("lemmas",) if reads_labels(config.objective) else ()
    return image.vectors + image.parts, tuple(dict.fromkeys(text.vectors + text.parts + text.bags + sentence + lemmas))


class FeatureReader:
    """Rows of the cache as tensors.

    Attributes:
        dataset: the index.
        views: number of views of each image.
        missing: (n,) image rows without features in some column.
        images_per_shard: images whose rows stand in one shard of the first column.
    """

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.dataset: Dataset = open_dataset(inputs.dataset)

        def opened(ref: ColumnRef) -> Column:
            return open_column(self.dataset, ref.name, ref.id)

        self._image_vectors = [[opened(ref) for ref in views] for views in inputs.image_vectors]
        self._image_parts = [[opened(ref) for ref in views] for views in inputs.image_parts]
        self._text_vectors = [opened(ref) for ref in inputs.text_vectors]
        self._text_parts = [opened(ref) for ref in inputs.text_parts]
        self._text_bags = [opened(ref) for ref in inputs.text_bags]
        self._semantic = opened(inputs.semantic) if inputs.semantic else None
        self._lemmas = opened(inputs.lemmas) if inputs.lemmas else None
        for column in [*itertools.chain(*self._image_vectors), *self._text_vectors]:
            _check_kind(column, "vectors")
        for column in [*itertools.chain(*self._image_parts), *self._text_parts]:
            _check_kind(column, "parts")
        for column in self._text_bags:
            _check_kind(column, "bags")
        self.views = len((self._image_vectors or self._image_parts)[0])
        image_columns = [column for views in self._image_vectors + self._image_parts for column in views]
        manifests = [read_manifest(column.folder) for column in image_columns]
        self.images_per_shard = next(manifest.images_per_shard for manifest in manifests if manifest)
        self.missing = np.unique(np.concatenate([manifest.missing for manifest in manifests if manifest]))

    @cached_property
    def caption_image(self) -> Array:
        """(captions,) int64 image row of each caption row."""
        return self.dataset.caption_image

    @property
    def image_dims(self) -> tuple[int, tuple[int, ...]]:
        """Width of the image vectors, widths of the image parts."""
        return _dims([views[0] for views in self._image_vectors], [views[0] for views in self._image_parts])

    @property
    def text_dims(self) -> tuple[int, tuple[int, ...]]:
        """Width of the caption vectors, widths of the caption parts."""
        return _dims(self._text_vectors, self._text_parts)

    def split(self, name: str) -> tuple[Array, Array]:
        """Image rows (n,) and caption rows (m,) of a split, without images that could not be decoded."""
        images = np.setdiff1d(self.dataset.rows_of(name), self.missing)
        return images, np.flatnonzero(np.isin(self.caption_image, images))

    def owners(self, split: str) -> Tensor:
        """For each caption row of a split, in order, the place (M,) of its image among the split's images."""
        images, captions = self.split(split)
        return torch.from_numpy(np.searchsorted(images, self.caption_image[captions]))

    def images(self, rows: Array, views: Array) -> Features:
        """Features of image rows (N,), each in the view (N,) that is asked for.

        Parts of a ragged column are padded to the longest row of all its views, so that K is the same in every batch.
        """
        parts = [_view_parts(columns, rows, views) for columns in self._image_parts]
        return Features(
            _side_by_side([_view_rows(columns, rows, views) for columns in self._image_vectors], len(rows)),
            tuple(_tensor(values) for values, _ in parts),
            tuple(torch.from_numpy(mask) for _, mask in parts),
        )

    def texts(self, rows: Array) -> Features:
        """Features of caption rows (N,)."""
        padded = [column.gather_padded(rows) for column in self._text_parts]
        bags = [column.gather_padded(rows) for column in self._text_bags]
        return Features(
            _side_by_side([column.gather(rows) for column in self._text_vectors], len(rows)),
            tuple(_tensor(values) for values, _ in padded),
            tuple(torch.from_numpy(mask) for _, mask in padded),
            tuple(torch.from_numpy(ids.astype(np.int64)) for ids, _ in bags),
            tuple(torch.from_numpy(mask) for _, mask in bags),
        )

    def vocabularies(self, split: str, size: int, min_frequency: int) -> tuple[Vocabulary, ...]:
        """For each bag column the lemmas that most captions of a split hold, see `Vocabulary.of`."""
        _, captions = self.split(split)
        return tuple(Vocabulary.of(_lemmas(column, captions), size, min_frequency) for column in self._text_bags)

    def labels(self, split: str, size: int) -> tuple[Tensor, Tensor]:
        """Labels that their captions' words give the images of a split (HIER).

        Args:
            split: the one that is trained on; its captions choose the vocabulary.
            size: V, the most frequent content lemmas; fewer where the captions hold fewer.

        Returns:
            (n, V) uint8, how often an image's captions use a word, in the order of the image rows of `split`, and (V,)
            float32 idf.

        Raises:
            SettingsError: the run has no lexicon.
        """
        if self._lemmas is None or self.inputs.lemmas is None:
            raise SettingsError(
                "labels from words need the captions' lemmas, and this run reads none: add lexicon (English) or "
                "lexicon:LANGUAGE to --featurize.texts"
            )
        images, captions = self.split(split)
        lemmas = _lemmas(self._lemmas, captions)
        vocabulary = Vocabulary.of(lemmas, size, stop=stop_ids(language_of(self.inputs.lemmas.encoder)))
        owner = np.searchsorted(images, self.caption_image[captions])
        return image_labels(lemmas, owner, len(images), vocabulary), vocabulary.idf

    def sentences(self, captions: Array) -> Array:
        """Frozen sentence vectors (N, S) of caption rows, for a run whose objective compares captions."""
        assert self._semantic is not None, "Inputs.of names a sentence column where compares_captions is true"
        return self._semantic.gather(captions)

    def prepare(self, captions: Array) -> None:
        """Bring the shards of captions (N,) and of their images to this node, if they lie elsewhere."""
        images = np.unique(self.caption_image[captions])
        for column in itertools.chain(*self._image_vectors, *self._image_parts):
            column.prepare(images)
        semantic = [self._semantic] if self._semantic else []
        for column in [*self._text_vectors, *self._text_parts, *self._text_bags, *semantic]:
            column.prepare(captions)

    def batch(self, draw: Draw) -> Batch:
        """The drawn captions and their images."""
        images = self.caption_image[draw.captions]
        first = np.searchsorted(draw.owner, np.arange(len(draw.views)))
        semantic = self._semantic.gather(draw.captions) if self._semantic else np.empty((len(images), 0), np.float16)
        return Batch(
            self.images(images[first], draw.views),
            self.texts(draw.captions),
            torch.from_numpy(draw.owner),
            _tensor(semantic),
        )


def _dims(vectors: Sequence[Column], parts: Sequence[Column]) -> tuple[int, tuple[int, ...]]:
    return sum(column.shape[-1] for column in vectors), tuple(column.shape[-1] for column in parts)


def _check_kind(column: Column, role: Literal["vectors", "parts", "bags"]) -> None:
    """Whether a column holds what a tower reads by this setting.

    Raises:
        SettingsError: it holds something else.
    """
    if (column.dtype.kind == "i") != (role == "bags"):
        found = "vectors" if role == "bags" else "class ids" if column.name.endswith("labels") else "lemma ids"
        raise SettingsError(
            f"{column.name} holds {found}: a tower reads lemmas by its `bags`, everything else by `vectors` or `parts`"
        )
    shape = (*(["L"] if column.ragged else []), *column.shape)
    fits = {"vectors": len(shape) == 1 and not column.ragged, "parts": len(shape) == 2, "bags": True}
    if not fits[role]:
        raise SettingsError(
            f"{column.name} has rows of shape ({', '.join(map(str, shape))}): a tower reads one vector a row, (D,), by "
            "its `vectors`, and several, (K, D) or (L, D), by its `parts`"
        )


def _view_rows(columns: Sequence[Column], rows: Array, views: Array) -> Array:
    """Rows (N, *shape) of fixed columns, one column a view, each row in the view (N,) that is asked for."""
    if not views.any():
        return columns[0].gather(rows)
    out = np.empty((len(rows), *columns[0].shape), columns[0].dtype)
    for number, column in enumerate(columns):
        places = np.flatnonzero(views == number)
        if len(places):
            out[places] = column.gather(rows[places])
    return out


def _view_parts(columns: Sequence[Column], rows: Array, views: Array) -> tuple[Array, Array]:
    """Parts (N, K, D) and mask (N, K) of columns, one column a view, each row in the view (N,) that is asked for."""
    if not columns[0].ragged:
        values = _view_rows(columns, rows, views)
        return values, np.ones(values.shape[:2], np.bool_)
    longest = max(column.longest for column in columns)
    out = np.zeros((len(rows), longest, *columns[0].shape), columns[0].dtype)
    mask = np.zeros((len(rows), longest), np.bool_)
    for number, column in enumerate(columns):
        places = np.flatnonzero(views == number)
        if len(places):
            values, real = column.gather_padded(rows[places])
            out[places, : real.shape[1]] = values
            mask[places, : real.shape[1]] = real
    return out, mask


def _lemmas(column: Column, captions: Array) -> Lemmas:
    """The lemmas of caption rows (N,), a few thousand rows at a time: one long caption pads them all."""
    ids: list[Array] = [np.empty(0, np.int64)]
    owner: list[Array] = [np.empty(0, np.int64)]
    for start in range(0, len(captions), 4096):
        values, mask = column.gather_padded(captions[start : start + 4096])
        ids.append(values[mask].astype(np.int64))
        owner.append(start + np.nonzero(mask)[0])
    return Lemmas(np.concatenate(ids), np.concatenate(owner), len(captions))


def _tensor(values: Array) -> Tensor:
    return torch.from_numpy(values).float()


def _side_by_side(values: Sequence[Array], rows: int) -> Tensor:
    return torch.cat([_tensor(value) for value in values], 1) if values else torch.empty(rows, 0)
