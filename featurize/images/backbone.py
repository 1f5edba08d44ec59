"""Vision backbones of the transformers library: DINOv2, ViT, Swin, ConvNeXt, towers of CLIP and SigLIP."""

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoImageProcessor

from featurize.checkpoints import digest_config, find_checkpoint, load_network, quiet
from featurize.encoder import JSON, EncoderError, Precision, first_line, hash_weights
from featurize.images.grid import GridEncoder, cells
from featurize.images.preprocessing import rgb, shorten


def open_backbone(reference: str, precision: Precision, device: str) -> GridEncoder:
    """Opens "transformers:FOLDER-OR-HUB-NAME".

    The grid is the last hidden state without class, register and distillation tokens. Pooled is the model's
    own pooled output (of CLIP and SigLIP: before the projection), else its class token, else the mean of the
    grid. A checkpoint of two towers is opened as its image tower.

    Raises:
        EncoderError: neither a complete folder nor a hub model that is cached or can be reached.
        EncoderError: not a vision model, or one whose images or tokens are laid out otherwise.
    """
    folder = find_checkpoint(reference, "preprocessor_config.json")
    network = load_network(folder)
    network = getattr(network, "vision_model", network)
    preprocessing = Processor(folder)
    weights = hash_weights(network)
    size = preprocessing.pixels(Image.new("RGB", (32, 32))).shape[1:]
    special = _special_tokens(network.eval(), size, reference)
    return GridEncoder(
        f"transformers:{network.config.model_type}",
        weights,
        _Backbone(network, special),
        preprocessing,
        precision=precision,
        device=device,
        ingredients={"config": digest_config(folder)},
    )


class Processor:
    """A `Preprocessing` that resizes and crops as the checkpoint's own image processor does.

    Rescaling and normalisation are left to the batch, so the processor must do them last.
    """

    def __init__(self, folder: Path) -> None:
        try:
            with quiet():
                opener: Any = AutoImageProcessor  # carries no types
                self._processor = opener.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            self._settings: dict[str, Any] = json.loads(self._processor.to_json_string())
            blank = self.pixels(Image.new("RGB", (48, 32)))
        except (OSError, ValueError, TypeError) as error:
            raise EncoderError(
                f"{folder}: no image processor that can be used ({first_line(error)}); expected "
                "a preprocessor_config.json of a processor that rescales and normalises after all else"
            ) from error
        if blank.dtype != torch.uint8 or blank.dim() != 3:
            raise EncoderError(
                f"{folder}: {type(self._processor).__name__} makes {blank.dtype} {tuple(blank.shape)} of an "
                "image; expected uint8 pixels (3, H, W). Use a fixed-size variant of the model"
            )

    @property
    def mean(self) -> tuple[float, ...]:
        """Per channel, in units of 0 to 255."""
        means = self._settings["image_mean"] if self._settings.get("do_normalize") else (0.0,) * 3
        return tuple(value / self._scale for value in means)

    @property
    def std(self) -> tuple[float, ...]:
        """Per channel, in units of 0 to 255."""
        deviations = self._settings["image_std"] if self._settings.get("do_normalize") else (1.0,) * 3
        return tuple(value / self._scale for value in deviations)

    @property
    def _scale(self) -> float:
        return float(self._settings["rescale_factor"]) if self._settings.get("do_rescale") else 1.0

    def pixels(self, image: Image.Image) -> Tensor:
        """(3, H, W) uint8."""
        image = rgb(image)
        if "shortest_edge" in (self._settings.get("size") or {}):
            image = shorten(image)
        batch = self._processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")
        pixels: Tensor = batch["pixel_values"][0]
        return pixels

    def record(self) -> dict[str, JSON]:
        """The processor's kind and all its settings."""
        return {"processor": self._settings}


def _special_tokens(network: Any, size: torch.Size, reference: str) -> int:
    """How many tokens stand before the patches in the last hidden state; 0 for a network without such tokens.

    Raises:
        EncoderError: the number of tokens is not explained by patches, class, register and distillation tokens.
    """
    with torch.inference_mode():
        hidden = network(pixel_values=torch.zeros(1, 3, *size)).last_hidden_state
    if hidden.dim() == 4:
        return 0
    counts = {"cls_token": 1, "class_embedding": 1, "distillation_token": 1}
    special = 0
    for name, parameter in network.named_parameters():
        leaf = name.rpartition(".")[2]
        special += parameter.shape[1] if leaf == "register_tokens" else counts.get(leaf, 0)
    patch = getattr(network.config, "patch_size", None)
    if patch is None:
        raise EncoderError(
            f"{reference}: the configuration of {type(network).__name__} names no patch_size, so its tokens cannot "
            "be told apart; use another backbone"
        )
    height, width = (patch, patch) if isinstance(patch, int) else patch
    patches = (size[0] // height) * (size[1] // width)
    tokens = hidden.shape[1]
    merged = special == 0 and tokens < patches  # Swin merges patches from stage to stage
    if tokens - special != patches and not merged:
        raise EncoderError(
            f"{reference}: {type(network).__name__} gives {tokens} tokens for {patches} patches and "
            f"{special} class, register or distillation tokens, so its patches cannot be told apart; use "
            "another backbone"
        )
    return special


class _Backbone(nn.Module):
    def __init__(self, network: Any, special: int) -> None:
        super().__init__()
        self.network = network
        self.special = special

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        answer = self.network(pixel_values=images)
        hidden = answer.last_hidden_state  # (B, special + N, D), or (B, D, h, w) of a convolutional network
        if hidden.dim() == 4:
            grid, pooled = cells(hidden)
        else:
            grid = hidden[:, self.special :]
            pooled = hidden[:, 0] if self.special else grid.float().mean(1)
        own = getattr(answer, "pooler_output", None)
        return grid, pooled if own is None else own.flatten(1)
