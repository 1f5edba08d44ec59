"""Extraction: our shard task against the naive loop and against the bare forward pass, per image.

    python benchmarks/bench_extraction.py

naive: torchvision ResNet-50 as tutorials write it: fp32, NCHW, batch 32, PIL resize and ToTensor for each image.
bare: the same network, precision and batch as our task, on tensors that are in memory already; no decoding, no file.
ours: `extract_shard` on JPEG files: read, decode, prepare, forward, write the tar.
All three run on one thread in processes of their own, under the allocator settings that extraction tasks get
(`naive` under the system's defaults, as it would be run), interleaved; weights are random, which costs the same.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMAGES = 128


def write_pictures(folder: Path) -> list[Path]:
    """JPEG files of the size that Flickr's are commonly kept at."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    paths = []
    for number in range(IMAGES):
        small = Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8))
        path = folder / f"{number}.jpg"
        small.resize((500, 375)).save(path, quality=90)
        paths.append(path)
    return paths


def naive(paths: list[Path]) -> float:
    """CPU seconds of the loop in torchvision's documentation."""
    import torch
    from PIL import Image
    from torchvision.models import resnet50
    from torchvision.transforms import v2

    transform = v2.Compose(
        [
            v2.Resize(256),
            v2.CenterCrop(224),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    net = resnet50().eval()
    start = time.process_time()
    with torch.no_grad():
        for first in range(0, len(paths), 32):
            batch = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths[first : first + 32]])
            net(batch)
    return time.process_time() - start


def _encoder() -> object:
    from featurize.describe import image_encoder

    return image_encoder("torchvision:resnet50@random", "bfloat16")


def bare(paths: list[Path]) -> float:
    """CPU seconds of the forward pass alone, as our task calls it."""
    import torch

    encoder = _encoder()
    batch = torch.randint(0, 255, (8, 3, 224, 224), dtype=torch.uint8)
    start = time.process_time()
    for _ in range(0, len(paths), 8):
        encoder.encode(batch)  # type: ignore[attr-defined]
    return time.process_time() - start


def ours(paths: list[Path]) -> float:
    """CPU seconds of one shard task, from JPEG files to a published tar."""
    from featurize.datasets.sample import Sample
    from featurize.extract import ShardTask, Target, extract_shard

    card = _encoder().card  # type: ignore[attr-defined]
    (pooled,) = (output for output in card.outputs if output.name == "pooled")
    samples = tuple(Sample(path.stem, str(path), ("-",), "train") for path in paths)
    with tempfile.TemporaryDirectory() as folder:
        task = ShardTask(
            "image",
            "torchvision:resnet50@random",
            card,
            "bfloat16",
            "plain",
            0,
            samples,
            tuple(hashlib.sha256(path.read_bytes()).hexdigest() for path in paths),
            (Target(pooled, Path(folder)),),
            8,
            30.0,
        )
        start = time.process_time()
        extract_shard(task)
        return time.process_time() - start


VARIANTS = {"naive": naive, "bare": bare, "ours": ours}


def measure(repeats: int) -> dict[str, float]:
    """Median CPU milliseconds per image of each variant, and the ratios."""
    sys.path.insert(0, str(ROOT))
    from featurize.extract import WORKER_ENV

    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(Path(folder))
        for _ in range(repeats):
            for name, found in times.items():
                env = {**os.environ, "OMP_NUM_THREADS": "1", **({} if name == "naive" else WORKER_ENV)}
                command = [sys.executable, __file__, "--variant", name, "--folder", folder]
                done = subprocess.run(command, env=env, cwd=ROOT, check=True, capture_output=True, text=True)
                found.append(json.loads(done.stdout.splitlines()[-1]))
    medians = {name: 1000 * statistics.median(found) / IMAGES for name, found in times.items()}
    return {
        **{f"{name} (CPU-ms an image)": value for name, value in medians.items()},
        "naive / ours": medians["naive"] / medians["ours"],
        "ours / bare": medians["ours"] / medians["bare"],
    }


def main() -> None:
    """Print medians and ratios, or run one variant for the parent process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant:
        sys.path.insert(0, str(ROOT))
        import torch

        torch.set_num_threads(1)
        print(json.dumps(VARIANTS[options.variant](sorted(Path(options.folder).glob("*.jpg")))))
        return
    print("extraction, ResNet-50")
    for name, value in measure(options.repeats).items():
        print(f"  {name:<28} {value:8.2f}")


if __name__ == "__main__":
    main()
