import io
import json
import re
from itertools import permutations

import numpy as np
import pytest
from PIL import Image

from featurize.config import ScenesConfig
from featurize.datasets import scenes
from featurize.datasets.sample import DataError
from featurize.datasets.scenes import pictures, read_scenes, render
from featurize.datasets.scenes.captions import describe, relations
from featurize.datasets.scenes.world import (
    COLOURS,
    MATERIALS,
    PLACES,
    SHAPES,
    SIZES,
    SPLITS,
    Column,
    Scene,
    Thing,
    held_out,
    invent,
    pick,
)

SMALL = ScenesConfig(train=3, val=2, test=2)

# The words of the captions, written down apart from the grammar.
MEANINGS = {
    "sphere": "ball sphere globe orb",
    "cube": "cube block box",
    "cylinder": "cylinder can drum",
    "cone": "cone spike",
    "ring": "ring doughnut hoop",
    "star": "star",
    "heart": "heart",
    "diamond": "diamond gem crystal",
    "red": "red scarlet crimson",
    "orange": "orange tangerine",
    "yellow": "yellow lemon",
    "green": "green emerald",
    "blue": "blue cobalt azure",
    "purple": "purple violet",
    "pink": "pink rose",
    "white": "white ivory",
    "small": "small little tiny",
    "large": "large big huge",
    "matte": "matte dull chalky",
    "shiny": "shiny glossy polished",
    "striped": "striped stripy banded stripes bands",
    "dotted": "dotted spotted polka-dot dots spots",
}
MEANING = {word: meaning for meaning, words in MEANINGS.items() for word in words.split()}
PLACE_WORDS = {
    "meadow": "grass meadow lawn",
    "beach": "sand beach sea",
    "snow": "snow snowy",
    "room": "wooden floorboards",
    "tiles": "checkered chessboard tiled",
    "studio": "studio backdrop background",
    "night": "night moonlight",
    "stage": "stage curtain spotlight",
}
PLACE = {word: place for place, words in PLACE_WORDS.items() for word in words.split()}
RELATIONS = {
    "left of": ("left", False),
    "left side of": ("left", False),
    "right of": ("left", True),
    "right side of": ("left", True),
    "above": ("above", False),
    "over": ("above", False),
    "higher than": ("above", False),
    "below": ("above", True),
    "under": ("above", True),
    "beneath": ("above", True),
    "underneath": ("above", True),
    "behind": ("behind", False),
    "farther away than": ("behind", False),
    "in back of": ("behind", False),
    "in front of": ("behind", True),
    "closer to us than": ("behind", True),
    "nearer than": ("behind", True),
}
RELATION = re.compile(r"\b(" + "|".join(sorted(RELATIONS, key=len, reverse=True)) + r")\b")
FINISH = re.compile(
    r"(\w+) with (?:a (?=\w+ (?:finish|surface)))?(matte|dull|glossy|polished|stripes|bands|dots|spots)\b"
)
NUMBERS = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4}


def scene_and_words(split, number):
    for_scene, for_words = np.random.default_rng([7, number]).spawn(2)
    scene = invent(for_scene, split)
    return scene, describe(scene, for_words)


def mentions(text):
    """What a caption says of each object that it mentions."""
    found, told, count = [], set(), 1
    for word in re.findall(r"[a-z-]+", FINISH.sub(r"\2 \1", text)):
        if word in NUMBERS:
            told, count = set(), NUMBERS[word]
        singular = "box" if word == "boxes" else word.removesuffix("s")
        meaning = MEANING.get(word, MEANING.get(singular))
        if meaning:
            told = told | {meaning}
        if meaning in SHAPES:
            found += [told] * count
            told, count = set(), 1
    return found


def place_of(text):
    places = {PLACE[word] for word in re.findall(r"[a-z]+", text) if word in PLACE}
    assert len(places) <= 1
    return places.pop() if places else None


def attributes(scene):
    return [{thing.shape, thing.colour, thing.material, thing.size} for thing in scene.things]


def fits(told, place, scene):
    """Whether what a caption mentions, and its place, are in a scene: each mention is another object."""
    return place in (None, scene.place) and any(
        all(one <= thing for one, thing in zip(told, chosen, strict=True))
        for chosen in permutations(attributes(scene), len(told))
    )


