"""The road of a run: index, extract, train, evaluate, index for search, report.

Each stage is a function of a `RunConfig`; the command line calls them by name.
"""

import dataclasses
import json
import warnings
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import torch

from evaluate.embed import embed_split
from evaluate.hubness import HubnessCorrection
from evaluate.metrics import CollapseWarning, Report
from evaluate.search import CORRECTION_FILE, Hit, Searcher, build_index
from evaluate.tune import tune_share
from featurize import cache as feature_cache
from featurize.cache import CacheError, Dataset, open_dataset
from featurize.datasets.load import load, protocol_of
from featurize.extract import PlannedColumn, plan
from featurize.extract import featurize as extract
from featurize.shards import publish
from pipeline import pages, tracking
from pipeline.config import CONFIG_FILE, RunConfig, dump_yaml, load_yaml, merge, run_name
from pipeline.measuring import Validation, comparison, fit_correction, keep
from pipeline.sessions import ray_session
from train.batches import FeatureReader, Inputs, wanted_outputs
from train.fit import fit
from train.hosts import DualEncoder
from train.loop import Work, feature_dims, start
from train.state import open_model, save_model
from train.targets import Targets


def _index(config: RunConfig) -> Dataset:
    """Read the source, check it and hash it."""
    print(f"data set {config.data.dataset}: reading and hashing images", flush=True)
    samples = load(config.data, Path(config.cache).absolute() / "scenes")
    dataset = feature_cache.index(
        samples,
        config.data.dataset,
        Path(config.cache).absolute(),
        max_quarantined=config.featurize.max_quarantined,
    )
    counts = {split: len(dataset.rows_of(split)) for split in sorted({s.split for s in dataset.samples})}
    listed = ", ".join(f"{count} {split or 'without split'}" for split, count in counts.items())
    print(f"  {len(dataset.samples)} images ({listed}), {len(dataset.captions)} captions", flush=True)
    if dataset.quarantine:
        print(f"  {len(dataset.quarantine)} quarantined: {dataset.folder / 'quarantine.jsonl'}", flush=True)
    return dataset


def _plan(config: RunConfig, dataset: Dataset) -> list[PlannedColumn]:
    return plan(dataset, config.featurize, *wanted_outputs(config.train))


def featurize(config: RunConfig) -> tuple[Dataset, list[PlannedColumn]]:
    """Index the data and extract every column that the recipe reads and the cache lacks."""
    dataset = _index(config)
    columns = _plan(config, dataset)
    with ray_session(config.ray):
        extract(dataset, config.featurize, columns)
    return dataset, columns


def _new_run(config: RunConfig) -> Path:
    folder = Path(config.runs).absolute() / run_name(config, datetime.now(UTC))
    if (folder / CONFIG_FILE).exists():
        raise CacheError(f"{folder} exists; give another --name, or continue it with `train --resume {folder}`")
    folder.mkdir(parents=True, exist_ok=True)
    publish(folder / CONFIG_FILE, dump_yaml(config).encode())
    return folder


def _work(config: RunConfig, dataset: Dataset, columns: list[PlannedColumn], log: tracking.Tracker) -> Work:
    inputs = Inputs.of(dataset.folder, columns, config.train, config.featurize.precision)
    validation = Validation(inputs, config.data.evaluate, _protocol(config), config.evaluate.tile)
    return Work(config.train, inputs, config.data.train, validation, log.log)


def _protocol(config: RunConfig, asked: str | None = None) -> str:
    protocol = asked or config.evaluate.protocol
    return protocol_of(config.data) if protocol == "auto" else protocol


