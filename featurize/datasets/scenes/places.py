"""The places in which scenes happen: painted backdrops, a wall or sky above the horizon and a floor below."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from featurize.datasets.scenes.world import PLACES

Array = NDArray[np.floating[Any]]

HORIZON = 0.47  # share of the height that is wall or sky


class _Painter:
    """Coordinates and brushes for one backdrop of `side` pixels."""

    def __init__(self, side: int, rng: np.random.Generator) -> None:
        self.rng = rng
        self.side = side
        self.horizon = round(side * HORIZON)
        rows = np.arange(side - self.horizon, dtype=np.float32)[:, None] / (side - self.horizon)
        columns = np.arange(side, dtype=np.float32)[None] / side - 0.5
        self.rise = np.arange(self.horizon, dtype=np.float32)[:, None] / self.horizon  # (H, 1), 0 at the top
        self.near = rows  # (F, 1), 0 at the horizon
        self.depth = 1 / (rows + 0.25)  # (F, 1), distance on the floor
        self.across = columns * self.depth  # (F, W), sideways on the floor
        self.columns = columns  # (1, W)

    def noise(self, rows: int, cells: tuple[int, int]) -> Array:
        """Smooth noise of `rows` by `side` pixels in about [-1, 1] from a random grid of `cells`."""
        grid = self.rng.uniform(-1, 1, cells).astype(np.float32)
        image = Image.fromarray(grid).resize((self.side, rows), Image.Resampling.BICUBIC)
        return np.asarray(image, np.float32)

    def sky(self, top: tuple[int, int, int], bottom: tuple[int, int, int], clouds: float = 0.0) -> Array:
        """A gradient with clouds: (H, W, 3)."""
        share = np.broadcast_to(self.rise, (self.horizon, self.side))
        paint = _mix(top, bottom, share)
        if clouds:
            billow = self.noise(self.horizon, (5, 5)) + 0.5 * self.noise(self.horizon, (11, 13))
            billow = billow + 0.25 * self.noise(self.horizon, (25, 29))
            paint = paint + (np.clip(billow - 0.1, 0, 1) * clouds)[..., None] * (252 - paint)
        return paint

    def floor(self, colour: tuple[int, int, int], rough: float) -> Array:
        """Even ground with lumps that shrink with distance: (F, W, 3)."""
        rows = self.side - self.horizon
        lumps = self.noise(rows, (9, 14)) * self.near + self.noise(rows, (40, 60))
        lumps = lumps + self.noise(rows, (130, 150)) * 1.2
        shade = 1 + rough * lumps + 0.1 * (self.near - 0.5)
        return np.asarray(np.array(colour, np.float32) * shade[..., None])


def _mix(a: tuple[int, int, int], b: tuple[int, int, int], share: Array) -> Array:
    first, second = np.array(a, np.float32), np.array(b, np.float32)
    return np.asarray(first + share[..., None] * (second - first))


def _meadow(paint: _Painter) -> tuple[Array, Array]:
    sky = paint.sky((96, 158, 226), (206, 228, 242), clouds=0.9)
    hills = 0.86 + 0.05 * np.sin(paint.columns * paint.rng.uniform(5, 9) + paint.rng.uniform(0, 6))
    return np.where((paint.rise > hills)[..., None], (104, 142, 92), sky), paint.floor((104, 158, 62), 0.16)


def _beach(paint: _Painter) -> tuple[Array, Array]:
    sky = paint.sky((122, 190, 236), (226, 238, 240), clouds=0.4)
    sea = np.array((46, 132, 168)) + paint.noise(paint.horizon, (60, 9))[..., None] * 12
    return np.where((paint.rise > 0.72)[..., None], sea, sky), paint.floor((226, 200, 148), 0.06)


def _snow(paint: _Painter) -> tuple[Array, Array]:
    sky = paint.sky((150, 168, 192), (214, 222, 232))
    firs = np.zeros((paint.horizon, paint.side), bool)
    for x in paint.rng.uniform(-0.5, 0.5, 11):
        height = paint.rng.uniform(0.25, 0.5)
        from_tip = paint.rise - (1 - height)
        jag = 0.022 * np.mod(from_tip * 14, 1)
        firs |= (from_tip > 0) & (np.abs(paint.columns - x) < from_tip * 0.16 + jag)
    return np.where(firs[..., None], (62, 88, 84), sky), paint.floor((232, 238, 246), 0.025)


def _room(paint: _Painter) -> tuple[Array, Array]:
    wall = paint.sky((232, 218, 192), (214, 198, 170))
    wall[paint.rise[:, 0] > 0.92] = (250, 246, 238)
    plank = np.floor(paint.across * 9 + 50).astype(int)
    tones = paint.rng.uniform(0.8, 1.1, 200).astype(np.float32)
    grain = np.sin(paint.across * 260 + 9 * paint.noise(len(paint.near), (6, 60))) * 0.05
    seam = np.mod(paint.across * 9 + 50, 1) < 0.05
    shade = (tones[plank] + grain) * np.where(seam, 0.6, 1)
    return wall, np.array((164, 108, 62), np.float32) * shade[..., None]


def _tiles(paint: _Painter) -> tuple[Array, Array]:
    wall = paint.sky((150, 190, 190), (120, 164, 168))
    check = (np.floor(paint.across * 5 + 0.5) + np.floor(paint.depth * 3.4)) % 2
    floor = _mix((34, 36, 42), (228, 226, 220), np.asarray(check, np.float32))
    return wall, floor * (0.86 + 0.14 * paint.near[..., None])


def _studio(paint: _Painter) -> tuple[Array, Array]:
    grey = int(paint.rng.integers(128, 178))
    wall = paint.sky((grey - 26,) * 3, (grey + 14,) * 3)
    share = np.broadcast_to(np.sqrt(paint.near), (len(paint.near), paint.side))
    return wall, _mix((grey + 14,) * 3, (grey + 44,) * 3, np.asarray(share, np.float32))


def _night(paint: _Painter) -> tuple[Array, Array]:
    sky = paint.sky((8, 10, 34), (40, 44, 92))
    for _ in range(70):
        y, x = paint.rng.integers(0, paint.horizon - 2), paint.rng.integers(0, paint.side - 2)
        sky[y : y + 2, x : x + 2] += paint.rng.uniform(60, 200)
    moon = np.hypot(paint.columns - paint.rng.uniform(0.2, 0.4), (paint.rise - 0.3) * HORIZON) < 0.06
    return np.where(moon[..., None], (240, 236, 206), sky), paint.floor((58, 62, 92), 0.08)


def _stage(paint: _Painter) -> tuple[Array, Array]:
    phase = paint.columns * 60 + 1.6 * np.sin(paint.columns * 17 + paint.rng.uniform(0, 6)) + paint.rise * 0.6
    folds = 0.62 + 0.38 * np.sin(phase)
    curtain = np.array((134, 20, 34), np.float32) * folds[..., None]
    spot = np.clip(1.25 - np.hypot(paint.columns / 0.55, (paint.near - 0.55) / 0.7), 0.25, 1)
    return curtain, np.array((128, 96, 74), np.float32) * spot[..., None]


_PAINTINGS: dict[str, Callable[[_Painter], tuple[Array, Array]]] = {
    "meadow": _meadow,
    "beach": _beach,
    "snow": _snow,
    "room": _room,
    "tiles": _tiles,
    "studio": _studio,
    "night": _night,
    "stage": _stage,
}


@cache
def backdrop(place: str, variant: int, side: int) -> Image.Image:
    """One of a place's backdrops, (side, side) RGB, empty of objects; not to be drawn on."""
    paint = _Painter(side, np.random.default_rng([PLACES.index(place), variant]))
    wall, floor = _PAINTINGS[place](paint)
    return Image.fromarray(np.clip(np.concatenate([wall, floor]), 0, 255).astype(np.uint8))
