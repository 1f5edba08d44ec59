"""Which rows of a file belong to which rows of the data set: by id or by position, never by guess."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from featurize.datasets.sample import IMAGE_SUFFIXES, DataError, Sample
from featurize.imports.source import ById, InOrder, Modality, Part

Place = tuple[int, ...]
"""The rows of the file that hold a row of the data set: usually one, several equal ones, or none."""

_COCO = re.compile(r"(?:COCO_[a-z]+\d{4}_)?0*(\d+)")
_LETTERS = re.compile(r"[^\W_]+")
_SHOWN = 3


def locate(
    keys: ById | InOrder, samples: Sequence[Sample], incomplete: frozenset[str], modality: Modality, path: Path
) -> list[Place]:
    """For each image or caption of the data set the file's rows that describe it.

    Images are matched by their id; or else by its file name without folder and extension; or else by COCO's number (42
    in COCO_val2014_000000000042.jpg). The first of the three that any image is found by holds for all, and it is
    refused where it names two things at once. An image that is not in the file has no row; a caption must have one.

    Args:
        keys: what the file says of its rows.
        samples: the data set's images, in order.
        incomplete: ids of images that lost something while indexing, so that positions and numbers moved.
        modality: whether images or captions are looked for.
        path: of the file, for messages.

    Raises:
        DataError: nothing fits, something fits twice, positions cannot be told, or a caption has no row.
    """
    if isinstance(keys, InOrder):
        in_order = _images_in_order if modality == "image" else _captions_in_order
        return in_order(keys.parts, samples, incomplete, path)
    if modality == "image":
        return _images_by_id(_rows_by_id(keys, path), samples, path)
    return _captions_by_id(keys, samples, incomplete, path)


def _rows_by_id(keys: ById, path: Path) -> dict[str, Place]:
    """The rows of each id.

    Raises:
        DataError: an id has two rows in a file where each should have one.
    """
    rows: dict[str, list[int]] = defaultdict(list)
    for row, name in enumerate(keys.ids):
        rows[name].append(row)
    if not keys.repeated and len(rows) < len(keys.ids):
        name, (first, second, *_) = next((name, found) for name, found in rows.items() if len(found) > 1)
        raise DataError(f"{path}: the id {name!r} has two rows, {first} and {second}; expected one row an id")
    return {name: tuple(found) for name, found in rows.items()}


def _file_name(name: str) -> str:
    """The id without folders and an image's extension."""
    last = PurePosixPath(name)
    return last.stem if last.suffix.lower() in IMAGE_SUFFIXES else last.name


def _coco_number(name: str) -> str:
    """COCO's number of an image; "" of what is not called so."""
    found = _COCO.fullmatch(_file_name(name))
    return found[1] if found else ""


_FORMS: Mapping[str, Callable[[str], str]] = {
    "image id": str,
    "file name": _file_name,
    "COCO number": _coco_number,
}


def _images_by_id(rows: Mapping[str, Place], samples: Sequence[Sample], path: Path) -> list[Place]:
    for title, form in _FORMS.items():
        ours = _by_form(form, (sample.image_id for sample in samples))
        theirs = _by_form(form, rows)
        common = [name for name in ours if name in theirs]
        if not common:
            continue
        for names, whose in ((ours, "the data set"), (theirs, str(path))):
            for name in common:
                if len(names[name]) > 1:
                    raise DataError(
                        f"{path}: images are found by their {title} only, and in {whose} {name!r} is "
                        f"{' and '.join(map(repr, names[name][:2]))}; give the rows the data set's own ids"
                    )
        return [rows[theirs[name][0]] if (name := form(s.image_id)) in theirs else () for s in samples]
    raise DataError(
        f"{path}: none of its {len(rows)} ids is an image of the data set, neither as an id nor as a file name or COCO "
        f"number. The file has {_first(rows)}; the data set has {_first(s.image_id for s in samples)}. Give the rows "
        "the data set's ids"
    )


