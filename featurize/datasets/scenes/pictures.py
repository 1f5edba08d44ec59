"""A scene as a picture: small ray-marched solids on painted places, composed with PIL."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from featurize.datasets.scenes.places import backdrop
from featurize.datasets.scenes.world import Column, Scene, Thing, pick

Array = NDArray[np.floating[Any]]

SIDE = 224  # pixels of the finished picture
_CANVAS = 2 * SIDE  # drawn at twice the size, then averaged
_PIXELS = 160  # side of a solid's shading map
_REACH = 1.25  # which shows [-reach, reach] of the solid's own space
_SHADOW_BOX = (-1.6, 2.4, -0.7, 0.9)  # left, right, low, high of a shadow map around the solid's foot
_SHADOW_PIXELS = (160, 64)
_PITCH = 0.3  # radians that the camera looks down
_YAWS = (-0.5, 0.05, 0.35, 0.7)  # radians that solids are turned
_RADIUS = {"small": 0.108 * _CANVAS, "large": 0.185 * _CANVAS}  # pixels of one unit of a solid's space

_RIGHT = np.array([1, 0, 0], np.float32)
_UP = np.array([0, np.cos(_PITCH), -np.sin(_PITCH)], np.float32)
_VIEW = np.array([0, np.sin(_PITCH), np.cos(_PITCH)], np.float32)  # from the solid to the camera
_LIGHT = np.array([-0.42, 0.78, 0.46], np.float32) / np.float32(np.linalg.norm([-0.42, 0.78, 0.46]))

_RGB = {
    "red": (206, 22, 28),
    "orange": (246, 122, 8),
    "yellow": (250, 212, 24),
    "green": (30, 146, 48),
    "blue": (26, 78, 208),
    "purple": (112, 36, 164),
    "pink": (250, 120, 178),
    "white": (240, 240, 238),
}
_INK = {"white": (64, 64, 70)}  # stripes and dots are white, but grey on white


def _box(*excess: Array) -> Array:
    """Distance to a box from the excess over its half side along each axis."""
    outside = np.sqrt(sum(np.maximum(e, 0) ** 2 for e in excess))
    return np.asarray(outside + np.minimum(np.maximum.reduce(excess), 0))


def _extruded(flat: Array, z: Array) -> Array:
    """Distance to a flat shape that was given thickness and round edges."""
    return _box(flat + 0.1, np.abs(z) - 0.2) - 0.1


def _star(x: Array, y: Array, z: Array) -> Array:
    a, b = 0.809016994, 0.587785252  # cosine and sine of 36 degrees
    x, y = np.abs(x), y + 0.08
    for cosine in (a, -a):
        over = 2 * np.maximum(cosine * x - b * y, 0)
        x, y = x - over * cosine, y + over * b
    x, y = np.abs(x), y - 1.12
    ex, ey = 0.5 * b, 0.5 * a - 1
    along = np.clip((x * ex + y * ey) / (ex * ex + ey * ey), 0, 1.12)
    flat = np.hypot(x - ex * along, y - ey * along) * np.sign(y * ex - x * ey)
    return _extruded(flat, z)


def _heart(x: Array, y: Array, z: Array) -> Array:
    scale = 1.62
    x, y = np.abs(x) / scale, y / scale + 0.53
    middle = 0.5 * np.maximum(x + y, 0)
    body = np.sqrt(np.minimum(x**2 + (y - 1) ** 2, (x - middle) ** 2 + (y - middle) ** 2)) * np.sign(x - y)
    lobe = np.hypot(x - 0.25, y - 0.75) - np.sqrt(2) / 4
    return _extruded(scale * np.where(x + y > 1, lobe, body), z)


def _cone(x: Array, y: Array, z: Array) -> Array:
    slope = np.hypot(x, z) * 0.905 + (y - 0.98) * 0.425
    return np.asarray(np.maximum(slope, -0.82 - y))


_SOLIDS: dict[str, Callable[[Array, Array, Array], Array]] = {
    "sphere": lambda x, y, z: np.sqrt(x**2 + y**2 + z**2) - 0.9,
    "cube": lambda x, y, z: _box(np.abs(x) - 0.62, np.abs(y) - 0.62, np.abs(z) - 0.62) - 0.08,
    "cylinder": lambda x, y, z: _box(np.hypot(x, z) - 0.52, np.abs(y) - 0.78) - 0.08,
    "cone": _cone,
    "ring": lambda x, y, z: np.hypot(np.hypot(x, y) - 0.66, z) - 0.29,
    "star": _star,
    "heart": _heart,
    "diamond": lambda x, y, z: (np.abs(x) * 1.25 + np.abs(y) + np.abs(z) * 1.25 - 1.0) * 0.49,
}
"""Signed distance (or a lower bound of it) to each solid, for points (N,) in its own space.

