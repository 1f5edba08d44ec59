"""What it costs that extraction trusts nothing: images checked and watched, or decoded in a process of their own.

    python benchmarks/bench_checks.py [--folder PHOTOGRAPHS]

All decode, prepare and encode the same JPEG files with EfficientNet-Lite0 in bfloat16, batch 8, on one thread and under
the allocator settings of extraction tasks, turn by turn in one process: bare; as a shard's first attempt does it, which
compares each image's sha256 and sets a clock for its decoder; and as an attempt after a worker's death does it, in a
process of its own. Ratios are medians over the rounds; CPU seconds are those of the process and of its child. Without
`--folder` the pictures are rendered, of the size at which Flickr's photographs are commonly kept.
"""

import argparse
import hashlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[1]
IMAGES = 96


def measure(folder: Path, rounds: int) -> dict[str, float]:
    """Milliseconds an image of the bare work, and the ratios to it."""
    import torch

    from featurize.describe import describe_images, image_encoder
    from featurize.images.decode import decode
    from featurize.images.decoder import Decoder, ends_after

    torch.set_num_threads(1)
    encoder = image_encoder("efficientnet-lite0", "bfloat16")
    pictures = [path.read_bytes() for path in sorted(folder.iterdir())[:IMAGES]]
    digests = {hashlib.sha256(picture).hexdigest() for picture in pictures}
    decoder = Decoder(30.0)
    decoder.decode(pictures[0])
    child = decoder._idle[0]._process.pid  # noqa: SLF001 - its CPU time is half of the question

    def checked(picture: bytes) -> Image.Image:
        if hashlib.sha256(picture).hexdigest() not in digests:
            raise ValueError("changed")
        with ends_after(30.0):
            return decode(picture)

    def spent() -> tuple[float, float]:
        child_clock = ~child << 3 | 2  # as clock_getcpuclockid(3) makes it
        return time.process_time() + time.clock_gettime(child_clock), time.perf_counter()

    def run(opened: Callable[[bytes], Image.Image]) -> tuple[float, float]:
        before = spent()
        describe_images(encoder, (encoder.prepare(opened(picture)) for picture in pictures), 8)
        cpu, wall = (after - start for after, start in zip(spent(), before, strict=True))
        return cpu, wall

    variants = {"bare": decode, "checked": checked, "own process": decoder.decode}
    found = [{name: run(opened) for name, opened in variants.items()} for _ in range(rounds + 1)][1:]
    result = {}
    for place, clock in enumerate(("CPU", "wall")):
        bare = statistics.median(times["bare"][place] for times in found)
        result[f"bare ({clock}-ms an image)"] = 1000 * bare / len(pictures)
        for name in ("checked", "own process"):
            ratio = statistics.median(times[name][place] / times["bare"][place] for times in found)
            result[f"{name} / bare, {clock}"] = ratio
    return result


def main() -> None:
    """Print medians and ratios; starts itself again with the settings that extraction tasks get."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", type=Path, help="JPEG files (rendered ones)")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    if options.measure:
        for name, value in measure(options.folder, options.rounds).items():
            print(f"  {name:<34} {value:8.3f}")
        return
    from bench_extraction import write_pictures

    from featurize.extract import WORKER_ENV

    print("checks, EfficientNet-Lite0", flush=True)
    with tempfile.TemporaryDirectory() as rendered:
        folder = options.folder or Path(rendered)
        if options.folder is None:
            write_pictures(folder)
        command = [sys.executable, __file__, "--measure", "--folder", str(folder), "--rounds", str(options.rounds)]
        subprocess.run(command, env={**os.environ, **WORKER_ENV}, cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
