"""From a setting to samples: chooses the source, then checks what no single source can see."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Literal

from featurize.config import DataConfig
from featurize.datasets.coco import read_coco
from featurize.datasets.flickr8k import CAPTIONS_FILE, read_flickr8k
from featurize.datasets.folder import read_folder
from featurize.datasets.karpathy import read_karpathy
from featurize.datasets.sample import DataError, Sample, nearest
from featurize.datasets.scenes import read_scenes
from featurize.datasets.table import read_table
from featurize.datasets.tar import read_tar
from featurize.places import Place, answering, place, require_answer


@dataclass(frozen=True)
class _Source:
    read: Callable[[Place, DataConfig], Iterator[Sample]]
    expected: str  # at `root`


def load(config: DataConfig, folder: Path) -> list[Sample]:
    """Every sample of the data set, in the source's own order; of those with one id all but the first have a problem.

    Args:
        config: the source, where it lies, and which splits are wanted.
        folder: where the `scenes` are rendered unless `config.root` says so; other sources leave it alone.

    Raises:
        DataError: the data set's name is unknown; nothing, or something else, is at `root`; there are no
            images; or a wanted split is missing.
    """
    if config.dataset not in _SOURCES:
        raise DataError(
            f"unknown data set {config.dataset!r}{nearest(config.dataset, _SOURCES)}; "
            f"--data.dataset takes {', '.join(_SOURCES)}"
        )
    samples = list(_read(config, folder))
    source = f"{config.dataset} at {config.root}" if config.root else config.dataset
    if not samples:
        raise DataError(f"{source}: no images; expected {_SOURCES[config.dataset].expected}")
    samples = _without_duplicates(samples)
    if config.holdout:
        samples = _hold_out(samples, config, source)
    _require_splits(samples, config, source)
    return samples


def protocol_of(config: DataConfig) -> Literal["full", "coco"]:
    """How a data set is measured by custom: COCO also as the mean of five 1K folds, everything else whole."""
    return "coco" if config.dataset == "coco" else "full"


def _read(config: DataConfig, folder: Path) -> Iterator[Sample]:
    source = _SOURCES[config.dataset]
    if config.dataset == "scenes":
        yield from source.read(_drawn(config.root) if config.root else folder, config)
        return
    if not config.root:
        raise DataError(f"{config.dataset} needs --data.root: {source.expected}")
    root = place(config.root, DataError)
    require_answer(root, DataError)
    if not root.exists():
        raise DataError(f"--data.root {root} does not exist; {config.dataset} expects {source.expected}")
    with answering(root, DataError):
        yield from source.read(root, config)


def _drawn(root: str) -> Path:
    folder = place(root, DataError)
    if not isinstance(folder, Path):
        raise DataError(f"--data.root {root}: scenes are drawn on a disk; give a folder of this machine")
    return folder


def _read_preset(name: str, root: Place) -> Iterator[Sample]:
    """Karpathy's JSON of that very data set; for Flickr8K the official files where the JSON is absent."""
    if root.is_file():
        return read_karpathy(root)
    json_file = root / f"dataset_{name}.json"
    if json_file.is_file():
        return read_karpathy(json_file)
    if name == "flickr8k" and (root / CAPTIONS_FILE).is_file():
        return read_flickr8k(root)
    raise DataError(f"{root}: found no captions of {name}; expected {_SOURCES[name].expected}")


_SOURCES = {
    "flickr8k": _Source(
        lambda root, _: _read_preset("flickr8k", root),
        f"a folder with dataset_flickr8k.json or {CAPTIONS_FILE}, and images/",
    ),
    "flickr30k": _Source(
        lambda root, _: _read_preset("flickr30k", root),
        "a folder with dataset_flickr30k.json, and images/ or flickr30k-images/",
    ),
    "coco": _Source(
        lambda root, _: _read_preset("coco", root),
        "a folder with dataset_coco.json, train2014/ and val2014/",
    ),
    "scenes": _Source(
        lambda root, config: read_scenes(Path(str(root)), config.scenes),
        "--data.scenes.train, --data.scenes.val or --data.scenes.test above 0",
    ),
    "karpathy": _Source(
        lambda root, _: read_karpathy(root),
        "one of Karpathy's dataset_*.json files or its folder, and the images beside it",
    ),
    "flickr8k-tokens": _Source(
        lambda root, _: read_flickr8k(root),
        f"a folder with {CAPTIONS_FILE}, Flickr_8k.trainImages.txt, ... and Flicker8k_Dataset/ or images/",
    ),
    "coco-captions": _Source(
        lambda root, _: read_coco(root),
        "a folder with captions_train2014.json, ... and train2014/, ...",
    ),
    "table": _Source(
        lambda root, config: read_table(root, config.table),
        "a .csv, .tsv, .jsonl or .parquet file with rows, or a folder with one",
    ),
    "folder": _Source(
        lambda root, _: read_folder(root),
        "a folder of images, each beside a .txt of the same name with one caption a line",
    ),
    "tar": _Source(lambda root, _: read_tar(root), "a webdataset .tar, or a folder of them"),
}


def _without_duplicates(samples: list[Sample]) -> list[Sample]:
    known: dict[str, Sample] = {}
    for sample in samples:
        known.setdefault(sample.image_id, sample)
    return [
        sample
        if sample.problem or sample is (first := known[sample.image_id])
        else replace(sample, problem=f"duplicate image id: {_place(first)} has it, {_place(sample)} has it too")
        for sample in samples
    ]


def _place(sample: Sample) -> str:
    return repr(sample.image) + (f" at byte {sample.span[0]}" if sample.span else "")


def _hold_out(samples: list[Sample], config: DataConfig, source: str) -> list[Sample]:
    """Divides the images that name no split by the hash of their id, so that an image never changes sides."""
    if not 0 < config.holdout < 1:
        raise DataError(f"--data.holdout {config.holdout}: expected a share between 0 and 1")
    if all(sample.split for sample in samples):
        raise DataError(f"--data.holdout divides images without a split, but {source} has {_counts(samples)}; omit it")

    def held_out(image_id: str) -> bool:
        digest = sha256(image_id.encode("utf-8", errors="surrogatepass")).digest()
        return int.from_bytes(digest[:8]) / 2**64 < config.holdout

    return [
        sample
        if sample.split
        else replace(sample, split=config.evaluate if held_out(sample.image_id) else config.train)
        for sample in samples
    ]


def _require_splits(samples: list[Sample], config: DataConfig, source: str) -> None:
    splits = {sample.split for sample in samples}
    for role, split in (("train", config.train), ("evaluate", config.evaluate)):
        if split not in splits:
            divide = ", or divide the images without a split with --data.holdout 0.1" if "" in splits else ""
            raise DataError(
                f"{source}: no images in split {split!r} (--data.{role}); found {_counts(samples)}. "
                f"Choose one of these with --data.{role}{divide}"
            )


def _counts(samples: list[Sample]) -> str:
    counts = Counter(sample.split for sample in samples)
    return ", ".join(
        f"{count} in {split!r}" if split else f"{count} without a split" for split, count in counts.items()
    )
