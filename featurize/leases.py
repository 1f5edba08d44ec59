"""The right to make a column: a lock that the system takes back, or in a store a lease that its holder renews.

A lease is an object that names its holder and counts up. Who waits watches it by a monotonic clock of his own, and
never compares clocks of two machines: a lease that did not change for `PATIENCE` seconds is taken over. Two that take
it over at once both write their names, and who is still named a little later has it. What a lease protects may be
done twice without harm, for shards are published whole and say the same; so a holder that lost it goes on.
"""

import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from upath import UPath

from featurize.places import Place, found, make_folder, read, remove_file

LOCK = ".lock"
"""In a column's folder, or a run's: held by the job that makes it."""

BEAT = 5.0
"""Seconds between two signs of life."""

PATIENCE = 30.0
"""Seconds without a sign of life after which a lease is taken over."""

_SETTLE = 2.0  # seconds that two who write at once may be apart
_FORGOTTEN = 24 * 60 * 60  # seconds after which a lease says nothing to `is_held`, by the store's clock and this one


@contextmanager
def held(*folders: Place) -> Iterator[None]:
    """Hold the right to make columns for the length of a block; waits for another job that has it."""
    ordered = sorted(folders, key=str)  # one order for all jobs: none waits for one that waits for it
    rights = [_Lock(folder) if isinstance(folder, Path) else _Lease(folder) for folder in ordered]
    with ExitStack() as stack:
        for right in rights:
            right.acquire()
            stack.callback(right.release)
        yield


class _Lock:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_folder(folder)
        self._lock = FileLock(folder / LOCK)

    def acquire(self) -> None:
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            _tell(self.folder)
            self._lock.acquire()

    def release(self) -> None:
        self._lock.release()


def _tell(folder: Place) -> None:
    print(f"waiting for another job that makes {folder.name}", flush=True)


def is_held(folder: Place, now: float) -> bool:
    """Whether a job makes a column; a lease that was renewed within the last day counts, for nobody watches it here.

    Args:
        folder: of the column.
        now: seconds since 1970.
    """
    path = folder / LOCK
    if not isinstance(path, Path):
        from featurize.places import files

        return any(file.name == LOCK and now - file.modified < _FORGOTTEN for file in files(folder))
    if not path.exists():
        return False
    try:
        with FileLock(path).acquire(timeout=0):
            return False
    except Timeout:
        return True


def clear_temporary(folder: Place) -> None:
    """Remove what a killed worker left; only the holder may, for nobody else writes there."""
    for left in found(folder, ".*.tmp"):
        remove_file(left)


class _Lease:
    def __init__(self, folder: UPath) -> None:
        make_folder(folder)
        self.path = folder / LOCK
        self._name = uuid.uuid4().hex
        self._beats = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)
        # Seen now, though it is waited for later: the leases of one dead job are taken over at once.
        self._seen, self._since = self._content(), time.monotonic()

    def acquire(self) -> None:
        """Wait until it is ours."""
        seen, since, told = self._seen, self._since, False
        while True:
            now = self._content()
            if now is None and self._create():
                break
            if now is not None and now == seen and time.monotonic() - since > PATIENCE:
                self._write()
                time.sleep(_SETTLE)
                if self._is_mine():
                    break
            if now != seen:
                seen, since = now, time.monotonic()
            if now is not None and not told:
                _tell(self.path.parent)
                told = True
            if now is not None:
                time.sleep(min(BEAT, PATIENCE) / 4)
        self._thread.start()

    def release(self) -> None:
        """Give it back, if it is still ours."""
        self._end.set()
        self._thread.join()
        with suppress(FileNotFoundError):
            if self._is_mine():
                remove_file(self.path)

    def _renew(self) -> None:
        while not self._end.wait(BEAT):
            try:
                if not self._is_mine():
                    return  # another job took it over while this one slept
                self._write()
            except Exception:  # noqa: BLE001, S112 - every store has its own; the next beat may succeed
                continue

    def _text(self) -> bytes:
        self._beats += 1
        holder = {"holder": self._name, "beat": self._beats, "machine": platform.node(), "process": os.getpid()}
        return json.dumps(holder).encode()

    def _content(self) -> bytes | None:
        try:
            return read(self.path)
        except FileNotFoundError:
            return None

    def _is_mine(self) -> bool:
        return self._name.encode() in (self._content() or b"")

    def _write(self) -> None:
        self.path.fs.pipe_file(self.path.path, self._text())

    def _create(self) -> bool:
        """Make it, if nobody has made it: at once where the file system can, else found out a little later."""
        try:
            self.path.fs.pipe_file(self.path.path, self._text(), mode="create")
        except FileExistsError:
            return False
        if self.path.protocol not in _EXCLUSIVE:
            time.sleep(_SETTLE)
        return self._is_mine()


_EXCLUSIVE = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "memory"})
"""File systems whose `pipe_file(mode="create")` fails if another process is first; memory has no other process."""