The formulas of the star and the heart are Quilez's (iquilezles.org/articles/distfunctions2d)."""


@dataclass(frozen=True)
class _Solid:
    """One solid as the camera sees it: K pixels of its map. Heights are in units above the map's centre."""

    pixels: NDArray[np.intp]  # (K,) in the flat map
    points: Array  # (K, 3) in the solid's own space
    normals: Array  # (K, 3) in world space
    seen: Array  # (K, 3) offset from the map's centre, across the line of sight, in world space
    occlusion: Array  # (K,) 1: open sky
    shadow: Image.Image  # what it casts on the floor, as opacity
    top: float
    low: float
    hook: float  # highest point of the middle, where a string is tied
    ground: float  # where the floor under its centre is seen


@cache
def _solid(shape: str, yaw: float) -> _Solid:
    """Ray-marches one solid."""
    distance = _SOLIDS[shape]
    turn = np.array(
        [[np.cos(yaw), 0, -np.sin(yaw)], [0, 1, 0], [np.sin(yaw), 0, np.cos(yaw)]], np.float32
    )  # world to own space

    def sdf(world: Array) -> Array:
        own = world @ turn.T
        return distance(own[:, 0], own[:, 1], own[:, 2])

    centres = ((np.arange(_PIXELS, dtype=np.float32) + 0.5) / _PIXELS * 2 - 1) * np.float32(_REACH)
    u, v = np.meshgrid(centres, -centres)
    rays = u.reshape(-1, 1) * _RIGHT + v.reshape(-1, 1) * _UP + 2 * _VIEW  # (pixels, 3)
    alive = np.arange(len(rays))
    for _ in range(48):
        step = sdf(rays[alive])
        rays[alive] -= step[:, None] * _VIEW
        alive = alive[(step > 0.002) & (rays[alive] @ _VIEW > -2)]
    pixels = np.flatnonzero(np.abs(sdf(rays)) < 0.01)
    points = rays[pixels]

    steps = 0.01 * np.eye(3, dtype=np.float32)
    normals = np.stack([sdf(points + s) - sdf(points - s) for s in steps], axis=1)
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    bottom = points[:, 1].min()
    height = points[:, 1] - bottom
    openness = sum(np.clip(sdf(points + h * normals) / h, 0, 1) for h in (0.15, 0.4)) / 2
    shown_u, shown_v = u.reshape(-1)[pixels], v.reshape(-1)[pixels]
    return _Solid(
        pixels=pixels,
        points=points @ turn.T,
        normals=normals,
        seen=shown_u[:, None] * _RIGHT + shown_v[:, None] * _UP,
        occlusion=(0.55 + 0.45 * openness) * (0.6 + 0.4 * np.clip(height / 0.7, 0, 1)),
        shadow=_shadow(points, bottom),
        top=float(shown_v.max()),
        low=float(shown_v.min()),
        hook=float(shown_v[np.abs(shown_u) < 0.03].max()),
        ground=float(bottom * _UP[1]),
    )


def _shadow(points: Array, bottom: float) -> Image.Image:
    """What a solid casts on the floor: its points go down along the light and are splatted."""
    points = np.concatenate([points, points * (-1, 1, -1)])  # the far side: every solid looks so from behind
    fall = (points[:, 1:2] - bottom) / _LIGHT[1]
    floor = points - fall * _LIGHT
    left, right, low, high = _SHADOW_BOX
    width, rows = _SHADOW_PIXELS
    v = floor[:, 2] * _UP[2]  # above the foot's centre
    splat, _, _ = np.histogram2d(-v, floor[:, 0], bins=(rows, width), range=((-high, -low), (left, right)))
    cast = Image.fromarray(np.where(splat > 0, 255, 0).astype(np.uint8))
    cast = cast.filter(ImageFilter.MaxFilter(3)).filter(ImageFilter.GaussianBlur(3.5))
    return cast.point(lambda opacity: opacity * 0.55)


