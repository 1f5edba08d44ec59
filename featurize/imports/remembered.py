"""What is known of imported files, so that no run reads 20 GB to learn what an earlier one knew.

<cache>/imports/<16 hex digits of the path's sha256>.json      sha256 of each file, by size and modification time
                <16 hex digits of the content's sha256>.npz    where the rows of a text file stand
"""

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from featurize.places import publish
from featurize.shards import Array

FOLDER = "imports"
"""In the cache; no data set is called so, because their folders have an `@` in their names."""


@dataclass(frozen=True)
class FileStamp:
    """A file by what lets its hash be believed without reading it again."""

    path: Path
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> "FileStamp":
        """The stamp of a file as it is now."""
        status = path.stat()
        return cls(path, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class Memory:
    """The memory of one cache.

    Attributes:
        cache: folder of all data sets.
    """

    cache: Path

    def digest(self, path: Path, files: Sequence[FileStamp]) -> str:
        """The sha256 of what an import consists of: of the file, or over names and sha256s of several.

        Args:
            path: what the reference names.
            files: all that is read for it.
        """
        place = self._place(hashlib.sha256(str(path).encode("utf-8", "surrogatepass")).hexdigest(), "json")
        known = _read_json(place)
        unknown = [file for file in files if _key(file) not in known]
        if unknown:
            stale = {json.dumps(str(file.path)) for file in unknown}
            known = {key: sha256 for key, sha256 in known.items() if json.dumps(json.loads(key)[0]) not in stale}
            with tqdm(total=sum(file.size for file in unknown), desc="hash", unit="B", unit_scale=True) as bar:
                known |= {_key(file): _sha256(file.path, bar.update) for file in unknown}
            publish(place, json.dumps(known).encode())
        if len(files) == 1:
            return known[_key(files[0])]
        lines = (f"{file.path.name} {known[_key(file)]}\n" for file in files)
        return hashlib.sha256("".join(lines).encode("utf-8", "surrogatepass")).hexdigest()

    def table(self, content: str, kind: str, make: Callable[[], Mapping[str, Array]]) -> Mapping[str, Array]:
        """Arrays that follow from a content, made once.

        Args:
            content: sha256 of what they are made of.
            kind: what they are and which version of the code made them.
            make: called if they are not known.
        """
        place = self._place(hashlib.sha256(f"{kind} {content}".encode()).hexdigest(), "npz")
        if not place.exists():
            buffer = io.BytesIO()
            np.savez(buffer, allow_pickle=False, **make())
            publish(place, buffer.getvalue())
        with np.load(place, allow_pickle=False) as found:
            return dict(found)

    def _place(self, digest: str, suffix: str) -> Path:
        folder = self.cache / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{digest[:16]}.{suffix}"


def _key(file: FileStamp) -> str:
    return json.dumps([str(file.path), file.size, file.mtime_ns])


def _read_json(place: Path) -> dict[str, str]:
    try:
        found: dict[str, str] = json.loads(place.read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found


def _sha256(path: Path, progress: Callable[[int], object]) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(1 << 22):
            digest.update(data)
            progress(len(data))
    return digest.hexdigest()
