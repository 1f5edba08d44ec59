"""What it costs that images are decoded in a process of their own: extraction with it against extraction without.

    python benchmarks/bench_decoder.py [--folder PHOTOGRAPHS]

Both decode, prepare and encode the same JPEG files with EfficientNet-Lite0 in bfloat16, batch 8, on one thread and
under the allocator settings of extraction tasks, turn by turn in one process; the ratios are the median of the rounds.
CPU seconds are those of the process and of its child. Without `--folder` the pictures are rendered, of the size at
which Flickr's photographs are commonly kept.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMAGES = 96


def measure(folder: Path, rounds: int) -> dict[str, float]:
    """Milliseconds an image within the process, the decoder's own part, and the ratios."""
    import torch

    from featurize.extract import describe_images, image_encoder
    from featurize.images.decode import decode
    from featurize.images.decoder import Decoder

    torch.set_num_threads(1)
    encoder = image_encoder("efficientnet-lite0", "bfloat16")
    pictures = [path.read_bytes() for path in sorted(folder.iterdir())[:IMAGES]]
    decoder = Decoder(30.0)
    decoder.decode(pictures[0])
    child = decoder._idle[0]._process.pid  # noqa: SLF001 - its CPU time is half of the question

    def spent() -> tuple[float, float]:
        child_clock = ~child << 3 | 2  # as clock_getcpuclockid(3) makes it
        return time.process_time() + time.clock_gettime(child_clock), time.perf_counter()

    def run(open_image: Callable[[bytes], object]) -> tuple[float, float]:
        before = spent()
        prepared = (encoder.prepare(open_image(picture)) for picture in pictures)  # type: ignore[arg-type]
        describe_images(encoder, prepared, 8)
        return tuple(after - start for after, start in zip(spent(), before, strict=True))  # type: ignore[return-value]

    run(decode), run(decoder.decode)
    found = [(run(decode), run(decoder.decode)) for _ in range(rounds)]
    result = {}
    for place, clock in enumerate(("CPU", "wall")):
        within = statistics.median(here[place] for here, _ in found)
        ratio = statistics.median(there[place] / here[place] for here, there in found)
        result[f"in process ({clock}-ms an image)"] = 1000 * within / len(pictures)
        result[f"own process / in process, {clock}"] = ratio
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

    print("decoding, EfficientNet-Lite0", flush=True)
    with tempfile.TemporaryDirectory() as rendered:
        folder = options.folder or Path(rendered)
        if options.folder is None:
            write_pictures(folder)
        command = [sys.executable, __file__, "--measure", "--folder", str(folder), "--rounds", str(options.rounds)]
        subprocess.run(command, env={**os.environ, **WORKER_ENV}, cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