def _train(config: RunConfig, folder: Path, dataset: Dataset, columns: list[PlannedColumn]) -> None:
    """Fit heads in a run folder, measure them, index them and write the report; MLflow sees it all."""
    if (folder / tracking.RUN_FILE).exists():
        tracker = tracking.resume(folder)
    else:
        identities = {f"cache.{column.name}": column.id for column in columns}
        tracker = tracking.start(config, folder, {"cache.dataset": dataset.id, **identities})
        for split, context in ((config.data.train, "training"), (config.data.evaluate, "evaluation")):
            tracker.dataset(f"{dataset.name}-{split}", str(dataset.folder), dataset.id, context)
    status: tracking.Status = "FAILED"
    try:
        work = _work(config, dataset, columns, tracker)
        assert isinstance(work.validate, Validation)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CollapseWarning)  # untrained heads may well know nothing
            reader = FeatureReader(work.inputs)
            targets = Targets.of(reader, work.split, config.train.objective, config.train.seed)
            untrained = work.validate.report(start(work, reader, targets, torch.device("cpu")).evaluated.eval())
        print(f"run {folder.name}: untrained heads reach rSum {untrained.rsum:.1f}; training", flush=True)
        fitted = fit(work, folder)
        publish(folder / "training.json", json.dumps(dataclasses.asdict(fitted), indent=1).encode())
        model, _ = open_model(folder / "model")
        if isinstance(model, DualEncoder) and model.image_local is not None:
            share = tune_share(model, *embed_split(model, reader, config.data.evaluate), tile=config.evaluate.tile)
            print(f"local space: share {share:.2f} of the similarity is best on {config.data.evaluate}", flush=True)
            dims = feature_dims(reader, config.train)
            save_model(folder / "model", model.state_dict(), config.train.model, dims, work.inputs)
        trained = work.validate.report(model)
        keep(folder, "", trained, reader.owners(config.data.evaluate))
        reports = {"trained": trained, "untrained": untrained}
        logged = {**trained.as_flat(), **{f"fit/{k}": float(v) for k, v in dataclasses.asdict(fitted).items()}}
        correction = fit_correction(model, reader, config.data.train, config.evaluate.hubness, config.train.seed)
        if correction is not None:
            correction.save(folder / "model" / CORRECTION_FILE)
            reports["corrected for hubness"] = corrected = work.validate.report(model, correction)
            keep(folder, "-corrected", corrected)
            logged |= {f"corrected/{name}": value for name, value in corrected.as_flat().items()}
        if model.indexable:
            build_index(model, reader, folder / "index")
        page = pages.write_run_page(folder, config, reports, model, reader)
        tracker.log(logged, 0)
        for path, under in (
            (folder / CONFIG_FILE, ""),
            (folder / "metrics.json", ""),
            (page, ""),
            (folder / "model", "checkpoint"),
        ):
            tracker.artifact(path, under)
        print(_summary(config, folder, dataset, reports, page, tracker))
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        tracker.close(status)


def _summary(
    config: RunConfig,
    folder: Path,
    dataset: Dataset,
    reports: Mapping[str, Report],
    page: Path,
    tracker: tracking.Tracker,
) -> str:
    try:
        shown = folder.relative_to(Path.cwd())
    except ValueError:
        shown = folder
    indexed = (folder / "index").exists()
    return "\n".join(
        [
            "",
            reports["trained"].as_table(),
            *(f"{name}: rSum {report.rsum:.1f}" for name, report in reports.items() if name != "trained"),
            "",
            f"run     {folder}",
            f"cache   {dataset.folder}",
            f"page    {page}",
            f"mlflow  {tracker.uri}, experiment {tracker.experiment}",
            "",
            "what to type next",
            *([f'  python -m pipeline search {shown} "{min(dataset.captions, key=len)}"'] if indexed else []),
            f"  python -m pipeline run {config.method} --dataset {config.data.dataset}"
            + (f" --root {config.data.root}" if config.data.root else "")
            + " --train.lr 5e-4     # a second experiment: nothing is extracted again",
            f"  mlflow ui --backend-store-uri {tracker.uri}" if "sqlite" in tracker.uri else f"  open {tracker.uri}",
        ]
    )


def run(config: RunConfig) -> Path:
    """The whole road; returns the run's folder."""
    with ray_session(config.ray):
        dataset, columns = featurize(config)
        folder = _new_run(config)
        _train(config, folder, dataset, columns)
    return folder


def train(config: RunConfig) -> Path:
    """Train on a cache that is complete already; extracts nothing.

    Raises:
        CacheError: a column is missing.
    """
    dataset = _index(config)
    columns = _plan(config, dataset)
    for column in columns:
        feature_cache.open_column(dataset, column.name, column.id)
    folder = _new_run(config)
    _train_with_ray_if_needed(config, folder, dataset, columns)
    return folder


