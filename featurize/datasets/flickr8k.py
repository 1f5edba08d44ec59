"""The official Flickr8K files, as Hodosh, Young & Hockenmaier (JAIR 47, 2013) published them."""

from collections.abc import Iterator
from pathlib import PurePosixPath

from featurize.datasets.sample import DataError, Sample, image_pattern, open_text
from featurize.places import Place, prefix

CAPTIONS_FILE = "Flickr8k.token.txt"

_SPLIT_FILES = {
    "train": "Flickr_8k.trainImages.txt",
    "val": "Flickr_8k.devImages.txt",
    "test": "Flickr_8k.testImages.txt",
}

_PLACES = ("Flicker8k_Dataset/{name}", "Flickr8k_Dataset/{name}", "images/{name}", "{name}")


def read_flickr8k(root: Place) -> Iterator[Sample]:
    """Samples in the order of the token file; the image id is the file name without its extension.

    A split file that is absent leaves its split out. Images of the token file that stand in no split file are
    left out: the real data set has 92 of them. An image that stands in a split file only has no captions, and
    comes last.

    Args:
        root: folder with Flickr8k.token.txt (lines `name#k<TAB>caption`), the split files and the images.

    Raises:
        DataError: a file is missing, a line has another form, two splits share an image, or no image is
            there.
    """
    splits = _splits(root)
    captions: dict[str, list[str]] = {}
    path = root / CAPTIONS_FILE
    if not path.is_file():
        raise DataError(f"{root}: expected the captions in {CAPTIONS_FILE}, which is not there")
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            key, tab, caption = line.partition("\t")
            name, hash_, _ = key.rpartition("#")
            if not (tab and hash_):
                raise DataError(f"{path}, line {number}: expected name#k<TAB>caption, found {line.strip()!r}")
            if name in splits:
                captions.setdefault(name, []).append(caption.strip())
    names = [*captions, *(name for name in splits if name not in captions)]
    pattern = image_pattern(root, _PLACES, ({"name": name} for name in names))
    for name in names:
        yield Sample(
            image_id=PurePosixPath(name).stem,
            image=f"{prefix(root)}/{pattern.format(name=name)}",
            captions=tuple(captions.get(name, ())),
            split=splits[name],
        )


def _splits(root: Place) -> dict[str, str]:
    """The split of each image name, from the split files that are there."""
    splits: dict[str, str] = {}
    present = {split: root / name for split, name in _SPLIT_FILES.items() if (root / name).is_file()}
    if not present:
        raise DataError(f"{root}: expected a split file or more ({', '.join(_SPLIT_FILES.values())}), found none")
    for split, path in present.items():
        with open_text(path) as file:
            for number, line in enumerate(file, start=1):
                name = line.strip()
                if name and splits.setdefault(name, split) != split:
                    raise DataError(
                        f"{path}, line {number}: {name!r} also stands in {_SPLIT_FILES[splits[name]]}; "
                        "an image belongs to one split"
                    )
    return splits
