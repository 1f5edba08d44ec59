"""What a scene is, and which scenes there are: objects in columns, in a place, drawn from one seed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

SHAPES = ("sphere", "cube", "cylinder", "cone", "ring", "star", "heart", "diamond")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
MATERIALS = ("matte", "shiny", "striped", "dotted")
SIZES = ("small", "large")
PLACES = ("meadow", "beach", "snow", "room", "tiles", "studio", "night", "stage")

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")

_COLUMN_SIZES: dict[int, tuple[tuple[int, ...], ...]] = {
    1: ((1,),),
    2: ((1, 1), (1, 1), (2,)),
    3: ((1, 1, 1), (1, 2), (2, 1)),
    4: ((2, 2), (1, 1, 2), (1, 2, 1), (2, 1, 1)),
}
"""Ways to put so many objects into columns, left to right."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class Thing:
    """One object."""

    shape: str
    colour: str
    material: str
    size: str


@dataclass(frozen=True)
class Column:
    """One object, or two of which the second hangs above the first or stands behind it."""

    things: tuple[Thing, ...]
    order: Literal["alone", "above", "behind"]


@dataclass(frozen=True)
class Scene:
    """What a picture shows and its captions tell: columns from left to right."""

    columns: tuple[Column, ...]
    place: str

    @property
    def things(self) -> tuple[Thing, ...]:
        """All objects, column by column."""
        return tuple(thing for column in self.columns for thing in column.things)


def held_out(colour: str, shape: str) -> bool:
    """Whether train and val never show this combination: 16 of 64, two for each colour and each shape."""
    return (COLOURS.index(colour) + SHAPES.index(shape)) % 4 == 0


def pick(rng: np.random.Generator, options: Sequence[_T]) -> _T:
    """One of several, each as likely."""
    return options[int(rng.integers(len(options)))]


def invent(rng: np.random.Generator, split: Split) -> Scene:
    """A scene with one to four objects.

    In train and val no object has a held-out combination; in test at least one has, the others are free.
    """
    count = int(rng.choice((1, 2, 3, 4), p=(0.15, 0.35, 0.3, 0.2)))
    things: list[Thing] = []
    for number in range(count):
        if things and rng.random() < 0.2:
            colour, shape = things[0].colour, things[0].shape  # so that there is something to count
        else:
            colour, shape = _combination(rng, unseen={"train": False, "val": False, "test": number == 0 or None}[split])
        things.append(Thing(shape, colour, pick(rng, MATERIALS), pick(rng, SIZES)))
    things = [things[i] for i in rng.permutation(count)]
    columns = []
    for size in pick(rng, _COLUMN_SIZES[count]):
        members, things = tuple(things[:size]), things[size:]
        columns.append(Column(members, "alone" if size == 1 else pick(rng, ("above", "behind"))))
    return Scene(tuple(columns), pick(rng, PLACES))


def _combination(rng: np.random.Generator, *, unseen: bool | None) -> tuple[str, str]:
    """A colour and a shape; `unseen` None: of either kind."""
    while True:
        colour, shape = pick(rng, COLOURS), pick(rng, SHAPES)
        if unseen is None or held_out(colour, shape) == unseen:
            return colour, shape
