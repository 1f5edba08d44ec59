"""Which rows each step takes, in which order, and how they are made ahead of the step."""

import itertools
import queue
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np

from featurize.shards import Array

T = TypeVar("T")


@dataclass(frozen=True)
class Draw:
    """Which rows are taken together: B captions of G images.

    Attributes:
        captions: (B,) caption rows; those of one image stand side by side.
        owner: (B,) ascending, which of the G images each belongs to.
        views: (G,) the view of each image.
    """

    captions: Array
    owner: Array
    views: Array

    def slices(self, workers: int) -> list[tuple[slice, slice]]:
        """What each worker has of the images and of the captions; shares differ by at most one image."""
        dealt = worker_slices(len(self.views), workers)
        ends = np.searchsorted(self.owner, [part.stop for part in dealt])
        return [
            (part, slice(int(start), int(end))) for part, start, end in zip(dealt, [0, *ends[:-1]], ends, strict=True)
        ]

    def part(self, images: slice, captions: slice) -> "Draw":
        """One of its slices."""
        return Draw(self.captions[captions], self.owner[captions] - images.start, self.views[images])

    def permuted(self, order: Array) -> "Draw":
        """Its pairs in another order, where every image has one caption."""
        return Draw(self.captions[order], self.owner, self.views[order])


def windows(shards: Array, window: int, seed: int, epoch: int) -> Array:
    """When an epoch comes to each caption: its shards in random order, `window` at a time; by (seed, epoch) alone.

    Args:
        shards: (M,) the shard that a caption's image is in.
        window: shards that are read at a time.
        seed: of the run.
        epoch: from 0.

    Returns:
        (M,) int64, 0 for the captions of the first `window` shards, 1 for those of the next ones, and so on.
    """
    present, which = np.unique(shards, return_inverse=True)
    turn: Array = np.random.default_rng([seed, epoch, 3]).permutation(len(present))[which] // window
    return turn


def epoch_order(
    caption_image: Array, seed: int, epoch: int, together: int = 1, turn: Array | None = None
) -> tuple[Array, Array]:
    """The order of an epoch over captions: a permutation of range(M) that depends on (seed, epoch) alone.

    Round r takes the r-th `together` captions of every image (in an order of the image's own), images shuffled anew in
    each round, so that nearly every batch shows each image once, whatever the number of captions an image has.

    Args:
        caption_image: (M,) image row of each caption.
        seed: of the run.
        epoch: from 0.
        together: captions of an image that stay side by side; fewer in its last round.
        turn: (M,) the part of the epoch that each caption belongs to, the same for all of an image; the rounds are
            those of a part.

    Returns:
        The permutation (M,), and for each of its places the number (M,) of the group that stays together, ascending.
    """
    rng = np.random.default_rng([seed, epoch])
    count = len(caption_image)
    by_image = np.lexsort((rng.random(count), caption_image))
    sorted_images = caption_image[by_image]
    place = np.arange(count) - np.searchsorted(sorted_images, sorted_images)  # among the image's captions
    leader = np.arange(count) - place % together  # the group's first caption
    keys = (rng.random(count)[leader], place // together)
    order = np.lexsort(keys if turn is None else (*keys, turn[by_image]))
    group = np.cumsum(np.diff(leader[order], prepend=-1) != 0) - 1
    return by_image[order], group


@dataclass(frozen=True)
class Schedule:
    """Which rows each step of each epoch takes; the same on every worker, for any number of workers.

    Attributes:
        captions: (M,) caption rows of the train split.
        caption_image: (M,) their image rows.
        batch: captions in the global batch, at most: the steps of an epoch are levelled.
        views: number of views to choose from.
        seed: of the run.
        together: captions of an image that a step takes at once.
        shards: (M,) the shard that each caption's image is in; needed for a window.
        window: shards whose rows are mixed, while no other is read; 0: all.
    """

    captions: Array
    caption_image: Array
    batch: int
    views: int
    seed: int
    together: int = 1
    shards: Array | None = None
    window: int = 0

    def turns(self, epoch: int) -> Array | None:
        """(M,) the window of an epoch that each caption is in; None without windows."""
        if not self.window:
            return None
        assert self.shards is not None, "a window is one of shards"
        return windows(self.shards, self.window, self.seed, epoch)

    @cached_property
    def groups(self) -> int:
        """How many times an epoch takes an image, with `together` of its captions or fewer."""
        _, counts = np.unique(self.caption_image, return_counts=True)
        return int((-(-counts // self.together)).sum())

    @property
    def steps(self) -> int:
        """Steps in an epoch; they differ in size by at most one image, so that every caption is used once."""
        return -(-self.groups // max(1, self.batch // self.together))

    @property
    def smallest(self) -> int:
        """Images of an epoch's smallest step."""
        return self.groups // self.steps

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Draw]:
        """The global batches."""
        order, group = epoch_order(self.caption_image, self.seed, epoch, self.together, self.turns(epoch))
        views = np.random.default_rng([self.seed, epoch, 1]).integers(0, self.views, group[-1] + 1)
        for step, groups in enumerate(np.array_split(np.arange(len(views)), self.steps)):
            if step >= first_step:
                first, end = np.searchsorted(group, [groups[0], groups[-1] + 1])
                yield Draw(self.captions[order[first:end]], group[first:end] - groups[0], views[groups])


def worker_slices(total: int, workers: int) -> list[slice]:
    """How a global batch of `total` pairs is dealt to workers: contiguous, sizes differing by at most one."""
    bounds = [len(part) for part in np.array_split(np.arange(total), workers)]
    starts = np.cumsum([0, *bounds])
    return [slice(int(start), int(end)) for start, end in itertools.pairwise(starts)]


class _End:
    """What follows the last item."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def prefetch(items: Iterator[T], depth: int = 4) -> Generator[T, None, None]:
    """Make items in a thread, up to `depth` ahead; an error there is raised here."""
    ready: queue.Queue[T | _End] = queue.Queue(depth)
    unwanted = threading.Event()

    def produce() -> None:
        end = _End(None)
        try:
            for item in items:
                _put(ready, item, unwanted)
                if unwanted.is_set():
                    return
        except BaseException as error:  # noqa: BLE001 - it is raised again in the consumer's thread
            end = _End(error)
        _put(ready, end, unwanted)

    thread = threading.Thread(target=produce, daemon=True)
    thread.start()
    try:
        while not isinstance(item := ready.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        unwanted.set()
        thread.join()


def _put(ready: "queue.Queue[T | _End]", item: T | _End, unwanted: threading.Event) -> None:
    """Wait for room, but not for a consumer that has gone."""
    while not unwanted.is_set():
        try:
            ready.put(item, timeout=0.1)
        except queue.Full:
            continue
        return
