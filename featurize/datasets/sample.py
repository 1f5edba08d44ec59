"""What all sources share: the record they yield, the error they raise, how they open text and find images."""

import json
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import IO, Any, TextIO

from featurize.places import Place, answering, file_at

IMAGE_SUFFIXES = frozenset(
    {
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".avif", ".webp"),
        *(".png", ".apng", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".tga"),
    }
)
"""What names of images end in, in small letters; PIL reads each."""

UNREAD_SUFFIXES = frozenset(
    {
        *(".heic", ".heif", ".hif", ".avifs", ".jxl", ".jxr", ".j2c", ".j2k", ".jpc", ".jpf", ".jpx", ".mpo"),
        *(".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dng", ".erf", ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw"),
        *(".rw2", ".sr2", ".srw", ".x3f", ".svg", ".svgz", ".psd", ".psb", ".xcf", ".eps", ".wmf", ".emf", ".exr"),
        *(".cur", ".dds", ".dib", ".icns", ".ico", ".pbm", ".pcx", ".pfm", ".pnm", ".qoi", ".ras", ".sgi", ".xbm"),
        ".xpm",
    }
)
"""What names of images end in that are not read: such a file with captions is a sample with a problem."""

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
"""Words that folders and files use for a split, and the split's name here."""

_WORD = re.compile("[a-z]+")


class DataError(ValueError):
    """The data is not what its source promises: the message says what was found, expected, and what to do."""


@dataclass(frozen=True)
class Sample:
    """One image with its captions, as a source names it. Nothing is decoded yet.

    Attributes:
        image_id: unique within the data set; any text, never used as a path.
        image: path or URI of the file that holds the image; a URI has "://" in it.
        captions: their number may differ from image to image. As the source has them: there may be none, or
            empty ones, or lone surrogates where bytes were not UTF-8; what cannot be used is sorted out later.
        split: "train", "val", "test", or whatever the source says; "" where it names none.
        span: (offset, length) in bytes of the image inside that file (a tar member); None: the whole file.
        problem: why it cannot be used, as its source sees it: it will be quarantined; "" where nothing is wrong.
    """

    image_id: str
    image: str
    captions: tuple[str, ...]
    split: str
    span: tuple[int, int] | None = None
    problem: str = ""

    def read(self) -> bytes:
        """The encoded image (JPEG, PNG, ...).

        Raises:
            OSError: the file is missing, a folder, pipe or device, or shorter than its span says; or its store does
                not answer.
        """
        data = self._bytes()
        if self.span is not None and len(data) != self.span[1]:
            offset, length = self.span
            raise OSError(
                f"{self.image}: expected {length} bytes at offset {offset}, found {len(data)}; "
                "the file changed after it was indexed"
            )
        return data

    def _bytes(self) -> bytes:
        start, end = (self.span[0], sum(self.span)) if self.span else (None, None)
        if "://" in self.image:  # fsspec reads more than that into a name ("a::b" is a chain), so it gets URIs only
            with answering(self.image, OSError):
                store, path = file_at(self.image)
                return bytes(store.cat_file(path, start=start, end=end))
        with _open_regular(Path(self.image)) as file:
            file.seek(start or 0)
            return file.read(-1 if end is None or start is None else end - start)


def _open_regular(path: Path) -> IO[bytes]:
    """A file, but no pipe, whose writer may never come, and no device, which may never end."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise OSError(f"{path}: not a file but a {'folder' if stat.S_ISDIR(mode) else 'pipe, socket or device'}")
    return path.open("rb")


def open_text(path: Place) -> TextIO:
    """A text file as all sources open it: a byte order mark is dropped, bytes that are not UTF-8 are kept.

    Line ends stay as they are (the csv module wants that), so a line is stripped where it is used.
    """
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")


def read_json(path: Place) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        DataError: the file is not JSON, or its top level is not an object.
    """
    with open_text(path) as file:
        try:
            content = json.load(file)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}: not valid JSON at line {error.lineno}, column {error.colno} ({error.msg}); "
                "the download may be incomplete"
            ) from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a JSON object at the top level, found {type(content).__name__}")
    return content


def required(record: Any, name: str, kind: type | tuple[type, ...], place: str) -> Any:
    """`record[name]`, checked.

    Raises:
        DataError: `record` is not an object, lacks `name`, or holds something that is not of `kind`.
    """
    if not isinstance(record, dict):
        raise DataError(f"{place}: expected an object with {name!r}, found {_short(record)}")
    if name not in record:
        raise DataError(f"{place}: no {name!r}; found {', '.join(map(repr, record)) or 'nothing'}")
    value = record[name]
    if not isinstance(value, kind):
        names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise DataError(f"{place}: {name!r} is {_short(value)}, expected {names}")
    return value


def _short(value: Any) -> str:
    """A value as an error message shows it: at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def caption_lines(lines: Iterable[str]) -> tuple[str, ...]:
    """One caption a line; blank lines at the end are no captions, blank lines before it are empty ones."""
    captions = [line.strip() for line in lines]
    while captions and not captions[-1]:
        captions.pop()
    return tuple(captions)


def unread(name: str) -> str:
    """The problem of a captioned image whose suffix is one of `UNREAD_SUFFIXES`."""
    return (
        f"{name!r} is an image of a kind that is not read; expected one of {', '.join(sorted(IMAGE_SUFFIXES))}. "
        "Convert it to one of them"
    )


def split_in(name: str) -> str:
    """The one split whose word is in a file's name ("captions_train2014", "flickr-val-0001"), else ""."""
    found = {SPLIT_NAMES[word] for word in _WORD.findall(name.lower()) if word in SPLIT_NAMES}
    return found.pop() if len(found) == 1 else ""


def image_pattern(root: Place, patterns: Sequence[str], images: Iterable[Mapping[str, str]]) -> str:
    """Which of several customary places under `root` holds the images; looks for the first 20 images only.

    Args:
        root: the folder of the data set.
        patterns: paths below `root` such as "images/{name}", in order of preference.
        images: for each image the values of the names in braces.

    Returns:
        The first pattern under which one of the images exists.

    Raises:
        DataError: none of them is in any place.
    """
    some = list(islice(images, 20))
    for pattern in patterns:
        if any((root / pattern.format(**image)).is_file() for image in some):
            return pattern
    if not some:
        return patterns[0]
    looked = ", ".join(repr(pattern.format(**some[0])) for pattern in patterns)
    raise DataError(f"{root}: no image found; looked for {looked}. Put the images in one of these places")


def nearest(name: str, names: Iterable[str]) -> str:
    """' (did you mean ...?)' with the name that is spelled most like `name`; '' where none is close."""
    close = get_close_matches(name.lower(), list(names), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
