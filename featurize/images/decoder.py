"""Keeps an image that hangs or crashes its decoder from costing more than its row.

What happens inside a decoder written in C can be neither interrupted nor caught. So images are decoded where they are
needed, at no cost, under a clock that ends the process (`ends_after`); and where a process has died, the next one
decodes the same images in processes of their own (`Decoder`).
"""

import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from PIL import Image

from featurize.images.decode import DecodeError
from featurize.images.decoder_child import ANSWER, ERROR, LENGTH, PIXEL_BYTES, READY, TAKEN, WINDOW_BYTES, boxes

_COMMAND = (sys.executable, "-P", "-m", "featurize.images.decoder_child")
_SOURCES = Path(__file__).parents[2]
_START_SECONDS = 60.0  # for Python and PIL on a machine that is busy


_lock = threading.Lock()
_deadlines: dict[object, float] = {}


@contextmanager
def ends_after(seconds: float) -> Iterator[None]:
    """Ends this process (by SIGALRM, unless somebody handles it) if the block is not left in time; for any thread.

    The system does it, so no decoder that keeps Python's lock can hold it up, and it costs a few microseconds. An
    alarm that somebody else has set rings when it should, or at the end of the block.
    """
    key = object()
    with _lock:
        other = signal.getitimer(signal.ITIMER_REAL)[0] if not _deadlines else 0.0
        if other:
            _deadlines[ends_after] = time.monotonic() + other
        _deadlines[key] = time.monotonic() + seconds
        _wind()
    try:
        yield
    finally:
        with _lock:
            del _deadlines[key]
            _wind()
            if list(_deadlines) == [ends_after]:
                _deadlines.clear()  # its alarm is set, and is nobody's here


def _wind() -> None:
    left = max(min(_deadlines.values()) - time.monotonic(), 1e-3) if _deadlines else 0.0
    signal.setitimer(signal.ITIMER_REAL, left)


class DecoderError(RuntimeError):
    """The process that decodes images cannot be started: no image is to blame."""


class Decoder:
    """`decode`, in a child process with a time limit and a memory limit; safe to call from threads.

    As many children as threads that decode at once are started, when they are needed, and kept. They end with this
    object and with this process, however it ends.

    Args:
        timeout: seconds that one image may take.
        command: what starts a child; its protocol is `featurize.images.decoder_child`'s.
    """

    def __init__(self, timeout: float, command: Sequence[str] = _COMMAND) -> None:
        self._timeout = timeout
        self._command = command
        self._idle: list[_Child] = []
        weakref.finalize(self, _end_all, self._idle)

    def decode(self, data: bytes) -> Image.Image:
        """Decodes an image to 8-bit RGB: pixel for pixel what `decode` gives.

        Raises:
            DecodeError: as `decode`, or the decoder did not answer in time, or it died.
            DecoderError: no child can be started.
        """
        try:
            child = self._idle.pop()
        except IndexError:
            return self._judge(data)
        try:
            return self._ask(child, data)
        except ConnectionError:  # it may be an earlier image that did this, or a machine short of memory
            return self._judge(data)

    def _judge(self, data: bytes) -> Image.Image:
        """Decodes in a new child, in which only this image can do harm."""
        child = _Child(self._command, self._timeout)
        try:
            return self._ask(child, data)
        except ConnectionError:
            raise DecodeError(f"the decoder died ({child.status})") from None

    def _ask(self, child: "_Child", data: bytes) -> Image.Image:
        try:
            image = child.decode(data)
        except DecodeError:
            self._idle.append(child)
            raise
        except TimeoutError:
            child.end()
            raise DecodeError(f"the decoder did not answer within {self._timeout:g} s") from None
        except BaseException:
            child.end()
            raise
        self._idle.append(child)
        return image


def _end_all(children: "list[_Child]") -> None:
    while children:
        children.pop().end()


