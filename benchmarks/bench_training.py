"""A training step that reads the cache against the same step on tensors that are in memory already.

    python benchmarks/bench_training.py

A cache of 8,000 rows in 32 shards is written: pooled vectors (2 x 1280), a 7 x 7 grid, sentence and token columns.
Both variants run the same towers, objective and optimiser on the same batches of 256, interleaved in blocks of steps;
`cache` gathers every batch from the mapped shards in the prefetch thread, as the loop does; `memory` is handed the
batches ready made. The time is wall time per step; the ratio is what the cache costs.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from torch import Tensor

from featurize.columns import column_folder
from featurize.config import FeaturizeConfig
from featurize.datasets.sample import Sample
from featurize.encoder import Output
from featurize.index import Dataset, index
from featurize.manifest import Modality, ShardRecord, identity
from featurize.plan import PlannedColumn
from featurize.shards import row_key, write_shard
from train.batches import Batch, FeatureReader, Inputs
from train.config import TowerConfig, TrainConfig
from train.embeddings import Pairs
from train.loop import Work, start
from train.noise import Noise
from train.schedule import Draw, Schedule, prefetch
from train.targets import Targets

ROWS, SHARD, BATCH, BLOCK = 8000, 250, 256, 5


def write_cache(folder: Path) -> tuple[Dataset, list[PlannedColumn]]:
    """A data set of one-caption images with random features."""
    picture = folder / "picture"
    picture.write_bytes(b"-")
    samples = [Sample(f"{row}", str(picture), (f"caption {row}",), "train") for row in range(ROWS)]
    dataset = index(samples, "bench", folder, max_quarantined=0)
    rng = np.random.default_rng(0)
    outputs: list[tuple[Modality, str, Output]] = [
        ("image", "one", Output("pooled", (1280,))),
        ("image", "two", Output("pooled", (1280,))),
        ("image", "one", Output("grid", (49, 1280))),
        ("text", "words", Output("sentence", (384,))),
        ("text", "words", Output("tokens", (384,), ragged=True)),
    ]
    columns = []
    for modality, encoder, output in outputs:
        name = f"{encoder}.{output.name}"
        ingredients = {"dataset": dataset.id, "encoder": encoder, "weights": "-", "output": output.name}
        target = column_folder(dataset, name, identity(ingredients))
        target.mkdir()
        records = []
        for number, first in enumerate(range(0, ROWS, SHARD)):
            keys = [row_key(f"{row}", 0 if modality == "text" else None) for row in range(first, first + SHARD)]
            shape = (14, *output.shape) if output.ragged else output.shape
            rows = rng.standard_normal((SHARD, *shape), dtype=np.float32).astype(np.float16)
            file = write_shard(target / f"{number:06d}.tar", keys, rows, ragged=output.ragged)
            records.append(ShardRecord(file.rows, file.size, file.sha256))
        column = PlannedColumn(name, modality, encoder, output, "plain", ingredients, target)
        column.manifest(SHARD, records).write(target)
        columns.append(column)
    return dataset, columns


def towers(parts: bool) -> TrainConfig:
    """Heads on pooled vectors, or with attention over grid and tokens beside them."""
    config = TrainConfig(batch=BATCH)
    if not parts:
        return config
    image = TowerConfig(parts=("grid",), signed_sqrt=True, width=256)
    text = TowerConfig(vectors=("sentence",), parts=("tokens",), width=256)
    return replace(config, model=replace(config.model, image=image, text=text))


def measure(repeats: int, *, parts: bool) -> dict[str, float]:
    """Median milliseconds of a step from the cache and from memory, and their ratio."""
    with tempfile.TemporaryDirectory() as folder:
        dataset, columns = write_cache(Path(folder))
        config = towers(parts)
        inputs = Inputs.of(dataset.folder, columns, config, FeaturizeConfig().precision)
        reader = FeatureReader(inputs)
        work = Work(config, inputs, "train", lambda _model: {}, lambda _metrics, _step: None)
        targets = Targets.of(reader, "train", config.objective, 0)
        state = start(work, reader, targets, torch.device("cpu"))
        _, captions = reader.split("train")
        schedule = Schedule(captions, reader.caption_image[captions], BATCH, 1, 0)

        def taken(draw: Draw) -> tuple[Batch, Tensor]:
            return reader.batch(draw), torch.from_numpy(targets.image_ids[draw.captions])

        def step(batch: Batch, ids: Tensor) -> None:
            size = len(ids)
            noise = Noise(0, 0, size, slice(0, size))
            image, text, _ = state.model(batch.image, batch.text, batch.owner, (noise, noise))
            pairs = Pairs(image, text, ids, batch.semantic, targets.concepts[ids], targets.labels[ids], ids)
            loss, _ = state.objective(pairs, 0.5, state.model.spaces())
            state.optimizer.zero_grad()
            loss.backward()
            state.optimizer.step()

        def from_cache() -> Iterator[tuple[Batch, Tensor]]:
            epoch = 0
            while True:
                yield from map(taken, schedule.epoch(epoch))
                epoch += 1

        ready = list(map(taken, itertools.islice(schedule.epoch(0), BLOCK)))
        cached = prefetch(from_cache())
        times: dict[str, list[float]] = {"cache": [], "memory": []}
        for _ in range(repeats + 1):
            for name, found in times.items():
                begin = time.perf_counter()
                for number in range(BLOCK):
                    step(*(ready[number] if name == "memory" else next(cached)))
                found.append(1000 * (time.perf_counter() - begin) / BLOCK)
        cached.close()
    medians = {name: statistics.median(found[1:]) for name, found in times.items()}
    return {
        **{f"{name} (ms a step)": value for name, value in medians.items()},
        "cache / memory": medians["cache"] / medians["memory"],
    }


def main() -> None:
    """Print medians and ratios for light and for heavy inputs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    for title, parts in (("pooled vectors", False), ("pooled vectors, grid and tokens", True)):
        print(f"training step, {title}, batch {BATCH}")
        for name, value in measure(repeats, parts=parts).items():
            print(f"  {name:<28} {value:8.2f}")


if __name__ == "__main__":
    main()
