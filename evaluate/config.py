"""The settings of this package."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class EvaluateConfig:
    """How a run is measured."""

    protocol: Literal["auto", "full", "coco"] = field(
        default="auto",
        metadata={"help": "full: the whole split; coco: also the mean of five 1K folds; auto: by data set"},
    )
    tile: int = field(default=1024, metadata={"help": "rows scored at once; memory is tile squared"})
