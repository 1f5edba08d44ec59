"""A scene in words: a small grammar with synonyms that tells some of the facts, never a wrong one."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from featurize.datasets.scenes.world import Scene, Thing, pick

NOUNS: dict[str, tuple[str, ...]] = {
    "sphere": ("ball", "ball", "sphere", "globe", "orb"),
    "cube": ("cube", "cube", "block", "box"),
    "cylinder": ("cylinder", "cylinder", "can", "drum"),
    "cone": ("cone", "cone", "spike"),
    "ring": ("ring", "ring", "doughnut", "hoop"),
    "star": ("star", "star", "five-pointed star"),
    "heart": ("heart", "heart", "love heart"),
    "diamond": ("diamond", "diamond", "gem", "crystal"),
}
COLOUR_WORDS: dict[str, tuple[str, ...]] = {
    "red": ("red", "red", "red", "scarlet", "crimson"),
    "orange": ("orange", "orange", "orange", "tangerine"),
    "yellow": ("yellow", "yellow", "yellow", "lemon"),
    "green": ("green", "green", "green", "emerald"),
    "blue": ("blue", "blue", "blue", "cobalt", "azure"),
    "purple": ("purple", "purple", "purple", "violet"),
    "pink": ("pink", "pink", "pink", "rose"),
    "white": ("white", "white", "white", "ivory"),
}
SIZE_WORDS: dict[str, tuple[str, ...]] = {
    "small": ("small", "little", "tiny"),
    "large": ("large", "big", "huge"),
}
MATERIAL_WORDS: dict[str, tuple[str, ...]] = {
    "matte": ("matte", "dull", "chalky"),
    "shiny": ("shiny", "glossy", "polished"),
    "striped": ("striped", "striped", "stripy", "banded"),
    "dotted": ("dotted", "spotted", "polka-dot"),
}
MATERIAL_PHRASES: dict[str, tuple[str, ...]] = {
    "matte": ("with a matte finish", "with a dull surface"),
    "shiny": ("with a glossy finish", "with a polished surface"),
    "striped": ("with stripes", "with bands"),
    "dotted": ("with dots", "with spots"),
}
PLACE_PHRASES: dict[str, tuple[str, ...]] = {
    "meadow": ("on the grass", "in a meadow", "on a lawn"),
    "beach": ("on the sand", "at the beach", "by the sea"),
    "snow": ("in the snow", "on snowy ground", "near snowy woods"),
    "room": ("on a wooden floor", "in a room with floorboards", "on wooden planks"),
    "tiles": ("on a checkered floor", "on chessboard tiles", "on a tiled floor"),
    "studio": ("in a grey studio", "against a plain grey backdrop", "on a grey background"),
    "night": ("at night", "by moonlight", "in the moonlight"),
    "stage": ("on a stage", "before a theatre curtain", "in the spotlight"),
}
RELATION_WORDS: dict[str, tuple[str, ...]] = {
    "left": ("to the left of", "left of", "on the left side of"),
    "right": ("to the right of", "right of", "on the right side of"),
    "above": ("above", "over", "hanging over", "higher than"),
    "below": ("below", "under", "beneath", "underneath"),
    "front": ("in front of", "closer to us than", "nearer than"),
    "behind": ("behind", "farther away than", "in back of"),
}
INVERSE = {
    "left": "right",
    "right": "left",
    "above": "below",
    "below": "above",
    "front": "behind",
    "behind": "front",
}

_NUMBERS = ("", "one", "two", "three", "four")


@dataclass(frozen=True)
class _Detail:
    """How likely each attribute is told."""

    size: float
    material: float
    colour: float


_ALONE = _Detail(0.75, 0.8, 1.0)
_PAIR = _Detail(0.45, 0.6, 0.92)
_MANY = _Detail(0.3, 0.4, 0.95)


def describe(scene: Scene, rng: np.random.Generator) -> tuple[str, ...]:
    """Five captions of one scene."""
    things = scene.things
    if len(things) == 1:
        return tuple(_single(scene, rng) for _ in range(5))
    if len(things) == 2:
        kinds = (_related, _related, _related, _listed, _listed)
    else:
        kinds = (_related, _related_with_rest, _related_with_rest, _listed, _counted)
    return tuple(kinds[i](scene, rng) for i in rng.permutation(5))


def relations(scene: Scene) -> list[tuple[Thing, str, Thing]]:
    """Every relation that holds between two objects which words can tell apart, in one direction each."""
    found: list[tuple[Thing, str, Thing]] = []
    for column in scene.columns:
        if len(column.things) == 2:
            first, second = column.things
            found.append((second, column.order, first))
    for i, column in enumerate(scene.columns):
        for other in scene.columns[i + 1 :]:
            found += [(a, "left", b) for a in column.things for b in other.things]
    return [(a, relation, b) for a, relation, b in found if _look(a) != _look(b)]


def _look(thing: Thing) -> tuple[str, str]:
    return thing.colour, thing.shape


def _single(scene: Scene, rng: np.random.Generator) -> str:
    thing = _article(_phrase(scene.things, rng, _ALONE))
    return _somewhere(pick(rng, ("", "", "there is ")) + thing, scene, rng, likely=0.85)


def _related(scene: Scene, rng: np.random.Generator) -> str:
    """A relation between two objects; nothing of the others."""
    pairs = relations(scene)
    if not pairs:
        return _counted(scene, rng)
    pattern = pick(
        rng,
        ("{a} {is_} {b}", "{a} {is_} {b}", "{a} is {is_} {b}", "{is_} {b} is {a}", "there is {a} {is_} {b}"),
    )
    likely = 0.5 if len(scene.things) == 2 else 0.3
    return _somewhere(_sentence(pick(rng, pairs), pattern, rng), scene, rng, likely=likely)


def _related_with_rest(scene: Scene, rng: np.random.Generator) -> str:
    """A relation between two objects, then the others."""
    pairs = relations(scene)
    if not pairs:
        return _counted(scene, rng)
    a, relation, b = pick(rng, pairs)
    rest = list(scene.things)
    rest.remove(a)
    rest.remove(b)
    pattern = pick(rng, ("{a} {is_} {b}, and also {rest}", "besides {rest} there is {a} {is_} {b}"))
    return _sentence((a, relation, b), pattern.replace("{rest}", _enumerated(rest, rng, _MANY)), rng)


def _listed(scene: Scene, rng: np.random.Generator) -> str:
    """All objects."""
    text = _enumerated(scene.things, rng, _PAIR if len(scene.things) == 2 else _MANY)
    return _somewhere(pick(rng, ("", "", "here are ", "we see ")) + text, scene, rng, likely=0.6)


def _counted(scene: Scene, rng: np.random.Generator) -> str:
    """Their number, then all objects."""
    noun = pick(rng, ("objects", "things", "toys"))
    text = f"{_NUMBERS[len(scene.things)]} {noun}: {_enumerated(scene.things, rng, _MANY)}"
    return _somewhere(text, scene, rng, likely=0.5)


def _sentence(fact: tuple[Thing, str, Thing], pattern: str, rng: np.random.Generator) -> str:
    """One relation, told from either side."""
    a, relation, b = fact
    if rng.random() < 0.5:
        a, relation, b = b, INVERSE[relation], a
    first, second = (_article(_phrase((thing,), rng, _PAIR)) for thing in (a, b))
    return pattern.format(a=first, is_=pick(rng, RELATION_WORDS[relation]), b=second)


def _enumerated(things: Sequence[Thing], rng: np.random.Generator, detail: _Detail) -> str:
    """Objects in any order; equal ones are counted together, and often all of one colour and shape."""
    together = rng.random() < 0.4
    groups: dict[object, list[Thing]] = {}
    for thing in things:
        groups.setdefault(_look(thing) if together else thing, []).append(thing)
    members = list(groups.values())
    phrases = []
    for i in rng.permutation(len(members)):
        phrase = _phrase(members[i], rng, detail)
        count = len(members[i])
        phrases.append(_article(phrase) if count == 1 else f"{_NUMBERS[count]} {phrase}")
    if len(phrases) == 1:
        return phrases[0]
    return f"{', '.join(phrases[:-1])} {pick(rng, ('and', 'and', 'with'))} {phrases[-1]}"


def _phrase(things: Sequence[Thing], rng: np.random.Generator, detail: _Detail) -> str:
    """A noun with attributes; `things` have one colour and shape, and only what all of them share is told."""
    thing = things[0]
    noun = pick(rng, NOUNS[thing.shape])
    if len(things) > 1:
        noun += "es" if noun.endswith("x") else "s"
    adjectives, after = [], ""
    if rng.random() < detail.material and len({t.material for t in things}) == 1:
        if rng.random() < 0.3:
            after = " " + pick(rng, MATERIAL_PHRASES[thing.material])
        else:
            adjectives.append(pick(rng, MATERIAL_WORDS[thing.material]))
    if rng.random() < detail.colour:
        colour = pick(rng, COLOUR_WORDS[thing.colour])
        adjectives.insert(int(rng.integers(len(adjectives) + 1)), colour)
    if rng.random() < detail.size and len({t.size for t in things}) == 1:
        adjectives.insert(0, pick(rng, SIZE_WORDS[thing.size]))
    return " ".join([*adjectives, noun]) + after


def _article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _somewhere(text: str, scene: Scene, rng: np.random.Generator, *, likely: float) -> str:
    """The text with the place before or behind it, or without."""
    if rng.random() >= likely:
        return text
    place = pick(rng, PLACE_PHRASES[scene.place])
    return pick(rng, (f"{text} {place}", f"{text}, {place}", f"{place}, {text}"))
