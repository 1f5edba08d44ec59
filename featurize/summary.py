"""What could not be used, in a few lines: how many of which kind, where the list is, what to do."""

import re
from collections import Counter
from collections.abc import Iterable

from featurize.index import Dataset
from featurize.quarantine import Quarantined

_KINDS_SHOWN = 5


def lost_images(dataset: Dataset) -> int:
    """How many images indexing left out; a caption alone costs no image."""
    return _lost(dataset.quarantine, {sample.image_id for sample in dataset.samples})


def _lost(problems: Iterable[Quarantined], present: set[str]) -> int:
    """How many images problems cost; one of the source is an image of its own, whoever else has its id."""
    by_id = {
        p.image_id for p in problems if p.stage != "source" and (p.image_id not in present or p.stage != "caption")
    }
    return len(by_id) + sum(problem.stage == "source" for problem in problems)


def kind(reason: str) -> str:
    """What reasons of one kind have in common: names, numbers and details are cut off.

    >>> kind("DecodeError: truncated or corrupt image: OSError: image file is truncated (3 bytes not processed)")
    'truncated or corrupt image'
    """
    clause = re.split(r"[:;(]| from ", reason.removeprefix("DecodeError: "), maxsplit=1)[0]
    return re.sub(r"^caption \d+", "a caption", clause.strip())


def summary(dataset: Dataset, problems: Iterable[Quarantined], limit: float) -> str:
    """Eight lines at most.

    Args:
        dataset: whose.
        problems: of indexing and extraction.
        limit: share of images that may be lost.
    """
    problems = list(problems)
    present = {sample.image_id for sample in dataset.samples}
    total = len(present) + lost_images(dataset)
    captions = sum(problem.reason.startswith("caption ") for problem in problems)
    counts = Counter(f"{problem.stage}: {kind(problem.reason)}" for problem in problems)
    listed = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    allowed = f"--featurize.max_quarantined allows {limit:.0%}"
    lines = [
        f"quarantined: {_lost(problems, present)} of {total} images ({allowed}), {captions} captions",
        *(f"{count:6}  {name}" for name, count in listed[:_KINDS_SHOWN]),
    ]
    if others := listed[_KINDS_SHOWN:]:
        lines.append(f"{sum(count for _, count in others):6}  of {len(others)} more kinds")
    lines.append(
        f"each is listed with its reason in {dataset.folder / 'quarantine.jsonl'}: repair or replace the files and "
        "captions named there, and run again"
    )
    return "\n".join(lines)
