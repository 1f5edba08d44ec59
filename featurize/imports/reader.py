"""The reader that takes an encoder's place: its card, which rows are whose, and the values as they are stored."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from featurize.datasets.sample import DataError, Sample
from featurize.encoder import Card, Output
from featurize.imports.matching import Place, locate
from featurize.imports.source import ById, Modality, Source
from featurize.shards import Array, largest_number


@dataclass(frozen=True)
class ImportedRows:
    """Where a file holds some rows of the data set.

    Attributes:
        cache: folder of all data sets, which remembers what is known of the file.
        places: for each row.
    """

    cache: Path
    places: tuple[Place, ...]

    def part(self, rows: Sequence[int]) -> "ImportedRows":
        """Some of these rows."""
        return ImportedRows(self.cache, tuple(self.places[row] for row in rows))


@dataclass(frozen=True)
class FeatureFile:
    """Features that others have extracted.

    Attributes:
        path: what the reference names.
        modality: whether its rows are images or captions.
        card: as an encoder has one: weights are the sha256 of the content, preprocessing is the format and layout.
        source: how the rows are read.
    """

    path: Path
    modality: Modality
    card: Card
    source: Source

    def places(self, samples: Sequence[Sample], incomplete: frozenset[str]) -> list[Place]:
        """For each image or caption of a data set the rows that describe it, see `featurize.imports.matching.locate`.

        Args:
            samples: the data set's images, in order.
            incomplete: ids of images that lost something while indexing.
        """
        return locate(self.source.keys, samples, incomplete, self.modality, self.path)

    def read(self, outputs: Sequence[Output], places: Sequence[Place]) -> tuple[dict[str, list[Array]], dict[int, str]]:
        """Values, read in the file's order and checked to fit the type that they are to be stored in.

        Args:
            outputs: some of the card's, or the same to be stored in another type.
            places: the rows of the file that hold a row of the answer.

        Returns:
            Output name -> one array for each place, float32, or int32 where numbers are whole; NaN (or nothing, if
            ragged) where there are no values; place -> why there are none.

        Raises:
            DataError: a value is beyond the type, or none in a caption's row; rows that should be copies of each other
                differ.
        """
        asked = sorted((row, place) for place, rows in enumerate(places) for row in rows)
        rows = np.array([row for row, _ in asked], np.int64)
        failed = {place: f"no row in {self.path.name}" for place, found in enumerate(places) if not found}
        answers: dict[str, dict[int, Array]] = {}
        for output in outputs:
            feature = next(feature for feature in self.source.features if feature.output.name == output.name)
            found = answers.setdefault(output.name, {})
            for (row, place), raw in zip(asked, feature.read(rows), strict=True):
                values = self._checked(raw, output, row)
                if place in found and not np.array_equal(found[place], values, equal_nan=True):
                    raise DataError(
                        f"{self.path}: {self._row(places[place][0])} and {self._row(row)} are of one image, but their "
                        f"{output.name!r} differ; expected copies"
                    )
                found[place] = values
                if not np.isfinite(values).all():
                    failed[place] = self._not_finite(values, output, row)
        absent = {output.name: _absent(output) for output in outputs}
        return {
            name: [absent[name] if place in failed else found[place] for place in range(len(places))]
            for name, found in answers.items()
        }, dict(sorted(failed.items()))

    def _checked(self, values: Array, output: Output, row: int) -> Array:
        shape = values.shape[1:] if output.ragged else values.shape
        if shape != output.shape:
            expected = f"({', '.join(map(str, ('L', *output.shape)))})" if output.ragged else str(output.shape)
            raise DataError(
                f"{self.path}: {self._row(row)} has the shape {values.shape}, expected {expected} in {output.name!r}"
            )
        if output.dtype == "int32":
            bounds = np.iinfo(np.int32)
            if values.size and (values.max() > bounds.max or values.min() < bounds.min):
                raise DataError(f"{self.path}: {self._row(row)} holds numbers beyond 32 bits")
            return values.astype(np.int32)
        largest = float(np.max(np.abs(values), initial=0.0, where=np.isfinite(values)))
        limit = largest_number(output.dtype)
        if largest > limit:
            raise DataError(
                f"{self.path}: {self._row(row)} holds {largest:g} in {output.name!r}, beyond the {limit:g} that can be "
                f"stored as {output.dtype}; divide the features by a constant, or store them with "
                "--featurize.storage float32"
            )
        return values.astype(np.float32)

    def _not_finite(self, values: Array, output: Output, row: int) -> str:
        """Why a row that holds NaN or infinity has no values.

        Raises:
            DataError: it is a caption's.
        """
        held = f"{self._row(row)} holds {'NaN' if np.isnan(values).any() else 'infinity'}"
        if self.modality == "text":
            raise DataError(f"{self.path}: {held} in {output.name!r}, and every caption must have values")
        return held

    def _row(self, row: int) -> str:
        """A row as messages name it."""
        if isinstance(self.source.keys, ById):
            return f"row {row} ({self.source.keys.ids[row]!r})"
        part = next(part for part in self.source.keys.parts if part.first <= row < part.first + part.rows)
        return f"row {row - part.first} of {part.file.name}"


def _absent(output: Output) -> Array:
    """What stands for a row without values: nothing in a ragged column, NaN in a fixed one."""
    shape = (0, *output.shape) if output.ragged else output.shape
    return np.zeros(shape, np.int32) if output.dtype == "int32" else np.full(shape, np.nan, np.float32)