@cache
def _finish(shape: str, yaw: float, material: str) -> tuple[Array, Array, Array]:
    """For each pixel of a solid: light on its colour, added highlight, share of the pattern; (K,) each."""
    solid = _solid(shape, yaw)
    n = solid.normals
    lit = n @ _LIGHT
    light = 0.48 + 0.12 * n[:, 1] + 0.62 * np.clip((lit + 0.12) / 1.12, 0, 1)
    highlight = 0.05 * np.clip(lit, 0, 1) ** 4
    pattern = np.zeros(len(n), np.float32)
    if material == "shiny":
        # Seen from nearby, so that flat sides mirror more than one direction: sky, floor and two long lamps.
        view = _VIEW + 0.3 * solid.seen
        view /= np.linalg.norm(view, axis=1, keepdims=True)
        facing = np.clip((n * view).sum(1), 0, 1)
        mirrored = 2 * facing[:, None] * n - view
        lamp = mirrored @ np.array([0.5, 0.75, -0.1], np.float32)
        lamps = _smooth(6 - 40 * np.abs(lamp - 0.22)) + 0.6 * _smooth(2 - 40 * np.abs(lamp - 0.48))
        sky = _smooth((mirrored[:, 1] + 0.1) / 0.2)
        glint = np.clip(mirrored @ _LIGHT, 0, 1)
        light = 0.66 * light + 0.08 + 0.24 * sky
        highlight = 0.9 * glint**60 + 0.25 * glint**10 + (0.26 + 0.5 * (1 - facing) ** 3) * lamps
    elif material == "striped":
        across = solid.points @ np.array([0.42, 0.86, 0.3], np.float32)
        pattern = _smooth(np.sin(across * 11.5) * 3 + 0.5)
    elif material == "dotted":
        pattern = _smooth((0.15 - _to_dots(solid.points, spacing=0.42)) * 40 + 0.5)
    return (
        (light * solid.occlusion).astype(np.float32),
        (255 * highlight * solid.occlusion).astype(np.float32),
        pattern.astype(np.float32),
    )


def _smooth(x: Array) -> Array:
    x = np.clip(x, 0, 1)
    return np.asarray(x * x * (3 - 2 * x))


def _to_dots(points: Array, spacing: float) -> Array:
    """Distance to the nearest dot (K,); each new dot is the point farthest from all others."""
    nearest = np.full(len(points), np.inf, np.float32)
    newest = len(points) // 2
    while True:
        nearest = np.minimum(nearest, np.linalg.norm(points - points[newest], axis=1))
        newest = int(nearest.argmax())
        if nearest[newest] < spacing:
            return np.asarray(nearest)


def _sprite(thing: Thing, yaw: float, tint: float) -> Image.Image:
    """One object on transparent ground."""
    light, highlight, pattern = _finish(thing.shape, yaw, thing.material)
    paint = np.array(_RGB[thing.colour], np.float32) * tint
    ink = np.array(_INK.get(thing.colour, (244, 244, 242)), np.float32)
    colours = (paint + pattern[:, None] * (ink - paint)) * light[:, None] + highlight[:, None]
    rgba = np.zeros((_PIXELS * _PIXELS, 4), np.uint8)
    pixels = _solid(thing.shape, yaw).pixels
    rgba[pixels, :3] = np.clip(colours, 0, 255)
    rgba[pixels, 3] = 255
    return Image.fromarray(rgba.reshape(_PIXELS, _PIXELS, 4))


