"""Hubness correction: items that are near to everything are set back by one stored number each.

From each gallery item's score a · h is taken away, h = logsumexp over a bank of b · sim(item, bank) / b: a smooth
maximum of the item's similarity to *training* queries of the other modality (docs/methods.md, "Hubness correction"; a
relative is querybank normalisation, Bogolin et al. CVPR 2022). sim = -d²/2, which for unit vectors is the cosine less
one. Never fit it on the queries of the split that is measured, and report it beside the plain score, not instead.

Because the bias belongs to the item, a corrected gallery is a plain gallery with one dimension more:

    -d²(q, x)/2 - bias  =  -d²([q; 0], [x; s])/2 + constant,    s² = 2 (bias - the smallest bias)

so `rank_relevant` and any exact or approximate L2 index return the corrected order of `augment_queries` and
`augment_gallery`. (For an inner-product index over unit vectors use [q; 1] and [x; -bias].)

Legend: N gallery items, Q bank queries, E dimensions.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from evaluate.ranks import EvaluationError, check_embeddings
from featurize.places import publish

Gallery = Literal["images", "captions"]


@dataclass(frozen=True, eq=False)
class HubnessCorrection:
    """Training queries of both modalities, and how strongly they set their neighbours back.

    Attributes:
        images: (Q, E) bank for a gallery of captions.
        captions: (Q', E) bank for a gallery of images.
        a: strength; 0 changes nothing.
        b: sharpness: the larger, the more the nearest bank queries decide.

    Raises:
        EvaluationError: a bank is empty, not finite, or of other dimensions than the other; a < 0 or b <= 0.
    """

    images: Tensor
    captions: Tensor
    a: float = 0.7
    b: float = 20.0

    def __post_init__(self) -> None:
        check_embeddings("hubness bank of images", self.images)
        check_embeddings("hubness bank of captions", self.captions)
        if self.images.shape[1] != self.captions.shape[1]:
            raise EvaluationError(
                f"hubness banks: images have {self.images.shape[1]} dimensions, captions {self.captions.shape[1]}; "
                "expected as many"
            )
        if self.a < 0 or self.b <= 0:
            raise EvaluationError(f"hubness: expected a >= 0 and b > 0, found a = {self.a}, b = {self.b}")

    def bias(self, gallery: Tensor, kind: Gallery, tile: int = 1024) -> Tensor:
        """What is taken from each item's score -d²/2: a · h, (N,) float64. Memory: O(tile²) beyond the inputs.

        Args:
            gallery: (N, E) embeddings of the items.
            kind: what they are; images are compared with the bank of captions, captions with that of images.
            tile: items and bank queries that are compared at once.

        Raises:
            EvaluationError: the gallery is not finite or has other dimensions than the banks; tile < 1.
        """
        check_embeddings(kind, gallery)
        bank = (self.captions if kind == "images" else self.images).to(gallery.device)
        if gallery.shape[1] != bank.shape[1]:
            raise EvaluationError(
                f"{kind} have {gallery.shape[1]} dimensions, the hubness banks {bank.shape[1]}; expected as many"
            )
        if tile < 1:
            raise EvaluationError(f"tile: expected at least 1, found {tile}")
        hubs = [self._hub(gallery[first : first + tile].double(), bank, tile) for first in range(0, len(gallery), tile)]
        return self.a * torch.cat(hubs)

    @torch.no_grad()
    def _hub(self, items: Tensor, bank: Tensor, tile: int) -> Tensor:
        """Smooth maximum h of -d²/2 of items (n, E) to the bank, (n,)."""
        total = items.new_full((len(items),), -torch.inf)
        squares = items.square().sum(dim=1, keepdim=True)  # (n, 1)
        for first in range(0, len(bank), tile):
            others = bank[first : first + tile].double()  # (q, E)
            similar = items @ others.T - (squares + others.square().sum(dim=1)) / 2  # (n, q)
            total = torch.logaddexp(total, (self.b * similar).logsumexp(dim=1))
        return total / self.b

    def save(self, path: Path) -> None:
        """Write it as one safetensors file, whole or not at all."""
        publish(path, save({name: tensor.contiguous().clone() for name, tensor in self.state().items()}))

    @classmethod
    def open(cls, path: Path) -> "HubnessCorrection":
        """Read what `save` wrote.

        Raises:
            EvaluationError: there is none, or it is damaged.
        """
        try:
            return cls.from_state(load_file(path))
        except (OSError, SafetensorError) as error:
            raise EvaluationError(
                f"{path}: no hubness correction ({error}); train with --evaluate.hubness.queries above 0"
            ) from error

    def state(self) -> dict[str, Tensor]:
        """Plain tensors that `from_state` takes: both banks, a and b."""
        return {
            "images": self.images,
            "captions": self.captions,
            "a": torch.tensor(self.a, dtype=torch.float64),
            "b": torch.tensor(self.b, dtype=torch.float64),
        }

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> "HubnessCorrection":
        """The correction whose `state` was stored.

        Raises:
            EvaluationError: a tensor is missing, or one is there that does not belong.
        """
        expected = {"images", "captions", "a", "b"}
        if set(state) != expected:
            raise EvaluationError(f"hubness state: expected {sorted(expected)}, found {sorted(state)}")
        return cls(state["images"], state["captions"], state["a"].item(), state["b"].item())


def augment_gallery(gallery: Tensor, bias: Tensor) -> Tensor:
    """Items with their bias as a last dimension, (N, E) and (N,) -> (N, E + 1) of the gallery's type.

    Only differences of the bias matter, so the smallest one becomes zero. All items of one search must be augmented
    together: items that are added later would need the same zero.

    Raises:
        EvaluationError: not one finite bias for each item.
    """
    if bias.shape != gallery.shape[:1] or not bias.isfinite().all():
        raise EvaluationError(
            f"hubness bias: expected {len(gallery)} finite numbers, one for each item, "
            f"found shape {tuple(bias.shape)} with {int((~bias.isfinite()).sum())} that are not finite"
        )
    extra = (2 * (bias.double() - bias.double().min())).sqrt()  # (N,)
    return torch.cat([gallery, extra.to(gallery.dtype)[:, None]], dim=1)


def augment_queries(queries: Tensor) -> Tensor:
    """Queries that meet an augmented gallery, (Q, E) -> (Q, E + 1): a zero is added."""
    return torch.nn.functional.pad(queries, (0, 1))
