"""Finds a checkpoint of the transformers library (a folder, or a hub name) and loads it whole and quietly."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError

from featurize.encoder import EncoderError, first_line

# What never changes an answer: names, versions, labels of a classifier that is left away.
_NOT_INGREDIENTS = {
    "_name_or_path",
    "architectures",
    "dtype",
    "id2label",
    "label2id",
    "torch_dtype",
    "transformers_version",
}


def find_checkpoint(reference: str, also: str) -> Path:
    """The folder of "transformers:FOLDER-OR-HUB-NAME"; a hub model is first fetched into the hub's cache.

    Args:
        reference: its folder holds config.json and model.safetensors; a hub name is "intfloat/e5-small-v2".
        also: what else the folder must hold, for the message.

    Raises:
        EncoderError: neither a complete folder nor a hub model that is cached or can be reached.
    """
    name = reference.removeprefix("transformers:")
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _complete(folder, also)
    advice = (
        f"Give the local folder of a checkpoint that holds config.json, model.safetensors and {also}; where "
        "the hub can be reached, `hf download NAME --local-dir FOLDER` makes one"
    )
    if not name or name.startswith((".", "/", "~")) or name.count("/") > 1 or folder.exists():
        raise EncoderError(f"{reference}: there is no folder {folder.absolute()}. {advice}")
    try:
        fetched = huggingface_hub.snapshot_download(
            name, allow_patterns=["*.json", "*.txt", "*.model", "model*.safetensors"]
        )
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise EncoderError(
            f"{reference}: there is no folder {folder.absolute()}, and the hub gives no model {name!r} "
            f"({first_line(error)}). {advice}"
        ) from error
    return _complete(Path(fetched), also)


def _complete(folder: Path, also: str) -> Path:
    for pattern in ("config.json", "model*.safetensors"):
        if not any(folder.glob(pattern)):
            found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
            raise EncoderError(
                f"{folder} holds no {pattern}, only: {found}. Expected config.json, model.safetensors and "
                f"{also}. Weights in pickle files (.bin) are never loaded: where they are trusted, convert "
                "them with transformers' save_pretrained"
            )
    return folder


def load_network(folder: Path) -> Any:
    """The network of a checkpoint in float32, by transformers' `AutoModel`; no code of the checkpoint is run.

    A pooling layer that the checkpoint has no weights for is taken off: transformers would make it random.

    Raises:
        EncoderError: an architecture that transformers does not have, or tensors missing.
    """
    try:
        with quiet():
            network, report = transformers.AutoModel.from_pretrained(
                folder,
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise EncoderError(f"{folder}: transformers cannot load this checkpoint ({first_line(error)})") from error
    missing = sorted(report["missing_keys"])
    if any(key.startswith("pooler.") for key in missing):
        network.pooler = None
    missing = [key for key in missing if not key.startswith("pooler.")]
    if missing:
        raise EncoderError(
            f"{folder}: the weights lack {len(missing)} tensors of {type(network).__name__}, e.g. "
            f"{missing[:3]}; they would be random. Give a checkpoint of the whole network"
        )
    return network


def digest_config(folder: Path) -> str:
    """sha256 of config.json's settings: with other heads or activations the same weights answer otherwise."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kept = {key: value for key, value in config.items() if key not in _NOT_INGREDIENTS}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def digest_files(folder: Path, patterns: tuple[str, ...]) -> str:
    """sha256 over names and bytes of the folder's files that match any of the patterns, sorted by name."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


@contextmanager
def quiet() -> Iterator[None]:
    """Within it transformers writes neither progress bars nor reports; errors are raised as ever."""
    logging: Any = transformers.utils.logging  # its functions carry no types
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
