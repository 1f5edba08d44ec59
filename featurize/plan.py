"""The columns that a run needs, by identity, whether or not they are in the cache."""

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from featurize.columns import column_folder
from featurize.config import FeaturizeConfig, View
from featurize.copies import Node
from featurize.describe import image_encoder, text_encoder
from featurize.encoder import Card, Output, Precision, usable_precision
from featurize.imports import ImportedRows, check_imports, is_import, open_import
from featurize.index import Dataset
from featurize.manifest import (
    FORMAT_VERSION,
    CacheError,
    Manifest,
    Modality,
    ShardRecord,
    differences,
    environment,
    identity,
)
from featurize.places import Place


@dataclass(frozen=True)
class PlannedColumn:
    """A column that a run needs: what it is, whether or not it is there.

    Attributes:
        name: `<encoder>.<output>[.<view>]`.
        modality: image or text.
        encoder: the reference that opens it.
        output: which of the encoder's outputs.
        view: of the image; "plain" for captions.
        ingredients: of its identity.
        folder: where it belongs.
    """

    name: str
    modality: Modality
    encoder: str
    output: Output
    view: View
    ingredients: dict[str, Any]
    folder: Place

    @property
    def id(self) -> str:
        """The identity (sha256)."""
        return identity(self.ingredients)

    @property
    def precision(self) -> Precision:
        """Of the encoder's arithmetic; where its card names none, it does not matter."""
        found: Precision = self.ingredients.get("preprocessing", {}).get("precision", "float32")
        return found

    @classmethod
    def of(cls, folder: Place, manifest: Manifest) -> "PlannedColumn":
        """A column that was planned before, from what it says of itself."""
        made = manifest.ingredients
        output = Output(made["output"], manifest.shape, manifest.ragged, manifest.dtype)
        return cls(manifest.name, manifest.modality, manifest.reference, output, made["view"], dict(made), folder)

    def manifest(self, images_per_shard: int, shards: Iterable[ShardRecord] = ()) -> Manifest:
        """What the column says of itself, with this machine's environment."""
        return Manifest(
            self.name,
            self.modality,
            self.ingredients,
            self.encoder,
            self.output.dtype,
            self.output.shape,
            self.output.ragged,
            images_per_shard,
            tuple(shards),
            environment(),
        )


POSITIONS = ("boxes", "spatial", "placed")
"""Outputs with numbers from 0 to 1 that say where a region is: beside features, one scale in int8 would blur them."""


def encoder_card(column: PlannedColumn) -> Card:
    """What a column's encoder is on this machine.

    Raises:
        EncoderError: it cannot be opened.
        CacheError: it is not what made the column.
    """
    card = _open_card(column.modality, column.encoder, column.precision, column.folder.parents[1])
    made = {name: column.ingredients[name] for name in ("encoder", "weights", "preprocessing")}
    here = {"encoder": card.name, "weights": card.weights, "preprocessing": card.preprocessing}
    if identity(made) != identity(here):
        listed = "; ".join(differences(made, here))
        raise CacheError(
            f"{column.folder}: encoder {column.encoder!r} is not the one that made it ({listed}); use the machine and "
            "the versions that made it, or run `featurize` again for a column of its own"
        )
    return card


def _open_card(modality: Modality, reference: str, precision: Precision, cache: Place) -> Card:
    """What a reference opens: a network, or features that others have extracted."""
    if is_import(reference):
        return open_import(reference, modality, _memory(cache)).card
    return (image_encoder if modality == "image" else text_encoder)(reference, precision).card


def _memory(cache: Place) -> Path:
    """Where it is remembered what files of features hold: beside the copies, if the cache is in a store."""
    return cache if isinstance(cache, Path) else Node.here().folder


def imported_rows(dataset: Dataset, column: PlannedColumn) -> ImportedRows | None:
    """Where a file holds the rows of a column; None where a network describes them.

    Raises:
        DataError: the file's rows cannot be told to be the data set's.
    """
    if not is_import(column.encoder):
        return None
    cache = _memory(dataset.folder.parent)
    incomplete = frozenset(problem.image_id for problem in dataset.quarantine)
    places = open_import(column.encoder, column.modality, cache).places(dataset.samples, incomplete)
    return ImportedRows(cache, tuple(places))


def _outputs(card: Card, reference: str, wanted: Sequence[str]) -> list[Output]:
    """The outputs that a run wants of this encoder: named plainly, or as `<encoder>.<output>` for this one alone.

    A plain name is for every encoder that has such an output: sentences come from a network, lemmas from a lexicon.
    """
    own = {output.name: output for output in card.outputs}
    chosen = []
    for name in wanted:
        encoder, _, output = name.rpartition(".")
        if encoder and encoder != card.name:
            continue
        if output in own:
            chosen.append(own[output])
        elif encoder:
            raise CacheError(f"encoder {reference!r} has no output {output!r}; it has {', '.join(own)}")
    return list(dict.fromkeys(chosen))


def plan(
    dataset: Dataset, config: FeaturizeConfig, image_outputs: Sequence[str], text_outputs: Sequence[str]
) -> list[PlannedColumn]:
    """The columns that a run needs, with their identities (opens every encoder on this machine).

    Raises:
        CacheError: an encoder lacks an output that is wanted, or no encoder has it.
        EncoderError: imported features cannot stand beside the others.
    """
    check_imports(config.images, config.texts, config.views)
    cache = dataset.folder.parent
    cpu = torch.device("cpu")
    precision = config.precision if config.gpus_per_task else usable_precision(config.precision, cpu)
    planned: list[PlannedColumn] = []
    encoders: list[tuple[Modality, str, Card, tuple[View, ...], Sequence[str]]] = [
        *(
            ("image", ref, _open_card("image", ref, precision, cache), config.views, image_outputs)
            for ref in config.images
        ),
        *(("text", ref, _open_card("text", ref, precision, cache), ("plain",), text_outputs) for ref in config.texts),
    ]
    for modality, reference, card, views, wanted in encoders:
        safe = re.sub(r"[^A-Za-z0-9_-]", "-", card.name)
        for output, which in itertools.product(_outputs(card, reference, wanted), views):
            vectors = output.dtype == "float16" and output.shape
            positions = config.storage == "int8" and output.name in POSITIONS
            stored = replace(output, dtype=config.storage) if vectors and not positions else output
            name = f"{safe}.{output.name}" + ("" if which == "plain" else f".{which}")
            ingredients = {
                "format": FORMAT_VERSION,
                "dataset": dataset.id,
                "encoder": card.name,
                "weights": card.weights,
                "preprocessing": card.preprocessing,
                "output": output.name,
                "view": which,
                "dtype": stored.dtype,
            }
            folder = column_folder(dataset, name, identity(ingredients))
            planned.append(PlannedColumn(name, modality, reference, stored, which, ingredients, folder))
    names = [column.name for column in planned]
    for name in names:
        if names.count(name) > 1:
            raise CacheError(
                f"two encoders give a column {name!r}: they differ in settings but not in name, and a run cannot tell "
                "what they say apart; choose one of them"
            )
    for wanted, modality in ((image_outputs, "image"), (text_outputs, "text")):
        for name in wanted:
            encoder, _, output_name = name.rpartition(".")
            found = (c for c in planned if c.modality == modality and c.output.name == output_name)
            if not any(not encoder or c.ingredients["encoder"] == encoder for c in found):
                given = ", ".join(
                    f"{card.name} ({', '.join(output.name for output in card.outputs)})"
                    for kind, _, card, _, _ in encoders
                    if kind == modality
                )
                raise CacheError(f"no {modality} encoder gives {name!r}; the run has {given}")
    return planned
