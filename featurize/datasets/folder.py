"""A folder of images, each with its captions in a text file of the same name."""

import os
from collections.abc import Iterator
from pathlib import Path

from featurize.datasets.sample import IMAGE_SUFFIXES, SPLIT_NAMES, DataError, Sample, caption_lines, open_text


def read_folder(root: Path) -> Iterator[Sample]:
    """Samples sorted by path; `a/b.jpg` has its captions in `a/b.txt`, one a line.

    The image id is the path below `root` without its extension. A sub-folder of `root` whose name is in
    `SPLIT_NAMES` (train, val, valid, validation, dev, test, ...) is that split; elsewhere the split is "".
    Hidden files and folders and linked folders are passed over, and so are text files without an image.

    Raises:
        DataError: two images differ by their extension only, so one text file would describe both.
    """
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        inside = Path(folder).relative_to(root)
        split = SPLIT_NAMES.get(inside.parts[0].lower(), "") if inside.parts else ""
        images: dict[str, str] = {}
        for name in sorted(names):
            stem, suffix = os.path.splitext(name)  # noqa: PTH122 - Path is slow on a million names
            if suffix.lower() not in IMAGE_SUFFIXES or name.startswith("."):
                continue
            if stem in images:
                raise DataError(f"{folder}: duplicate image id {stem!r}: {images[stem]!r} and {name!r}; rename one")
            images[stem] = name
        texts = set(names)
        for stem, name in images.items():
            captions: tuple[str, ...] = ()
            if f"{stem}.txt" in texts:
                with open_text(Path(folder, f"{stem}.txt")) as file:
                    captions = caption_lines(file)
            yield Sample(image_id=(inside / stem).as_posix(), image=f"{folder}/{name}", captions=captions, split=split)