@dataclass
class _Placed:
    """One object on the canvas, in pixels: its size, its map's centre (x, y), the floor under it."""

    thing: Thing
    yaw: float
    radius: float
    x: float = 0.0
    y: float = 0.0
    floor: float = 0.0
    hangs: bool = False

    @property
    def solid(self) -> _Solid:
        return _solid(self.thing.shape, self.yaw)

    def stand(self, x: float, floor: float) -> None:
        self.x, self.floor = x, floor
        self.y = floor + self.solid.ground * self.radius

    def hang(self, x: float, below: "_Placed") -> None:
        """With a gap over another object."""
        self.x, self.floor, self.hangs = x, below.floor, True
        gap = 0.035 * _CANVAS
        self.y = below.y - below.solid.top * below.radius - gap + self.solid.low * self.radius


@dataclass
class _Group:
    """The objects of one column; how far it reaches to both sides of the first, and where the second is."""

    placed: list[_Placed]
    left: float
    right: float
    shift: float = 0.0


def _group(column: Column, rng: np.random.Generator) -> _Group:
    placed = [_Placed(thing, pick(rng, _YAWS), _RADIUS[thing.size]) for thing in column.things]
    first, second = placed[0], placed[-1]
    if column.order == "above":
        first.radius *= 0.86
        second.radius *= 0.86
        shift = float(rng.uniform(-0.15, 0.15)) * first.radius
    elif column.order == "behind":
        second.radius *= 0.86
        shift = pick(rng, (-1, 1)) * (first.radius + 0.35 * second.radius)
    else:
        shift = 0.0
    left = max(first.radius, second.radius - shift)
    right = max(first.radius, second.radius + shift)
    return _Group(placed, left, right, shift)


def _arrange(scene: Scene, rng: np.random.Generator) -> list[_Placed]:
    """Puts every object where its column says; the farthest come first, hanging ones last."""
    groups = [_group(column, rng) for column in scene.columns]
    width = sum(group.left + group.right for group in groups)
    margin, gap = 0.02 * _CANVAS, 0.03 * _CANVAS
    room = _CANVAS - 2 * margin
    scale = min({1: 1.1, 2: 1.0, 3: 0.92}[len(groups)], (room - gap * (len(groups) - 1)) / width)
    spare = room - scale * width - gap * (len(groups) - 1)
    x, floor = margin - gap, _CANVAS * float(rng.uniform(0.79, 0.84))
    for column, group, share in zip(scene.columns, groups, rng.dirichlet([3.0] * (len(groups) + 1)), strict=False):
        x += gap + share * spare + scale * group.left
        for one in group.placed:
            one.radius *= scale
        first, second = group.placed[0], group.placed[-1]
        first.stand(x, floor + float(rng.uniform(-0.02, 0.02)) * _CANVAS)
        if column.order == "behind":
            second.stand(x + scale * group.shift, first.floor - 0.15 * _CANVAS)
        elif column.order == "above":
            second.hang(x + scale * group.shift, below=first)
        x += scale * group.right
    placed = [one for group in groups for one in group.placed]
    return sorted(placed, key=lambda one: (one.hangs, one.floor))


def draw(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """The picture of a scene, (224, 224) RGB; `rng` decides what captions do not tell."""
    canvas = backdrop(scene.place, int(rng.integers(4)), _CANVAS)
    canvas = canvas.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else canvas.copy()
    arranged = _arrange(scene, rng)
    left, right, low, high = _SHADOW_BOX
    for one in arranged:
        size = (round((right - left) * one.radius), round((high - low) * one.radius))
        shadow = one.solid.shadow.resize(size, Image.Resampling.BILINEAR)
        if one.hangs:
            shadow = shadow.point(lambda opacity: opacity * 0.5)
        canvas.paste((14, 12, 22), (round(one.x + left * one.radius), round(one.floor - high * one.radius)), shadow)
    for one in arranged:
        if one.hangs:
            hook = one.y - (one.solid.hook - 0.05) * one.radius
            ImageDraw.Draw(canvas).line([(one.x, 0), (one.x, hook)], fill=(112, 106, 104), width=3)
        tint = 1 + float(rng.normal(0, 0.04))
        side = round(2 * _REACH * one.radius)
        sprite = _sprite(one.thing, one.yaw, tint).resize((side, side), Image.Resampling.BILINEAR)
        canvas.paste(sprite, (round(one.x - side / 2), round(one.y - side / 2)), sprite)
    brightness = float(rng.uniform(0.9, 1.06))
    return canvas.reduce(2).point(lambda value: value * brightness)