class _Child:
    """One process, its socket, and the window through which it shows pixels."""

    def __init__(self, command: Sequence[str], timeout: float) -> None:
        self._timeout = timeout
        self._deadline = time.monotonic() + _START_SECONDS
        self._socket, theirs = socket.socketpair()
        try:
            with theirs, _anonymous_file() as file:
                file.truncate(WINDOW_BYTES)
                self._window = mmap.mmap(file.fileno(), WINDOW_BYTES)
                self._process = subprocess.Popen(  # noqa: S603 - our own module
                    [*command, str(file.fileno()), str(timeout)],
                    stdin=theirs.fileno(),
                    pass_fds=(file.fileno(),),
                    env=_environment(),
                )
        except OSError as error:
            self._socket.close()
            raise DecoderError(f"`{' '.join(command)}`, which decodes images, cannot be started: {error}") from error
        try:
            self._receive(len(READY))
        except OSError:
            self.end()
            raise DecoderError(
                f"`{' '.join(command)}`, which decodes images, ended before it was ready ({self.status}); expected "
                f"it to be so within {_START_SECONDS:g} s. What it printed says what it lacks"
            ) from None

    @property
    def status(self) -> str:
        """How the process ended."""
        code = self._process.returncode
        return f"signal {-code}" if code < 0 else f"exit status {code}"

    def decode(self, data: bytes) -> Image.Image:
        """Asks the process.

        Raises:
            DecodeError: the process says so.
            TimeoutError: it takes too long.
            ConnectionError: it is gone.
        """
        self._deadline = time.monotonic() + self._timeout
        self._send(LENGTH.pack(len(data)))
        self._send(data)
        kind, width, height = ANSWER.unpack(self._receive(ANSWER.size))
        if kind == ERROR:
            raise DecodeError(self._receive(width).decode())
        self._receive(len(READY))
        if width * height * PIXEL_BYTES <= WINDOW_BYTES:
            return self._shown(width, height)
        image = Image.new("RGB", (width, height))
        for number, box in enumerate(boxes(width, height)):
            if number:
                self._send(TAKEN)
                self._receive(len(READY))
            image.paste(self._shown(box[2] - box[0], box[3] - box[1]), box)
        return image

    def end(self) -> None:
        """Ends the process at once."""
        self._process.kill()
        self._process.wait()
        self._socket.close()
        self._window.close()

    def _shown(self, width: int, height: int) -> Image.Image:
        with memoryview(self._window) as window, window[: width * height * PIXEL_BYTES] as pixels:
            return Image.frombytes("RGB", (width, height), pixels, "raw", "RGBX", 0, 1)

    def _send(self, data: bytes) -> None:
        self._socket.settimeout(self._remaining())
        self._socket.sendall(data)

    def _receive(self, count: int) -> bytes:
        received = b""
        while len(received) < count:
            self._socket.settimeout(self._remaining())
            more = self._socket.recv(count - len(received))
            if not more:
                raise ConnectionResetError
            received += more
        return received

    def _remaining(self) -> float:
        seconds = self._deadline - time.monotonic()
        if seconds <= 0:
            raise TimeoutError
        return seconds


def _anonymous_file() -> IO[bytes]:
    """Memory that another process can map; a file without a name where the system has no such thing."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("pixels"), "w+b")
    return tempfile.TemporaryFile()


def _environment() -> dict[str, str]:
    """This process's, with the sources to import and an allocator for images that come and go.

    The extraction tasks' allocator (`featurize.extract.WORKER_ENV`) keeps all memory, here for ever that of the
    largest image. This one keeps what common images need, without which decoding takes twice as long, and gives back
    what it took for one of more than 4 megapixels.
    """
    inherited = {name: value for name, value in os.environ.items() if name != "MALLOC_MMAP_MAX_"}
    return {
        **inherited,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(_SOURCES), os.environ.get("PYTHONPATH")))),
        "MALLOC_MMAP_THRESHOLD_": str(16 * 1024**2),  # the size of PIL's blocks
        "MALLOC_TRIM_THRESHOLD_": str(64 * 1024**2),
        "OPENBLAS_NUM_THREADS": "1",  # numpy's, whose stacks would fill the address space of a machine of many cores
    }
