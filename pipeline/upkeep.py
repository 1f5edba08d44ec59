"""The `cache` commands: what is there, whether it is sound, and what to do about it."""

from collections.abc import Collection, Iterator
from pathlib import Path

from featurize import export as features
from featurize import upkeep
from featurize.columns import column_folders
from featurize.config import FeaturizeConfig
from featurize.index import open_dataset
from featurize.manifest import CacheError, differences, environment, read_manifest
from featurize.places import Place, place, require_answer
from featurize.shards import ShardError
from featurize.verify import Problem, drift, verify
from pipeline.config import RayConfig
from pipeline.sessions import ray_session

DRIFT = 0.999
"""A row that is described again must have at least this cosine with what is stored: bfloat16 has 0.9999."""


def dataset_folders(cache: str) -> list[Place]:
    """The data sets of a cache.

    Raises:
        CacheError: there are none.
    """
    root = place(cache, CacheError)
    require_answer(root, CacheError)
    folders = upkeep.dataset_folders(root)
    if not folders:
        raise CacheError(f"{root}: no data sets here; `python -m pipeline featurize` makes some")
    return folders


def ls(cache: str) -> None:
    """Print every data set and column of a cache: rows, shape, bytes, and the run that read it last."""
    for folder in dataset_folders(cache):
        every = upkeep.uses(folder)
        print(f"{folder.name}  {_counts(folder, len(every))}")
        last = {name: use for use in every for name in use.columns}
        for path in column_folders(folder):
            use = last.get(path.name)
            used = f"{Path(use.run).name} {use.time[:10]}{_whereabouts(use)}" if use else "no run yet"
            print(f"  {path.name:<44} {_described(path):<50}  {used}")


def _whereabouts(use: upkeep.Use) -> str:
    if use.elsewhere:
        return f" (on {use.machine})"
    return "" if use.exists else " (gone)"


def _counts(folder: Place, runs: int) -> str:
    try:
        dataset = open_dataset(folder)
    except CacheError:
        return "damaged: `python -m pipeline cache verify` tells more"
    return f"{len(dataset.samples):,} images, {len(dataset.captions):,} captions, {runs} runs  {dataset.id}"


def _described(folder: Place) -> str:
    try:
        manifest = read_manifest(folder)
    except CacheError:
        return "damaged"
    if manifest is None:
        return "unfinished"
    shape = "x".join(["L", *map(str, manifest.shape)] if manifest.ragged else map(str, manifest.shape))
    return f"{manifest.rows:>9,} rows  {shape:>9} {manifest.dtype:<8} {manifest.size / 2**20:>9,.1f} MiB"


def check(cache: str, reextract: int) -> int:
    """Read everything, print what is wrong as it is found, and return how many things are.

    Args:
        cache: its folder.
        reextract: images of each column that are described again, to see how far this machine is from the cache.
    """
    problems = []
    for folder in dataset_folders(cache):
        for problem in _wrong(folder, reextract):
            print(problem, flush=True)
            problems.append(problem)
    mend = "; `python -m pipeline cache repair` mends shards" if any(p.mendable for p in problems) else ""
    print(f"problems: {len(problems)}{mend}" if problems else "every shard is as its manifest says")
    return len(problems)


def _wrong(folder: Place, reextract: int) -> Iterator[Problem]:
    """What is wrong with a data set and its columns."""
    known = set()
    for problem in verify(folder):
        known.add(problem.folder)
        yield problem
    if reextract and folder not in known:
        yield from _drifting(folder, reextract, known)


def _drifting(folder: Place, images: int, known: Collection[Place]) -> Iterator[Problem]:
    """Which columns this machine does not describe again as they were; of those in `known` it is said why already."""
    dataset = open_dataset(folder)
    for path in column_folders(folder):
        try:
            manifest = read_manifest(path)
            if manifest is None:
                continue
            drifted = drift(dataset, path, manifest, images)
        except (*upkeep.REFUSALS, ShardError) as error:
            if path not in known:
                yield Problem.of(path, error)
            continue
        print(drifted, flush=True)
        for line in differences(manifest.environment, environment()):
            print(f"  {line} here")
        if drifted.cosine < DRIFT:
            yield Problem(
                path,
                f"{path}: this machine describes rows otherwise (cosine {drifted.cosine:.4f}, expected {DRIFT} or "
                "more), for other libraries or another processor; mix what they say in no run",
            )


def explain(one: str, other: str) -> None:
    """Print in what two columns or data sets differ."""
    differing = upkeep.explain(place(one, CacheError), place(other, CacheError))
    print("\n".join(differing) if differing else "the same ingredients: nothing differs")


def repair(cache: str, ray: RayConfig) -> int:
    """Make again what is broken, print what was done, and return how many problems are left."""
    left = 0
    for folder in dataset_folders(cache):
        problems = list(verify(folder))
        if any(problem.mendable for problem in problems):
            for problem in problems:
                print(problem, flush=True)
            with ray_session(ray):
                mended, refused = upkeep.repair(open_dataset(folder), problems, FeaturizeConfig(max_quarantined=1.0))
            for problem in refused:
                print(f"cannot be made again here: {problem}")
            if mended:
                print(f"made again what was broken in {', '.join(path.name for path in mended)}", flush=True)
            problems = list(verify(folder))
        for problem in problems:
            print(f"left: {problem}")
        left += len(problems)
    print(f"problems left: {left}" if left else "every shard is as its manifest says")
    return left


def export(columns: list[str], target: str, kind: str) -> None:
    """Write columns as files for others, and print what was left out.

    Raises:
        CacheError: the target is a URI of a store, or as `featurize.export.export`.
    """
    if "://" in target:
        raise CacheError(
            f"OUT: found the URI {target}, expected a path: what is exported is written to a disk; export it to a file "
            "or folder here, and copy that there"
        )
    left_out = features.export([place(column, CacheError) for column in columns], Path(target), kind)
    print(f"{target} is written" + (f", without {left_out} rows that hold no values" if left_out else ""))


def gc(cache: str, days: float, *, delete: bool) -> None:
    """Print what no run needs, and free it if `delete`."""
    folders = dataset_folders(cache)
    free = [one for folder in folders for one in upkeep.removable(folder, days)]
    kept = [reason for folder in folders for reason in _kept(folder)]
    for one in free:
        print(f"{one.folder}  {one.size / 2**20:,.1f} MiB  {one.reason}")
    total = f"{sum(one.size for one in free) / 2**20:,.1f} MiB in {len(free)} folders"
    if delete:
        upkeep.remove(free)
        print(f"freed {total}")
    else:
        print(
            f"{total} would be freed by --delete" if free else "nothing to free: runs read every column, or it is young"
        )
    for reason in kept:
        print(reason)


def _kept(folder: Place) -> Iterator[str]:
    """Why more of a data set is kept than its runs, as they are seen from here, and its age call for."""
    if upkeep.is_busy(folder):
        yield f"{folder}: a job makes a column of it, and nothing of it is freed meanwhile"
    if machines := sorted({use.machine for use in upkeep.uses(folder) if use.elsewhere}):
        yield (
            f"{folder}: runs on {', '.join(machines)} cannot be seen from here and what they read is kept; when one is "
            "gone, remove the file in `uses` that names it"
        )
