"""Ranks by counting against ranks by sorting, on COCO's size: 5K images and their 25K captions, images ask.

    PYTHONPATH=. python benchmarks/bench_ranks.py --repeats 5

Both ways compute the same float64 distances and must find the same ranks. They are timed in turn, so that a
busy machine slows both; the ratios are of medians. The matrix product alone is timed too: it is
common to both, so the second ratio leaves it out and compares what they do with the scores.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from evaluate.ranks import Relevance, rank_relevant


def rank_by_argsort(queries: Tensor, items: Tensor, relevance: Relevance, tile: int) -> Tensor:
    """The usual way: sort every row of distances, look up the places of the relevant items."""
    places = []
    rows = relevance.rows()
    for first in range(0, len(queries), tile):
        order = _products(queries[first : first + tile], items).argsort(dim=1)
        place = torch.empty_like(order)
        place.scatter_(1, order, torch.arange(len(items)).expand_as(order))
        inside = (rows >= first) & (rows < first + tile)
        places.append(place[rows[inside] - first, relevance.indices[inside]] + 1)
    return torch.cat(places)


def measure(
    repeats: int, images: int = 5000, captions_each: int = 5, dimensions: int = 256, tile: int = 1024
) -> dict[str, float]:
    """Times both ways, interleaved.

    Returns:
        Median seconds of `counting`, `argsort` and the `products` alone; `ratio` = argsort / counting, and
        `ratio_ranking`, the same with the products subtracted from both.
    """
    generator = torch.Generator().manual_seed(0)
    owner = torch.arange(images).repeat_interleave(captions_each)
    pictures = torch.randn(images, dimensions, generator=generator)
    texts = pictures[owner] + 2 * torch.randn(len(owner), dimensions, generator=generator)
    relevance = Relevance.image_to_text(owner, images)

    def products() -> None:
        for first in range(0, images, tile):
            for begin in range(0, len(texts), tile):
                _products(pictures[first : first + tile], texts[begin : begin + tile])

    ways: dict[str, Callable[[], object]] = {
        "counting": lambda: rank_relevant(pictures, texts, relevance, tile).values,
        "argsort": lambda: rank_by_argsort(pictures, texts, relevance, tile),
        "products": products,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, object] = {}
    for _ in range(repeats):
        for name, way in ways.items():
            begin = time.perf_counter()
            found[name] = way()
            seconds[name].append(time.perf_counter() - begin)
    assert isinstance(found["counting"], Tensor)
    assert isinstance(found["argsort"], Tensor)
    if not found["counting"].equal(found["argsort"]):
        raise RuntimeError("counting and argsort found different ranks; one of them is wrong")
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    counting, argsort, both = (medians[name] for name in ("counting", "argsort", "products"))
    return {**medians, "ratio": argsort / counting, "ratio_ranking": (argsort - both) / (counting - both)}


def _products(queries: Tensor, items: Tensor) -> Tensor:
    """Distances up to a constant of the query, float64."""
    items = items.double()
    return torch.addmm(items.square().sum(dim=1), queries.double(), items.T, alpha=-2)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--dimensions", type=int, default=256)
    given = parser.parse_args()
    for name, value in measure(given.repeats, given.images, dimensions=given.dimensions).items():
        print(f"{name:14} {value:8.2f} {'times' if name.startswith('ratio') else 's'}")


if __name__ == "__main__":
    main()