def holds(relation, a, b):
    """Whether two placed objects stand so in the picture."""
    if relation == "left":
        return b.x - a.x > 0.8 * (a.radius + b.radius)
    if relation == "above":
        over = a.y - a.solid.low * a.radius < b.y - b.solid.top * b.radius
        return a.hangs and over and abs(a.x - b.x) < 0.3 * (a.radius + b.radius)
    return b.floor - a.floor > 40 and abs(a.x - b.x) < 1.5 * (a.radius + b.radius)


def test_captions_are_true():
    for number in range(400):
        scene, captions = scene_and_words("train", number)
        assert len(captions) == 5
        for caption in captions:
            assert mentions(caption), caption
            assert fits(mentions(caption), place_of(caption), scene), (caption, scene)


def test_relations_in_captions_are_those_of_the_picture():
    seen = set()
    for number in range(150):
        scene, captions = scene_and_words("test", number)
        placed = pictures._arrange(scene, np.random.default_rng(number))
        for caption in captions:
            text = FINISH.sub(r"\2 \1", caption)
            match = RELATION.search(text)
            if match is None:
                continue
            before, after = mentions(text[: match.start()]), mentions(text[match.end() :])
            subject, other = (before[-1], after[0]) if before else (after[1], after[0])
            relation, inverse = RELATIONS[match[1]]
            if inverse:
                subject, other = other, subject
            seen.add(match[1])
            assert any(
                subject <= {a.thing.shape, a.thing.colour, a.thing.material, a.thing.size}
                and other <= {b.thing.shape, b.thing.colour, b.thing.material, b.thing.size}
                and holds(relation, a, b)
                for a, b in permutations(placed, 2)
            ), (caption, scene)
    assert seen == set(RELATIONS)


def test_every_word_is_used_and_numbers_count():
    captions = [caption for number in range(400) for caption in scene_and_words("test", number)[1]]
    words = set(re.findall(r"[a-z-]+", " ".join(captions)))
    assert words >= MEANING.keys() | PLACE.keys() | {"two", "three", "four", "boxes"}


def test_captions_mostly_tell_their_picture_from_100_others():
    scenes_and_words = [scene_and_words("val", number) for number in range(101)]
    told = [(mentions(caption), place_of(caption)) for _, captions in scenes_and_words for caption in captions]
    found = [sum(fits(*one, scene) for scene, _ in scenes_and_words) for one in told]
    assert np.mean([count == 1 for count in found]) > 0.9


def test_counted_objects():
    ball = Thing("sphere", "red", "matte", "small")
    scene = Scene(tuple(Column((thing,), "alone") for thing in (ball, ball, ball)), "snow")
    for number in range(20):
        for caption in describe(scene, np.random.default_rng(number)):
            assert re.search(r"three (\S+ )*(balls|spheres|globes|orbs)", caption), caption


def test_only_what_counted_objects_share_is_told():
    a, b = Thing("cube", "red", "matte", "small"), Thing("cube", "red", "shiny", "large")
    scene = Scene((Column((a,), "alone"), Column((b,), "alone")), "snow")
    captions = [caption for number in range(40) for caption in describe(scene, np.random.default_rng(number))]
    together = [caption for caption in captions if re.search(r"two (\S+ )*(cubes|blocks|boxes)", caption)]
    apart = [caption for caption in captions if caption not in together]
    assert together
    assert apart
    for caption in together:
        assert mentions(caption)[-1] <= {"cube", "red"}


def test_relations_of_a_hand_written_scene():
    a, b = Thing("cube", "red", "matte", "small"), Thing("star", "blue", "shiny", "large")
    c, d = Thing("cube", "pink", "dotted", "small"), Thing("cube", "red", "striped", "large")
    scene = Scene((Column((a, b), "above"), Column((c, d), "behind")), "night")
    assert relations(scene) == [
        (b, "above", a),
        (d, "behind", c),
        (a, "left", c),
        (b, "left", c),
        (b, "left", d),
    ]  # not (a, "left", d): both are red cubes
    assert scene.things == (a, b, c, d)


def test_held_out_combinations():
    unseen = [(colour, shape) for colour in COLOURS for shape in SHAPES if held_out(colour, shape)]
    assert len(unseen) == 16
    assert all([colour for colour, _ in unseen].count(colour) == 2 for colour in COLOURS)
    assert all([shape for _, shape in unseen].count(shape) == 2 for shape in SHAPES)
    shown = {}
    for split in SPLITS:
        invented = [invent(np.random.default_rng([8, number]), split) for number in range(600)]
        looks = [[(thing.colour, thing.shape) for thing in scene.things] for scene in invented]
        shown[split] = {look for scene in looks for look in scene}
        assert all(any(held_out(*look) for look in scene) == (split == "test") for scene in looks)
        assert {len(scene) for scene in looks} == {1, 2, 3, 4}
        assert {scene.place for scene in invented} == set(PLACES)
        assert {thing.material for scene in invented for thing in scene.things} == set(MATERIALS)
        assert {thing.size for scene in invented for thing in scene.things} == set(SIZES)
        assert {column.order for scene in invented for column in scene.columns} == {"alone", "above", "behind"}
    assert len(shown["train"]) == len(shown["val"]) == 48
    assert len(shown["test"]) == 64


