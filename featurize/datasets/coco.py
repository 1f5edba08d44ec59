"""The official COCO caption files (captions_train2014.json, captions_val2017.json, ...)."""

from collections.abc import Iterator

from featurize.datasets.sample import DataError, Sample, image_pattern, read_json, required, split_in
from featurize.places import Place, found, prefix

_PLACES = ("{part}/{name}", "images/{part}/{name}", "images/{name}", "{name}")


def read_coco(root: Place) -> Iterator[Sample]:
    """Samples file by file, in the order of `images`; captions in the order of `annotations`.

    The image id is COCO's own number. The split is the word train, val or test in the JSON's name.

    Args:
        root: a captions_*.json, or a folder that holds some, itself or else in annotations/. The images of
            captions_train2014.json are looked for once: in train2014/, images/train2014/, images/ and the
            folder.

    Raises:
        DataError: there is no such file, it has another form, or none of its images is found.
    """
    paths = [root] if root.is_file() else found(root, "captions_*.json")
    paths = paths or found(root, "annotations/captions_*.json")
    if not paths:
        raise DataError(f"{root}: expected captions_*.json here or in annotations/, found none")
    for path in paths:
        yield from _read_file(path)


def _read_file(path: Place) -> Iterator[Sample]:
    root = path.parent.parent if path.parent.name == "annotations" else path.parent
    part = path.stem.removeprefix("captions_")
    content = read_json(path)
    images = required(content, "images", list, str(path))
    captions: dict[int | str, list[str]] = {}
    names = []
    for row, image in enumerate(images):
        place = f"{path}, images[{row}]"
        captions[required(image, "id", (int, str), place)] = []
        names.append({"name": required(image, "file_name", str, place), "part": part})
    for row, annotation in enumerate(required(content, "annotations", list, str(path))):
        place = f"{path}, annotations[{row}]"
        image_id = required(annotation, "image_id", (int, str), place)
        if image_id not in captions:
            raise DataError(f"{place}: image_id {image_id!r} is not among the file's images")
        captions[image_id].append(required(annotation, "caption", str, place).strip())
    pattern = image_pattern(root, _PLACES, names)
    split = split_in(path.stem)
    for image, name in zip(images, names, strict=True):
        yield Sample(
            image_id=str(image["id"]),
            image=f"{prefix(root)}/{pattern.format(**name)}",
            captions=tuple(captions[image["id"]]),
            split=split,
        )
