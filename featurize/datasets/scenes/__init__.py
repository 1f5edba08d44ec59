"""The data set that needs no download: rendered toys, their captions, and unseen combinations to test on.

One to four toys of eight shapes, eight colours, four materials and two sizes stand in one of eight places:
left and right of each other, behind each other, or one hanging above the other. Five captions from a grammar
of synonyms tell some of it. Train and val are drawn alike; every test picture shows at least one combination
of colour and shape that train and val never show: were colours and shapes learned apart?
"""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from featurize.config import ScenesConfig, TableConfig
from featurize.datasets.sample import DataError, Sample
from featurize.datasets.scenes.captions import describe
from featurize.datasets.scenes.pictures import draw
from featurize.datasets.scenes.world import SPLITS, invent
from featurize.datasets.table import read_table

_VERSION = 1  # of the generator: one more whenever a picture or caption changes
_MANIFEST = "manifest.json"
_TABLE = "captions.jsonl"


def read_scenes(root: Path, config: ScenesConfig) -> Iterator[Sample]:
    """Samples split by split; renders them under `root` first if they are not there.

    Raises:
        DataError: as `render`.
    """
    render(config, root)
    yield from read_table(_folder(config, root) / _TABLE, TableConfig(id="id"))


def render(config: ScenesConfig, folder: Path) -> None:
    """Writes pictures (224x224 JPEG) and a table of captions to `folder`, in a sub-folder for each `config`.

    A finished sub-folder is left as it is. An unfinished one is never seen: everything is written elsewhere,
    the manifest last, and then renamed. Picture and captions number n of a split depend on the seed, the
    split and n only.

    Raises:
        DataError: the seed is negative, or the sub-folder is there without its manifest.
    """
    if config.seed < 0:
        raise DataError(f"--data.scenes.seed {config.seed}: expected 0 or more")
    target = _folder(config, folder)
    if (target / _MANIFEST).is_file():
        return
    if target.exists():
        raise DataError(f"{target}: {_MANIFEST} is missing, so the folder was changed; remove it to render it again")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".rendering-") as temporary:
        work = Path(temporary) / target.name
        (work / "images").mkdir(parents=True)
        total = sum(getattr(config, split) for split in SPLITS)
        with (
            (work / _TABLE).open("w", encoding="utf-8") as table,
            tqdm(total=total, desc="render", unit="images") as bar,
        ):
            for split_number, split in enumerate(SPLITS):
                for number in range(getattr(config, split)):
                    seed = [config.seed, split_number, number]
                    for_scene, for_picture, for_words = np.random.default_rng(seed).spawn(3)
                    scene = invent(for_scene, split)
                    image_id = f"{split}-{number:06d}"
                    image = f"images/{image_id}.jpg"
                    draw(scene, for_picture).save(work / image, quality=90)
                    row = {
                        "id": image_id,
                        "image": image,
                        "caption": describe(scene, for_words),
                        "split": split,
                    }
                    table.write(json.dumps(row) + "\n")
                    bar.update()
        (work / _MANIFEST).write_text(json.dumps(_identity(config), indent=2) + "\n", encoding="utf-8")
        try:
            work.rename(target)
        except OSError:
            if not (target / _MANIFEST).is_file():  # else another process was faster, with the same result
                raise


def _identity(config: ScenesConfig) -> dict[str, Any]:
    return {"version": _VERSION, **asdict(config)}


def _folder(config: ScenesConfig, folder: Path) -> Path:
    return folder / sha256(json.dumps(_identity(config), sort_keys=True).encode()).hexdigest()[:8]
