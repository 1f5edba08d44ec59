"""The settings of this package: which data, and how frozen networks describe it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

View = Literal["plain", "flip", "crop", "crop2", "crop3", "crop4"]


def require(config: object, fits: Callable[[float], bool], expected: str, *names: str) -> None:
    """Refuse a config in which a number does not fit.

    Args:
        config: a dataclass.
        fits: whether a number does.
        expected: in words.
        names: of the fields.

    Raises:
        ValueError: one does not; the message begins with the field's name.
    """
    for name in names:
        if not fits(value := getattr(config, name)):
            raise ValueError(f"{name}: found {value}, expected {expected}")


@dataclass(frozen=True)
class TableConfig:
    """Columns of a table source (CSV, TSV, JSONL, Parquet)."""

    image: str = field(default="image", metadata={"help": "column with the image's path or URI"})
    caption: str = field(
        default="caption",
        metadata={"help": "column with a caption (one row each) or a list of captions"},
    )
    split: str = field(default="split", metadata={"help": "column with the split's name; may be absent"})
    id: str = field(default="", metadata={"help": "column with the image id; empty: the image path is the id"})


@dataclass(frozen=True)
class ScenesConfig:
    """The rendered data set that needs no download."""

    train: int = field(default=1200, metadata={"help": "images in the train split"})
    val: int = field(default=200, metadata={"help": "images in the val split"})
    test: int = field(default=200, metadata={"help": "images in the test split (unseen combinations)"})
    seed: int = field(default=0, metadata={"help": "every picture and caption follows from it"})


@dataclass(frozen=True)
class DataConfig:
    """Which images and captions, and which splits play which part."""

    dataset: str = field(
        default="scenes",
        metadata={
            "help": "a preset (flickr8k, flickr30k, coco, scenes) or a source "
            "(karpathy, flickr8k-tokens, coco-captions, table, folder, tar)"
        },
    )
    root: str = field(default="", metadata={"help": "folder or file that holds the data"})
    train: str = field(default="train", metadata={"help": "the split that heads learn on"})
    evaluate: str = field(default="val", metadata={"help": "the split that is reported and tuned on"})
    holdout: float = field(
        default=0.0,
        metadata={
            "help": "share of images that becomes the evaluate split, for a source without splits "
            "(by hash of the image id, so it never moves)"
        },
    )
    table: TableConfig = field(default_factory=TableConfig)
    scenes: ScenesConfig = field(default_factory=ScenesConfig)


@dataclass(frozen=True)
class FeaturizeConfig:
    """Which frozen networks describe the data, and how their answers are stored."""

    images: tuple[str, ...] = field(
        default=("efficientnet-lite0",),
        metadata={
            "help": "image encoders, joined at training: efficientnet-lite0|1|2, "
            "torchvision:NAME[@random|@default|@FILE], transformers:FOLDER-OR-HUB-NAME, "
            "regions:DETECTOR[@WEIGHTS][+ENCODER][+k=36][+score=0.2] with ssd-mobilenet or fasterrcnn_... as DETECTOR, "
            "import:PATH (features that others extracted)"
        },
    )
    texts: tuple[str, ...] = field(
        default=("minilm",),
        metadata={
            "help": "text encoders: minilm, mpnet, lexicon[:LANGUAGE] (words), transformers:FOLDER-OR-HUB-NAME, "
            "import:PATH"
        },
    )
    views: tuple[View, ...] = field(
        default=("plain",),
        metadata={"help": "views of each image: plain, flip (mirrored), crop, crop2, crop3, crop4 (random parts)"},
    )
    rows_per_shard: int = field(default=256, metadata={"help": "images in a shard; one Ray task writes one"})
    precision: Literal["bfloat16", "float32"] = field(
        default="bfloat16",
        metadata={
            "help": "arithmetic of the frozen forward pass; float32 where the machine that you type on has no bfloat16"
        },
    )
    storage: Literal["float16", "float32", "int8"] = field(
        default="float16",
        metadata={"help": "of features: float16, float32, or int8 with a scale for each vector (boxes stay float16)"},
    )
    image_batch: int = field(default=8, metadata={"help": "images per forward pass (8 suits a CPU; GPUs want 128)"})
    text_batch: int = field(default=128, metadata={"help": "captions per forward pass"})
    cpus_per_task: float = field(default=1.0, metadata={"help": "CPU cores, and threads, of one extraction task"})
    gpus_per_task: float = field(
        default=0.0, metadata={"help": "GPUs that one extraction task takes; 0: it runs on the CPU"}
    )
    max_quarantined: float = field(
        default=0.05, metadata={"help": "share of images that may fail before the job is ended"}
    )
    retry_quarantined: bool = field(
        default=False,
        metadata={"help": "describe images again that could not be described before, also inside finished shards"},
    )
    decode_timeout: float = field(
        default=30.0, metadata={"help": "seconds that decoding one image may take before it is quarantined"}
    )

    def __post_init__(self) -> None:
        """Refuses numbers that nothing can be described with, a time limit that no image could keep, and odd shares."""
        require(self, lambda n: n >= 1, "1 or more", "rows_per_shard", "image_batch", "text_batch")
        require(self, lambda n: n >= 0, "0 or more", "cpus_per_task", "gpus_per_task")
        require(self, lambda n: 0 <= n <= 1, "a share from 0 to 1", "max_quarantined")
        require(self, lambda n: 0 < n <= 86_400, "seconds above 0, a day at most", "decode_timeout")