def alone(shape="cube", colour="red", material="matte", size="large", place="studio"):
    return Scene((Column((Thing(shape, colour, material, size),), "alone"),), place)


def sprite(shape, colour="red", material="matte"):
    """(160, 160, 4) pixels."""
    thing = Thing(shape, colour, material, "large")
    return np.asarray(pictures._sprite(thing, 0.35, 1.0), np.float64)


HUES = {"red": 0, "orange": 28, "yellow": 50, "green": 130, "blue": 222, "purple": 278, "pink": 335}  # degrees


@pytest.mark.parametrize("material", MATERIALS)
@pytest.mark.parametrize("colour", COLOURS)
def test_objects_have_their_colour(colour, material):
    for shape in SHAPES:
        pixels = pictures._sprite(Thing(shape, colour, material, "large"), 0.35, 1.0)
        hsv = np.asarray(pixels.convert("RGB").convert("HSV"), np.float64)[np.asarray(pixels)[..., 3] > 0]
        coloured = hsv[hsv[:, 1] > 70]
        if colour == "white":
            assert len(coloured) < 0.02 * len(hsv)
        else:
            assert len(coloured) > 0.4 * len(hsv)  # the rest is pattern or highlight
            away = {name: abs((coloured[:, 0] * 360 / 255 - hue + 180) % 360 - 180) for name, hue in HUES.items()}
            nearest = np.array(list(away))[np.argmin(list(away.values()), axis=0)]
            assert np.mean(nearest == colour) > 0.85


@pytest.mark.parametrize("shape", SHAPES)
def test_materials_look_different(shape):
    looks = [sprite(shape, material=material) for material in MATERIALS]
    visible = looks[0][..., 3] > 0
    for i, one in enumerate(looks):
        for other in looks[i + 1 :]:
            assert np.abs(one - other)[visible][:, :3].mean() > 10


def test_shapes_look_different():
    masks = [sprite(shape)[..., 3] > 0 for shape in SHAPES]
    for i, one in enumerate(masks):
        for other in masks[i + 1 :]:
            assert (one & other).sum() / (one | other).sum() < 0.9


def test_places_and_sizes_look_different():
    empty = [np.asarray(pictures.backdrop(place, 0, 64), np.float64) for place in PLACES]
    for i, one in enumerate(empty):
        for other in empty[i + 1 :]:
            assert np.abs(one - other).mean() > 8
    small, large = (
        pictures._arrange(alone(size=size), np.random.default_rng(0))[0].radius for size in ("small", "large")
    )
    assert large > 1.5 * small


def test_every_object_can_be_seen():
    for number in range(120):
        scene = invent(np.random.default_rng([9, number]), "train")
        covered = np.zeros((448, 448), bool)
        for one in reversed(pictures._arrange(scene, np.random.default_rng(number))):
            side = round(2.5 * one.radius)
            mask = np.zeros(160 * 160, np.uint8)
            mask[one.solid.pixels] = 255
            canvas = Image.new("L", (448, 448))
            stamp = Image.fromarray(mask.reshape(160, 160)).resize((side, side))
            canvas.paste(stamp, (round(one.x - side / 2), round(one.y - side / 2)))
            shape = np.asarray(canvas) > 127
            whole = (np.asarray(stamp) > 127).sum()
            assert (shape & ~covered).sum() > 0.4 * whole, (number, scene)
            assert shape.sum() > 0.97 * whole, (number, scene)
            covered |= shape


def test_picture_is_made_of_place_and_object():
    with_object = pictures.draw(alone(), np.random.default_rng(3))
    assert (with_object.size, with_object.mode) == ((224, 224), "RGB")
    pixels = np.asarray(with_object, np.float64)
    red = (pixels[..., 0] > 80) & (pixels[..., 0] > 2.5 * pixels[..., 1:].max(-1))
    rows, columns = np.nonzero(red)
    assert 40 < np.ptp(rows) < 112
    assert 40 < np.ptp(columns) < 112
    assert red.sum() > 0.5 * np.ptp(rows) * np.ptp(columns)


