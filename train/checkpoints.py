"""Checkpoints on a disk that all workers see: each appears whole or not at all, and no other file lists them."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from featurize.places import fsync_folder, temporary_name


class Checkpoints:
    """Folders `checkpoint-<step>`; the last two are kept.

    Args:
        folder: that holds them; on storage that every node reaches, if there are several.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def folders(self) -> list[Path]:
        """Oldest first."""
        return sorted(self.folder.glob("checkpoint-*[0-9]"))

    def latest(self) -> Path | None:
        """The last one, or None."""
        folders = self.folders()
        return folders[-1] if folders else None

    def save(self, write: Callable[[Path], None], step: int) -> None:
        """Write beside, make sure that it is on the disk, rename; then remove what is too old or was left half done.

        Args:
            write: puts files into an existing folder.
            step: that the state is of.
        """
        target = self.folder / f"checkpoint-{step:09d}"
        temporary = temporary_name(target)
        temporary.mkdir(parents=True)
        write(temporary)
        for path in temporary.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        fsync_folder(temporary)
        if not target.exists():  # or else a worker that was given up for lost came to the same step
            temporary.rename(target)
        fsync_folder(self.folder)
        for path in [*self.folders()[:-2], *self.folder.glob(".checkpoint-*.tmp")]:
            shutil.rmtree(path)
