"""The process that decodes images for `featurize.images.decoder`, so that a damaged one harms nothing else.

It imports PIL and no torch, so it starts in a tenth of a second. Standard input is a socket to the parent; the first
argument is the descriptor of the window, a piece of memory that both see; the second the parent's timeout in seconds.

    child     READY, once it can take images
    parent    length (8 bytes), the encoded image
    child     ERROR, length, 0, the reason; or PIXELS, width, height and then, for one box after the other, READY as
              soon as the box's pixels are in the window: row by row, 4 bytes each, the last one without meaning
    parent    TAKEN after every box but the last

RGB pixels in four bytes are copied as PIL keeps them; packing them to three takes longer than handing them over.
"""

import math
import mmap
import resource
import signal
import struct
import sys
from collections.abc import Iterator
from typing import IO

from PIL import Image, ImageFile

from featurize.images.decode import DecodeError, decode

READY, TAKEN, ERROR, PIXELS = b"r", b"t", b"e", b"p"
LENGTH = struct.Struct("<Q")
ANSWER = struct.Struct("<cII")
PIXEL_BYTES = 4

WINDOW_BYTES = 4 * 1024**2
"""A million pixels: most photographs are handed over in one box, and no picture makes the window larger."""

MEMORY_BYTES = 4 * 1024**3
"""Of address space: twice what the greediest kind of image needs at `decode.MAX_PIXELS`."""

_GRACE = 5  # seconds that the parent gets to end a child whose time is up, before the child does it


def boxes(width: int, height: int) -> Iterator[tuple[int, int, int, int]]:
    """The parts of an image that fit the window, in order: left, top, right, bottom in pixels."""
    columns = min(width, WINDOW_BYTES // PIXEL_BYTES)
    rows = min(height, WINDOW_BYTES // PIXEL_BYTES // columns)
    for top in range(0, height, rows):
        for left in range(0, width, columns):
            yield left, top, min(left + columns, width), min(top + rows, height)


def main() -> None:
    """Answers requests until the parent closes the socket, which its death does too."""
    descriptor, timeout = int(sys.argv[1]), float(sys.argv[2])
    _limit()
    # The socket stays open to the very end, so that the parent finds the exit status as soon as it sees it closed.
    with open(0, "rb", closefd=False) as requests, open(0, "wb", closefd=False) as answers:
        window = mmap.mmap(descriptor, WINDOW_BYTES)
        answers.write(READY)
        answers.flush()
        while length := requests.read(LENGTH.size):
            # A decoder that hangs does not see that the socket is closed. (PR_SET_PDEATHSIG would not do: it follows
            # the thread that started the child, and threads that prepare images end with their shard.)
            signal.alarm(math.ceil(timeout) + _GRACE)
            _answer(requests.read(*LENGTH.unpack(length)), window, requests, answers)
            signal.alarm(0)


def _limit() -> None:
    """Bounds what this process can do to the machine."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # without a parent there is nobody to tell
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    allowed = MEMORY_BYTES if most == resource.RLIM_INFINITY else min(MEMORY_BYTES, most)
    resource.setrlimit(resource.RLIMIT_AS, (allowed, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a thousand bad pictures would leave a thousand core files


def _answer(data: bytes, window: mmap.mmap, requests: IO[bytes], answers: IO[bytes]) -> None:
    try:
        image = decode(data)
    except DecodeError as error:
        reason = str(error).encode("utf-8", "backslashreplace")
        answers.write(ANSWER.pack(ERROR, len(reason), 0) + reason)
        answers.flush()
        return
    answers.write(ANSWER.pack(PIXELS, *image.size))
    whole = (0, 0, *image.size)
    for number, box in enumerate(boxes(*image.size)):
        if number:
            requests.read(len(TAKEN))
        _show(image if box == whole else image.crop(box), window)
        answers.write(READY)
        answers.flush()


def _show(image: Image.Image, window: mmap.mmap) -> None:
    """Writes the pixels as PIL's own plugins do: `tobytes` would copy them twice more."""
    window.seek(0)
    ImageFile._save(image, window, [ImageFile._Tile("raw", (0, 0, *image.size), 0, "RGBX")])  # type: ignore[arg-type]  # noqa: SLF001


if __name__ == "__main__":
    main()