def _by_form(form: Callable[[str], str], names: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        if form(name):
            found[form(name)].append(name)
    return found


def _first(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(map(repr, listed[:_SHOWN])) + (", ..." if len(listed) > _SHOWN else "")


def _captions_by_id(keys: ById, samples: Sequence[Sample], incomplete: frozenset[str], path: Path) -> list[Place]:
    rows: dict[str, dict[str, Place]] = defaultdict(dict)
    if keys.captions is None:
        for name, place in _rows_by_id(keys, path).items():
            image, number = _numbered(name)
            rows[image][number] = place
        changed = [sample.image_id for sample in samples if sample.image_id in incomplete]
        if changed:
            raise DataError(
                f"{path}: captions are told by their numbers, but captions of {_first(changed)} were left out of the "
                "data set, which moved the numbers; mend the captions that quarantine.jsonl lists"
            )
    else:
        for row, (image, caption) in enumerate(zip(keys.ids, keys.captions, strict=True)):
            rows[image].setdefault(caption.strip(), (row,))
    of_images = _images_by_id({image: (place,) for place, image in enumerate(rows)}, samples, path)
    of_captions = list(rows.values())
    places: list[Place] = []
    missing: list[str] = []
    for sample, found in zip(samples, of_images, strict=True):
        own = of_captions[found[0]] if found else {}
        for count, caption in enumerate(sample.captions):
            places.append(own.get(str(count) if keys.captions is None else caption.strip(), ()))
            if not places[-1]:
                missing.append(f"{sample.image_id}#{count}")
    if missing:
        raise DataError(
            f"{path}: {len(missing)} of {len(places)} captions have no row: {_first(missing)}; the file has "
            f"{_first(keys.ids)}. Expected a row for every caption"
        )
    return places


def _numbered(name: str) -> tuple[str, str]:
    """Image id and number of "image#2"; a name without a number is that of caption 0."""
    image, mark, number = name.rpartition("#")
    return (image, number) if mark and number.isdecimal() else (name, "0")


def _captions_in_order(
    parts: Sequence[Part], samples: Sequence[Sample], incomplete: frozenset[str], path: Path
) -> list[Place]:
    rows = sum(part.rows for part in parts)
    count = sum(len(sample.captions) for sample in samples)
    if rows != count or any(part.split for part in parts):
        raise DataError(_uncounted(path, rows, f"{count} captions", incomplete))
    return [(row,) for row in range(rows)]


def _uncounted(path: Path, rows: int, expected: str, incomplete: frozenset[str]) -> str:
    lost = (
        f" {len(incomplete)} images lost captions or were left out while indexing, see quarantine.jsonl."
        if incomplete
        else ""
    )
    return (
        f"{path}: found {rows} rows without ids, expected as many as the data set's {expected}, because such rows are "
        f"told by their position.{lost} Put the ids beside it: ids.txt, one id a line"
    )


def _images_in_order(
    parts: Sequence[Part], samples: Sequence[Sample], incomplete: frozenset[str], path: Path
) -> list[Place]:
    places: list[Place] = [()] * len(samples)
    for split in dict.fromkeys(part.split for part in parts):
        own = [row for row, sample in enumerate(samples) if sample.split == split or not split]
        candidates = [part for part in parts if part.split == split]
        if not own:
            continue
        fitting = [part for part in candidates if part.rows == part.repeats * len(own)]
        if len(fitting) != 1:
            sizes = " and ".join(f"{part.rows // part.repeats} in {part.file.name}" for part in candidates)
            if len(candidates) == 1 and not split:
                raise DataError(_uncounted(path, parts[0].rows, f"{len(own)} images", incomplete))
            lost = f"; {len(incomplete)} images lost captions or were left out" if incomplete else ""
            raise DataError(
                f"{path}: found {sizes}, expected one file with the {len(own)} images of split {split!r}{lost}; rows "
                "of such files are told by their position in the split"
            )
        for row, place in zip(own, _in_part(fitting[0], [samples[row] for row in own]), strict=True):
            places[row] = place
    if not any(places):
        raise DataError(
            f"{path}: found files of the splits {_first(part.split for part in parts)}, expected some of the data "
            f"set's: {_first(sorted({sample.split for sample in samples}))}"
        )
    return places


def _in_part(part: Part, samples: Sequence[Sample]) -> Iterator[Place]:
    """The rows of a part for each image of its split: by id where its ids are just these images', else in order.

    Raises:
        DataError: the file's captions are others than those of the image at that position.
    """
    order: Sequence[int] = range(len(samples))
    if part.ids is not None:
        rows = {name: number for number, name in enumerate(part.ids)}
        for form in (str, _file_name):
            named = {form(name): number for name, number in rows.items()}
            if named.keys() == {form(sample.image_id) for sample in samples}:
                order = [named[form(sample.image_id)] for sample in samples]
                break
    for number, sample in zip(order, samples, strict=True):
        if part.captions is not None:
            _check_captions(part, number, sample)
        first = part.first + number * part.repeats
        yield tuple(range(first, first + part.repeats))


def _check_captions(part: Part, number: int, sample: Sample) -> None:
    """What stands in a row's captions must be among the image's: order is all that says whose a row is."""
    assert part.captions is not None
    theirs = {_letters(caption) for caption in part.captions[number]}
    if theirs.isdisjoint(map(_letters, sample.captions)):
        raise DataError(
            f"{part.file}: row {number} has the caption {part.captions[number][0]!r}, but image {number} of split "
            f"{part.split!r}, {sample.image_id!r}, has {sample.captions[0]!r}; the order is another than the data "
            "set's, and nothing else says whose a row is"
        )


def _letters(caption: str) -> str:
    """A caption without what tokenisers change: case, punctuation, spaces."""
    return "".join(_LETTERS.findall(caption.lower()))
