"""The settings of this package."""

from dataclasses import dataclass, field
from typing import Literal

from featurize.config import require


@dataclass(frozen=True)
class HubnessConfig:
    """Hubness correction, fitted on training data and reported beside the plain score."""

    queries: int = field(
        default=5000,
        metadata={
            "help": "training images, and captions, that tell which items are hubs (not for the host scan); 0: none"
        },
    )
    strength: float = field(default=0.7, metadata={"help": "a, share of an item's hubness taken from its score"})
    sharpness: float = field(default=20.0, metadata={"help": "b, how much the nearest training queries decide"})

    def __post_init__(self) -> None:
        """Refuse, before anything is trained, what no correction can be fitted with afterwards."""
        require(self, lambda n: n >= 0, "0 (no correction) or more", "queries")
        require(self, lambda n: n >= 0, "0 (changes nothing) or more", "strength")
        require(self, lambda n: n > 0, "more than 0; queries 0 means no correction", "sharpness")


@dataclass(frozen=True)
class EvaluateConfig:
    """How a run is measured."""

    protocol: Literal["auto", "full", "coco"] = field(
        default="auto",
        metadata={"help": "full: the whole split; coco: also the mean of five 1K folds; auto: by data set"},
    )
    hubness: HubnessConfig = field(default_factory=HubnessConfig)
    tile: int = field(default=1024, metadata={"help": "rows scored at once; memory is tile squared"})

    def __post_init__(self) -> None:
        """Refuse a tile that holds nothing."""
        require(self, lambda n: n >= 1, "1 or more", "tile")
