"""Batches from a remote cache whose shards this node holds as copies, against the same cache on the disk.

    python benchmarks/bench_elsewhere.py [--before CHECKOUT]

The columns of `bench_training.py`, 2,048 rows in 32 shards each, are read as a training step reads them: 256 random
captions and their images a batch. `local` opens the folder; `copied` opens it as a store would be opened, every shard
copied to this node before; `streamed` has no disk and all shards in memory; `before` is the local cache read by
another checkout of the sources. Each is a process of its own; they take turns batch by batch, so that what else the
machine does meets all alike. What is printed are ratios of medians, and what the difference is of a training step on
the same inputs (`bench_training.py`), though the loop fetches batches in a thread of their own while it computes.
"""

import argparse
import itertools
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

CHECKOUT = os.environ.get("BENCH_CHECKOUT", str(Path(__file__).parents[1]))
sys.path[:0] = [CHECKOUT, str(Path(__file__).parent)]

import bench_training
from bench_training import BATCH, towers, write_cache

from train.batches import FeatureReader, Inputs
from train.schedule import Schedule


def serve(inputs: Inputs) -> None:
    """Read a batch for each line of the standard input, and print the seconds that it took."""
    reader = FeatureReader(inputs)
    _, captions = reader.split("train")
    schedule = Schedule(captions, reader.caption_image[captions], BATCH, 1, 0)
    for draw in schedule.epoch(0):  # whatever is read once only is not timed
        reader.batch(draw)
    print("ready", flush=True)
    for draw, _ in zip(itertools.chain.from_iterable(map(schedule.epoch, itertools.count(1))), sys.stdin, strict=False):
        begin = time.perf_counter()
        reader.batch(draw)
        print(time.perf_counter() - begin, flush=True)


def measure(steps: int, before: str, *, parts: bool) -> dict[str, float]:
    """Median milliseconds of a batch for each variant."""
    from upath import UPath

    with tempfile.TemporaryDirectory() as text, ExitStack() as stack:
        folder = Path(text)
        bench_training.ROWS, bench_training.SHARD = 2048, 64
        dataset, columns = write_cache(folder)
        local = Inputs.of(dataset.folder, columns, towers(parts), "float32")
        remote = replace(local, dataset=UPath(f"file://{dataset.folder}"))  # `place` would make a plain path of it
        node = {"ISTHMUS_LOCAL": str(folder / "copies"), "ISTHMUS_MEMORY_GIB": "4"}
        variants = {
            "local": (local, node),
            "copied": (remote, node),
            "streamed": (remote, {**node, "ISTHMUS_LOCAL_GIB": "0"}),
            **({"before": (local, {"BENCH_CHECKOUT": before})} if before else {}),
        }
        workers = {}
        for name, (inputs, variables) in variants.items():
            file = folder / f"{name}.pickle"
            file.write_bytes(pickle.dumps(inputs))
            worker = subprocess.Popen(
                [sys.executable, __file__, "--serve", str(file)],
                env={**os.environ, **variables},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                bufsize=1,
            )
            workers[name] = stack.enter_context(worker)
            assert worker.stdout is not None
            assert worker.stdout.readline() == "ready\n"
        times: dict[str, list[float]] = {name: [] for name in workers}
        for _ in range(steps):
            for name, worker in workers.items():
                assert worker.stdin is not None
                assert worker.stdout is not None
                worker.stdin.write("\n")
                times[name].append(1000 * float(worker.stdout.readline()))
        for worker in workers.values():
            worker.communicate()
    return {name: statistics.median(found) for name, found in times.items()}


def main() -> None:
    """Print medians and ratios for light and for heavy inputs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--before", default="", metavar="CHECKOUT", help="other sources to compare with")
    parser.add_argument("--serve", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(pickle.loads(Path(options.serve).read_bytes()))  # noqa: S301 - written by this script
        return
    for title, parts in (("pooled vectors", False), ("pooled vectors, grid and tokens", True)):
        found = measure(options.steps, options.before, parts=parts)
        step = bench_training.measure(3, parts=parts)["cache (ms a step)"]
        print(f"batches of {BATCH}, {title}: local {found['local']:.2f} ms, a training step {step:.0f} ms")
        for name in [name for name in found if name != "local"]:
            one, other = ("local", name) if name == "before" else (name, "local")
            more = (found[one] - found[other]) / step
            print(f"  {one + ' / ' + other:<20} {found[one] / found[other]:6.3f}   {more:+.1%} of the step")


if __name__ == "__main__":
    main()