def _train_with_ray_if_needed(config: RunConfig, folder: Path, dataset: Dataset, columns: list[PlannedColumn]) -> None:
    if config.train.workers == 0:
        _train(config, folder, dataset, columns)
        return
    with ray_session(config.ray):
        _train(config, folder, dataset, columns)


def resume(folder: Path) -> Path:
    """Continue an interrupted run in its folder, from its last checkpoint and in its MLflow run."""
    config = merge(RunConfig(), load_yaml(folder / CONFIG_FILE), str(folder / CONFIG_FILE))
    dataset = _index(config)
    _train_with_ray_if_needed(config, folder, dataset, _plan(config, dataset))
    return folder


def evaluate(folder: Path, split: str | None, protocol: str | None) -> None:
    """Measure a finished run again, on a split or by a protocol of choice; prints, and keeps `metrics-<split>.json`."""
    model, inputs = open_model(folder / "model")
    config = merge(RunConfig(), load_yaml(folder / CONFIG_FILE), str(folder / CONFIG_FILE))
    chosen = split or config.data.evaluate
    validation = Validation(inputs, chosen, _protocol(config, protocol), config.evaluate.tile)
    report = validation.report(model)
    keep(folder, f"-{chosen}", report)
    print(report.as_table())
    correction = folder / "model" / CORRECTION_FILE
    if correction.exists():
        corrected = validation.report(model, HubnessCorrection.open(correction))
        keep(folder, f"-{chosen}-corrected", corrected)
        print(f"corrected for hubness: rSum {corrected.rsum:.1f}")
    if (folder / tracking.RUN_FILE).exists():
        try:
            tracking.sync(folder)
        except tracking.TrackingError as error:
            print(f"warning: {error}")


def compare(folders: list[Path]) -> None:
    """Print runs side by side: recalls, intervals, and by what each differs from the first."""
    print(comparison(folders))


def search(folder: Path, queries: list[str], k: int, page: Path | None, *, corrected: bool) -> None:
    """Answer queries, each a text or a picture's file, with files and distances; on a page too, if one is named."""
    searcher = Searcher.open(folder)
    answers: list[tuple[str | Path, list[Hit]]] = []
    for text in queries:
        query = Path(text) if _is_picture(text) else text
        hits = searcher.search(query, k, corrected=corrected)
        answers.append((query, hits))
        print(f"\n{text}")
        for hit in hits:
            print(f"  {hit.rank:>3}  {hit.distance:6.3f}  {hit.sample.image}  {hit.sample.captions[0]}")
    if page is not None:
        pages.write_search_page(page, folder.name, answers)
        print(f"\npage {page}")


def _is_picture(text: str) -> bool:
    return Path(text).suffix.lower() in {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}


def cache_ls(cache: str) -> None:
    """Print every data set and column of a cache: rows, bytes, identity."""
    folders = _dataset_folders(cache)
    for folder in folders:
        dataset = open_dataset(folder)
        print(f"{folder.name}  {len(dataset.samples)} images, {len(dataset.captions)} captions")
        for path, manifest in feature_cache.list_columns(folder):
            if manifest is None:
                print(f"  {path.name:<48} unfinished")
                continue
            shape = "x".join(["L", *map(str, manifest.shape)] if manifest.ragged else map(str, manifest.shape))
            print(
                f"  {path.name:<48} {manifest.rows:>9,} rows  {shape:>10} {manifest.dtype}  "
                f"{manifest.size / 2**20:>9,.1f} MiB"
            )


def cache_verify(cache: str) -> int:
    """Read everything, print what is wrong, and return how many things are."""
    problems = [problem for folder in _dataset_folders(cache) for problem in feature_cache.verify(folder)]
    for problem in problems:
        print(problem)
    print(f"{len(problems)} problems" if problems else "every shard is as its manifest says")
    return len(problems)


def _dataset_folders(cache: str) -> list[Path]:
    root = Path(cache)
    folders = sorted(path.parent for path in root.glob("*@*/samples.parquet"))
    if not folders:
        raise CacheError(f"{root.absolute()}: no data sets here; `python -m pipeline featurize` makes some")
    return folders
