"""Karpathy's JSON of Flickr8K, Flickr30K and COCO: the splits that published numbers are about.

The files are dataset_flickr8k.json, dataset_flickr30k.json and dataset_coco.json of
Karpathy & Fei-Fei, Deep Visual-Semantic Alignments, CVPR 2015 (caption_datasets.zip).
"""

from collections.abc import Iterator
from pathlib import PurePosixPath

from featurize.datasets.sample import DataError, Sample, image_pattern, read_json, required
from featurize.places import Place, found, prefix

_PLACES = (
    "images/{name}",
    "{name}",
    "{filepath}/{name}",
    "images/{filepath}/{name}",
    "Flicker8k_Dataset/{name}",
    "flickr30k-images/{name}",
)


def read_karpathy(root: Place) -> Iterator[Sample]:
    """Samples in the file's order.

    The image id is COCO's `cocoid` or else the file name without its extension. The split "restval" (COCO
    images of val2014 that every published result trains on) is "train" here, which makes COCO
    113287/5000/5000.

    Args:
        root: the JSON file, or a folder that holds exactly one dataset_*.json. The images are looked for
            once, in the customary folders beside the JSON file.

    Raises:
        DataError: there is not exactly one JSON file, it has another form, or none of its images is found.
    """
    path = _json_file(root)
    root = path.parent
    images = required(read_json(path), "images", list, str(path))
    names = []
    for row, image in enumerate(images):
        place = f"{path}, images[{row}]"
        name = required(image, "filename", str, place)
        filepath = required(image, "filepath", str, place) if "filepath" in image else ""
        names.append({"name": name, "filepath": filepath})
    pattern = image_pattern(root, _PLACES, names)
    for row, (image, named) in enumerate(zip(images, names, strict=True)):
        place = f"{path}, images[{row}]"
        sentences = required(image, "sentences", list, place)
        split = required(image, "split", str, place)
        yield Sample(
            image_id=str(image["cocoid"]) if "cocoid" in image else PurePosixPath(named["name"]).stem,
            image=f"{prefix(root)}/{pattern.format(**named)}",
            captions=tuple(required(s, "raw", str, f"{place}, a sentence").strip() for s in sentences),
            split="train" if split == "restval" else split,
        )


def _json_file(root: Place) -> Place:
    if root.is_file():
        return root
    there = found(root, "dataset_*.json")
    if len(there) != 1:
        names = ", ".join(path.name for path in there) or "none"
        raise DataError(
            f"{root}: expected exactly one dataset_*.json, found {names}; give the file itself as --data.root"
        )
    return there[0]
