"""Ranks by counting against ranks by sorting, on COCO's size: 5K images and their 25K captions, both directions.

    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/bench_ranks.py --repeats 5

Sorting is the usual way: float32 distances, `argsort` of every row, the place of the first relevant item. Counting
(`rank_relevant`) finds the rank of *every* relevant item, exactly as float64 orders them. Both use one thread and are
timed in turn, in CPU seconds, so that a busy machine slows both; ratios are of medians. The float32 matrix
product, which both need, is timed alone too: `ranking` leaves it out on both sides. `both` ranks the two directions
at once (`rank_both`) and is compared with sorting in both.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from evaluate.ranks import Relevance, rank_both, rank_relevant

MODELS = {"is sound": 4.0, "knows nothing": 1e4}
"""Length of the noise that sets a caption apart from its image, of length one; 4 gives an R@1 of about 90 and 60."""


def rank_by_argsort(queries: Tensor, items: Tensor, owned: Tensor, owner: Tensor, tile: int) -> Tensor:
    """Best rank (Q,) of the items whose `owner` (M,) is the query's `owned` (Q,), by sorting."""
    places = []
    for first in range(0, len(queries), tile):
        order = _products(queries[first : first + tile], items).argsort(dim=1)
        relevant = owner[order] == owned[first : first + tile, None]
        places.append(relevant.byte().argmax(dim=1) + 1)
    return torch.cat(places)


def measure(
    repeats: int, noise: float, images: int = 5000, captions_each: int = 5, dimensions: int = 256, tile: int = 1024
) -> dict[str, float]:
    """Times both ways, interleaved.

    Returns:
        Median CPU seconds of each way, under its name, and ratios under "direction: total" and "direction: ranking".

    Raises:
        RuntimeError: the two ways disagree by more than float32 can explain.
    """
    generator = torch.Generator().manual_seed(0)
    owner = torch.arange(images).repeat_interleave(captions_each)
    pictures = normalize(torch.randn(images, dimensions, generator=generator))
    apart = torch.randn(len(owner), dimensions, generator=generator) * (noise / dimensions**0.5)
    texts = normalize(pictures[owner] + apart)
    to_text, to_image = Relevance.image_to_text(owner, images), Relevance.text_to_image(owner)
    numbers = torch.arange(images)

    def products() -> Tensor:
        for first in range(0, images, tile):
            for begin in range(0, len(texts), tile):
                _products(pictures[first : first + tile], texts[begin : begin + tile])
        return numbers

    ways: dict[str, Callable[[], Tensor]] = {
        "i2t argsort": lambda: rank_by_argsort(pictures, texts, numbers, owner, tile),
        "i2t counting": lambda: rank_relevant(pictures, texts, to_text, tile).best(),
        "t2i argsort": lambda: rank_by_argsort(texts, pictures, owner, numbers, tile),
        "t2i counting": lambda: rank_relevant(texts, pictures, to_image, tile).best(),
        "both counting": lambda: torch.cat([one.best() for one in rank_both(pictures, texts, to_text, tile)]),
        "product": products,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, Tensor] = {}
    for _ in range(repeats):
        for name, way in ways.items():
            begin = time.process_time()
            found[name] = way()
            seconds[name].append(time.process_time() - begin)
    found["both argsort"] = torch.cat([found["i2t argsort"], found["t2i argsort"]])
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratios = {}
    for direction, sorting, products_needed in (
        ("i2t", medians["i2t argsort"], 1),
        ("t2i", medians["t2i argsort"], 1),
        ("both", medians["i2t argsort"] + medians["t2i argsort"], 2),
    ):
        # float32 misjudges a pair in some ten thousand, and argsort breaks ties by position.
        differ = (found[f"{direction} argsort"] - found[f"{direction} counting"]).abs()
        if differ.max() > 3 + len(texts) // 1000:
            raise RuntimeError(
                f"{direction}: counting and sorting differ by {differ.max()} ranks; one of them is wrong"
            )
        counting = medians[f"{direction} counting"]
        ratios[f"{direction}: total"] = sorting / counting
        ratios[f"{direction}: ranking"] = (sorting - products_needed * medians["product"]) / (
            counting - medians["product"]
        )
    return medians | ratios


def _products(queries: Tensor, items: Tensor) -> Tensor:
    """Float32 distances up to a constant of the query."""
    return torch.addmm(items.square().sum(dim=1), queries, items.T, alpha=-2)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--dimensions", type=int, default=256)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for model, noise in MODELS.items():
        print(f"a model that {model}")
        for name, value in measure(given.repeats, noise, given.images, dimensions=given.dimensions).items():
            print(f"  {name:14} {value:8.2f} {'times' if ':' in name else 's'}", flush=True)


if __name__ == "__main__":
    main()
