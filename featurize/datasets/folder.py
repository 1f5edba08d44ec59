"""A folder of images, each with its captions in a text file of the same name."""

import io
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath

from featurize.datasets.sample import (
    IMAGE_SUFFIXES,
    SPLIT_NAMES,
    UNREAD_SUFFIXES,
    Sample,
    caption_lines,
    open_text,
    unread,
)
from featurize.places import Place, prefix


def read_folder(root: Place) -> Iterator[Sample]:
    """Samples sorted by path; `a/b.jpg` has its captions in `a/b.txt`, one a line.

    The image id is the path below `root` without its extension. A sub-folder of `root` whose name is in
    `SPLIT_NAMES` (train, val, valid, validation, dev, test, ...) is that split; elsewhere the split is "".
    Hidden files and folders and linked folders are passed over, and so are text files without an image. Of two images
    that differ by their extension only, so that one text file would describe both, the second one has a problem. So has
    an image of a kind that is not read (`UNREAD_SUFFIXES`), where it has a text file and no other image has its name.
    """
    for inside, names in _walk(root):
        folder = prefix(root / inside) if inside.parts else prefix(root)
        split = SPLIT_NAMES.get(inside.parts[0].lower(), "") if inside.parts else ""
        images: dict[str, list[str]] = {}
        strange: list[tuple[str, str]] = []
        for name in names:
            stem, suffix = os.path.splitext(name)  # noqa: PTH122 - Path is slow on a million names
            if name.startswith("."):
                continue
            if suffix.lower() in IMAGE_SUFFIXES:
                images.setdefault(stem, []).append(name)
            elif suffix.lower() in UNREAD_SUFFIXES:
                strange.append((stem, name))
        texts = set(names)
        captions = _captions(root, inside, [stem for stem in images if f"{stem}.txt" in texts])
        for stem, (first, *others) in images.items():
            told = next(captions) if f"{stem}.txt" in texts else ()
            sample = Sample(image_id=(inside / stem).as_posix(), image=f"{folder}/{first}", captions=told, split=split)
            yield sample
            for name in others:
                problem = f"duplicate image id: {first!r} has it, {name!r} has it too; rename one"
                yield replace(sample, image=f"{folder}/{name}", problem=problem)
        for stem, name in strange:
            if stem not in images and f"{stem}.txt" in texts:
                yield Sample((inside / stem).as_posix(), f"{folder}/{name}", (), split, problem=unread(name))


def _walk(root: Place) -> Iterator[tuple[PurePosixPath, list[str]]]:
    """Each folder, as a path below the root, with the sorted names of its files; a folder before those inside it."""
    if isinstance(root, Path):
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            yield PurePosixPath(Path(folder).relative_to(root)), sorted(names)
        return
    tree: dict[PurePosixPath, list[str]] = {}
    for path in root.fs.find(root.path):
        inside = PurePosixPath(path.removeprefix(root.path).lstrip("/"))
        if not any(part.startswith(".") for part in inside.parts[:-1]):
            tree.setdefault(inside.parent, []).append(inside.name)
    for inside in sorted(tree, key=lambda path: path.parts):
        yield inside, sorted(tree[inside])


def _captions(root: Place, inside: PurePosixPath, stems: list[str]) -> Iterator[tuple[str, ...]]:
    """The captions in text files of one folder; a store is asked for many at once."""
    if isinstance(root, Path):
        for stem in stems:
            with open_text(root / inside / f"{stem}.txt") as file:
                yield caption_lines(file)
        return
    base = root / inside if inside.parts else root
    for start in range(0, len(stems), 256):
        paths = [f"{base.path.rstrip('/')}/{stem}.txt" for stem in stems[start : start + 256]]
        texts = root.fs.cat(paths)
        texts = texts if isinstance(texts, dict) else dict.fromkeys(paths, texts)
        for path in paths:
            text = texts[path].decode("utf-8-sig", errors="surrogateescape")
            lines: Iterable[str] = io.StringIO(text, newline="")
            yield caption_lines(lines)
