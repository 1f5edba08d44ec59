"""What could not be used, and why: nothing is dropped without a line in `quarantine.jsonl`."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from featurize.manifest import CacheError
from featurize.places import Place, publish, read


@dataclass(frozen=True)
class Quarantined:
    """One thing that could not be used, and why.

    Attributes:
        image_id: whose it is.
        stage: "source" (the data contradicts itself: an id that is taken, a tar's sample without an image), "read" (no
            bytes), "caption" (no usable text), "decode" (no picture in the bytes), "describe" (the network's answer is
            no number), "import" (no values in the imported file).
        reason: what was found.
        sha256: of the image bytes, where there were any.
        columns: that lack it; none where the data set itself does.
    """

    image_id: str
    stage: str
    reason: str
    sha256: str = ""
    columns: tuple[str, ...] = ()


def read_quarantine(folder: Place) -> list[Quarantined]:
    """What a data set lacks, as it was last written; nothing where it never was.

    Raises:
        CacheError: the list is damaged.
    """
    path = folder / "quarantine.jsonl"
    try:
        plain: Iterable[Mapping[str, Any]] = map(json.loads, read(path).decode().splitlines())
        return [Quarantined(**{**line, "columns": tuple(line["columns"])}) for line in plain]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, KeyError) as error:
        raise CacheError(f"{path}: damaged ({error}); run `featurize` again, which writes it anew") from error


def write_quarantine(folder: Place, problems: Iterable[Quarantined]) -> None:
    """Publish what a data set lacks."""
    text = "".join(json.dumps(asdict(problem), ensure_ascii=True) + "\n" for problem in problems)
    publish(folder / "quarantine.jsonl", text.encode())


def check_quarantine(folder: Place, problems: Iterable[Quarantined], lost: int, total: int, limit: float) -> None:
    """End the job when too many images fail.

    Args:
        folder: of the data set, where the whole list is.
        problems: all that could not be used.
        lost: images that cannot be used.
        total: images that there are.
        limit: share of them that may be lost.

    Raises:
        CacheError: more are; the message shows the first reasons.
    """
    if total and lost / total > limit:
        first = "".join(f"\n  {p.image_id}: {p.stage}: {p.reason}" for p in list(problems)[:5])
        raise CacheError(
            f"{lost} of {total} images cannot be used, more than the {limit:.0%} that "
            f"--featurize.max_quarantined allows; all are listed in {folder / 'quarantine.jsonl'}. "
            f"The first reasons:{first}"
        )
