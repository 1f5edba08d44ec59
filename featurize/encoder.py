"""What every frozen network has in common: how it is called, what it says, what it is, and how it computes.

Image encoders are in `featurize.images`, text encoders in `featurize.texts`. Features that others have extracted
(`featurize.imports`) have a `Card` (weights = sha256 of the file) with outputs of the same names, but nothing to
prepare or encode: their reader takes the place of the encoder.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import torch
from PIL import Image
from torch import Tensor, nn

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"
Precision: TypeAlias = Literal["bfloat16", "float32"]
DType: TypeAlias = Literal["float16", "float32", "int8", "int32"]


class EncoderError(ValueError):
    """An encoder cannot be opened: what was asked for, what there is, what to do."""


@dataclass(frozen=True)
class Output:
    """One thing that an encoder says about each image or caption.

    Attributes:
        name: "grid", "pooled", "tokens", "sentence", "lemmas", "regions", ...; it becomes the column's name.
        shape: of one row, e.g. (49, 1280); of a ragged output without its first axis, e.g. (384,).
        ragged: rows have a first axis of varying length L: (L, *shape).
        dtype: of the stored values. Whole numbers of images are for ragged outputs only: the row of an image that
            cannot be decoded is NaN, or empty where rows differ in length.
    """

    name: str
    shape: tuple[int, ...]
    ragged: bool = False
    dtype: DType = "float16"


@dataclass(frozen=True)
class Card:
    """All that could change what an encoder says: what a cache's identity is made of.

    No path, device or library version stands here, so a moved checkpoint is the same encoder.

    Attributes:
        name: family and architecture: "efficientnet-lite0", "torchvision:resnet50", "transformers:dinov2".
        weights: sha256 of the network's weights, see `hash_weights`.
        preprocessing: JSON values: sizes, normalisation, digests of configuration and tokenizer, and the
            "precision" that the forward pass really uses on this machine.
        outputs: what `encode` returns, in order.
    """

    name: str
    weights: str
    preprocessing: Mapping[str, JSON]
    outputs: tuple[Output, ...]


class ImageEncoder(Protocol):
    """A frozen network that describes images."""

    card: Card

    def prepare(self, image: Image.Image) -> Tensor:
        """One image as the network takes it: (3, H, W) uint8 RGB on the CPU. Safe to call from threads."""
        ...

    def encode(self, batch: Tensor) -> Mapping[str, Tensor | list[Tensor]]:
        """What the network says about prepared images.

        Args:
            batch: (B, 3, H, W) uint8, rows made by `prepare`; images of different size cannot share a batch.

        Returns:
            Output name → (B, *shape) on the CPU, or for a ragged output B tensors (L_i, *shape); float32, or int32
            where the output's values are stored so.
        """
        ...


class TextEncoder(Protocol):
    """A frozen network that describes captions."""

    card: Card

    def prepare(self, captions: Sequence[str]) -> list[list[int]]:
        """Token ids of each caption, special tokens included, truncated at the model's limit."""
        ...

    def encode(self, batch: Sequence[Sequence[int]]) -> dict[str, Tensor | list[Tensor]]:
        """What the network says about prepared captions.

        Args:
            batch: B lists of token ids; caption i has L_i of them. All are padded to the longest, so captions
                of similar length belong together.

        Returns:
            Output name → (B, *shape) on the CPU, or for a ragged output B tensors (L_i, *shape); float32, or int32
            where the output's values are stored so.
        """
        ...


def hash_weights(network: nn.Module) -> str:
    """sha256 over the state dict, sorted by name: each tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def first_line(error: Exception) -> str:
    """What an error says first: some libraries' messages run over pages."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def usable_precision(wanted: Precision, device: torch.device) -> Precision:
    """The precision that `device` computes in: bfloat16 only where the hardware has it, else float32."""
    if wanted == "float32":
        return wanted
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        native = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))
    else:
        native = False
    return "bfloat16" if native else "float32"


def freeze(network: nn.Module, precision: Precision, device: torch.device) -> None:
    """Puts a network on `device` in evaluation mode, without gradients, channels last.

    Under bfloat16 the weights of convolutions and linear layers are stored so: autocast would round them in
    every forward pass, to the same values. Everything else (norms, embeddings, residual sums) stays float32.
    """
    network.eval().requires_grad_(False).to(device)
    if precision == "bfloat16":
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.to(torch.bfloat16)
    for parameter in network.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


@contextmanager
def frozen_forward(precision: Precision, device: torch.device) -> Iterator[None]:
    """Within it a frozen network runs in `precision` and nothing is recorded for gradients."""
    with (
        torch.inference_mode(),
        torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"),
    ):
        yield