def test_a_string_holds_what_hangs():
    column = Column((Thing("cube", "red", "matte", "small"), Thing("sphere", "red", "matte", "small")), "above")
    rng = np.random.default_rng(0)
    pixels = np.asarray(pictures.draw(Scene((column,), "snow"), rng), np.float64)
    (string,) = (pixels[4:20].mean(-1).max(1).min() - pixels[4:20].mean(-1).min(1).max(),)
    assert string > 20  # some column is darker than the sky in every row


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    render(SMALL, folder)
    return folder


def test_samples(rendered):
    samples = list(read_scenes(rendered, SMALL))
    assert [(sample.image_id, sample.split) for sample in samples] == [
        ("train-000000", "train"),
        ("train-000001", "train"),
        ("train-000002", "train"),
        ("val-000000", "val"),
        ("val-000001", "val"),
        ("test-000000", "test"),
        ("test-000001", "test"),
    ]
    for sample in samples:
        assert len(sample.captions) == 5
        picture = Image.open(io.BytesIO(sample.read()))
        assert (picture.format, picture.size) == ("JPEG", (224, 224))
    assert len({sample.read() for sample in samples}) == 7


def test_rendering_again_gives_the_same_bytes(rendered, tmp_path):
    render(SMALL, tmp_path)
    assert files(tmp_path) == files(rendered)


def test_pictures_do_not_depend_on_how_many_there_are(rendered, tmp_path):
    few = {sample.image_id: sample for sample in read_scenes(rendered, SMALL)}
    (one,) = read_scenes(tmp_path, ScenesConfig(train=0, val=1, test=0))
    assert (one.read(), one.captions) == (few["val-000000"].read(), few["val-000000"].captions)


def test_another_seed_lies_beside(rendered):
    before = files(rendered)
    config = ScenesConfig(train=1, val=0, test=0, seed=5)
    (other,) = read_scenes(rendered, config)
    assert other.read() != next(read_scenes(rendered, SMALL)).read()
    assert before.items() < files(rendered).items()
    assert len(list(rendered.iterdir())) == 2


def test_what_is_there_is_not_rendered_again(rendered, monkeypatch):
    monkeypatch.setattr(scenes, "draw", None)
    before = {path: path.stat().st_mtime_ns for path in rendered.rglob("*")}
    render(SMALL, rendered)
    assert {path: path.stat().st_mtime_ns for path in rendered.rglob("*")} == before


def test_an_interrupted_rendering_leaves_nothing(tmp_path, monkeypatch):
    def fail(scene, rng):
        raise KeyboardInterrupt

    monkeypatch.setattr(scenes, "draw", fail)
    with pytest.raises(KeyboardInterrupt):
        render(SMALL, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("finished", [True, False])
def test_another_process_was_faster(tmp_path, monkeypatch, finished):
    config = ScenesConfig(train=1, val=0, test=0)
    draw = scenes.draw

    def draw_late(scene, rng):
        monkeypatch.setattr(scenes, "draw", draw)
        render(config, tmp_path)
        if not finished:
            next(tmp_path.glob("*/manifest.json")).unlink()
        return draw(scene, rng)

    monkeypatch.setattr(scenes, "draw", draw_late)
    if finished:
        render(config, tmp_path)
    else:
        with pytest.raises(OSError, match="not empty"):
            render(config, tmp_path)
    (left,) = tmp_path.iterdir()
    assert (left / "captions.jsonl").is_file()


def test_the_table_is_one_that_users_could_write(rendered, tmp_path):
    render(SMALL, tmp_path)
    (folder,) = tmp_path.iterdir()
    rows = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    assert rows[0].keys() == {"id", "image", "caption", "split"}
    assert rows[0]["image"] == "images/train-000000.jpg"


def test_a_folder_without_its_manifest(tmp_path):
    config = ScenesConfig(train=1, val=0, test=0)
    render(config, tmp_path)
    (folder,) = tmp_path.iterdir()
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"manifest\.json is missing, so the folder was changed; remove it to render"):
        render(config, tmp_path)


def test_negative_seed(tmp_path):
    with pytest.raises(DataError, match=r"--data\.scenes\.seed -1: expected 0 or more"):
        render(ScenesConfig(seed=-1), tmp_path)


def test_pick_takes_every_option():
    rng = np.random.default_rng(0)
    assert {pick(rng, ("a", "b", "c")) for _ in range(60)} == {"a", "b", "c"}
