"""The road of a run: index, extract, train, evaluate, index for search, report.

Each stage is a function of a `RunConfig`; the command line calls them by name.
"""

import dataclasses
import json
import os
import shlex
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from PIL import Image

from evaluate.codes import check_codes, save_codebook
from evaluate.embed import EmbeddedSplit
from evaluate.hubness import HubnessCorrection
from evaluate.metrics import CollapseWarning, Report
from evaluate.protocols import COCO_IMAGES
from evaluate.search import CORRECTION_FILE, Hit, Searcher, build_index
from evaluate.tune import tune_share
from featurize import index as feature_index
from featurize.columns import column_folder, open_column
from featurize.copies import Node
from featurize.datasets.load import load, protocol_of
from featurize.datasets.sample import IMAGE_SUFFIXES
from featurize.fill import fill
from featurize.images.decode import DecodeError, decode
from featurize.index import Dataset, open_dataset
from featurize.leases import LOCK
from featurize.manifest import CacheError, read_manifest
from featurize.places import place, publish, require_answer
from featurize.plan import PlannedColumn, plan
from featurize.upkeep import note_use
from pipeline import pages, tracking
from pipeline.config import CONFIG_FILE, ConfigError, RunConfig, dump_yaml, load_yaml, merge, run_name
from pipeline.measuring import Measured, Validation, comparison, fit_codes, fit_correction, keep_hits, measure
from pipeline.sessions import ray_session
from train.batches import Inputs, wanted_outputs
from train.config import QuantizationConfig
from train.fit import fit
from train.hosts import DualEncoder, Embedder
from train.loop import Work, feature_dims, start
from train.models import open_ensemble, open_model, save_ensemble, save_model
from train.targets import Targets

ENSEMBLE = "ensemble"
"""The method of a run that joins others."""


def _index(config: RunConfig) -> Dataset:
    """Read the source, check it and hash it."""
    print(f"data set {config.data.dataset}: reading and hashing images", flush=True)
    cache = place(config.cache, CacheError)
    require_answer(cache, CacheError)
    # pictures are drawn on a disk; beside the copies where the cache has none
    samples = load(config.data, (cache if isinstance(cache, Path) else Node.here().folder) / "scenes")
    dataset = feature_index.index(
        samples,
        config.data.dataset,
        cache,
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
        fill(dataset, config.featurize, columns)
    return dataset, columns


TRAINING_FILE = "training.json"
"""In a run's folder: what training took."""
CACHE_FILE = "cache.json"
"""In a run's folder: the version of the data and the columns that it reads, whatever its source holds later."""


def _new_run(config: RunConfig, dataset: Dataset, columns: Mapping[str, str]) -> Path:
    """A run's folder, pinned to identities of the cache; its settings, by which it is known, are written last."""
    folder = Path(config.runs).absolute() / run_name(config, datetime.now(UTC))
    if (folder / CONFIG_FILE).exists():
        raise CacheError(f"{folder} exists; give another --name, or continue it with `train --resume {folder}`")
    folder.mkdir(parents=True, exist_ok=True)
    pin = {"dataset": str(dataset.folder), "id": dataset.id, "columns": dict(columns)}
    publish(folder / CACHE_FILE, json.dumps(pin, indent=1).encode())
    publish(folder / CONFIG_FILE, dump_yaml(config).encode())
    note_use(dataset, folder, columns.items())
    return folder


def _settings(folder: Path) -> RunConfig:
    """The settings that a run began with."""
    return merge(RunConfig(), load_yaml(folder / CONFIG_FILE), str(folder / CONFIG_FILE))


def _pinned(folder: Path) -> tuple[Dataset, list[PlannedColumn]]:
    """The data and the columns that a run began with."""
    pin = json.loads((folder / CACHE_FILE).read_text("utf-8"))
    dataset = open_dataset(place(pin["dataset"], CacheError))
    if dataset.id != pin["id"]:
        raise CacheError(f"{dataset.folder}: holds the data set {dataset.id}, {folder.name} began with {pin['id']}")
    columns = []
    for name, column_id in pin["columns"].items():
        manifest = read_manifest(open_column(dataset, name, column_id).folder)
        assert manifest is not None, "an opened column has one"
        columns.append(PlannedColumn.of(column_folder(dataset, name, column_id), manifest))
    return dataset, columns


def _identities(columns: Sequence[PlannedColumn]) -> dict[str, str]:
    return {column.name: column.id for column in columns}


def _protocol(config: RunConfig, asked: str | None = None) -> str:
    protocol = asked or config.evaluate.protocol
    return protocol_of(config.data) if protocol == "auto" else protocol


def _inputs(config: RunConfig, dataset: Dataset, columns: Sequence[PlannedColumn]) -> Inputs:
    return Inputs.of(dataset.folder, columns, config.train, config.featurize.precision)


def _validation(config: RunConfig, inputs: Inputs) -> Validation:
    """What measures a run, with the cache opened: before the run's folder is made.

    Raises:
        CacheError: a column is missing.
        ConfigError: the protocol is COCO's, and the split that is evaluated has not as many images.
    """
    validation = Validation(inputs, config.data.evaluate, _protocol(config), config.evaluate.tile)
    found = len(validation.reader.split(validation.split)[0])
    if validation.protocol == "coco" and found != COCO_IMAGES:
        raise ConfigError(
            f"the split {validation.split!r} has {found} images with features, and COCO's protocol, five folds of "
            f"1,000, needs {COCO_IMAGES}; measure the whole split with --evaluate.protocol full"
        )
    return validation


def _train(config: RunConfig, folder: Path, validation: Validation, columns: Sequence[PlannedColumn]) -> None:
    """Fit heads in a run folder, measure them, index them and write the report; MLflow sees it all."""
    with _alone(folder), _tracked(config, folder, validation.reader.dataset, _identities(columns)) as tracker:
        work = Work(config.train, validation.inputs, config.data.train, validation, tracker.log)
        untrained = _measure_untrained(work, validation)
        print(f"run {folder.name}: untrained heads reach rSum {untrained.rsum:.1f}; training", flush=True)
        fitted = fit(work, folder)
        again = f"python -m pipeline run {shlex.quote(str(_shown(folder) / CONFIG_FILE))}"
        again += " --name ''" if config.name else ""
        again += " --train.lr 5e-4     # a second experiment: nothing is extracted again"
        _conclude(config, folder, validation, dataclasses.asdict(fitted), {"untrained": untrained}, again, tracker)


def _conclude(
    config: RunConfig,
    folder: Path,
    validation: Validation,
    took: Mapping[str, float],
    beside: Mapping[str, Report],
    again: str,
    tracker: tracking.Tracker,
) -> None:
    """Finish the model of a run folder, measure it, index it and write the report; print all of it and tell MLflow.

    Args:
        config: of the run.
        folder: of the run; holds `model/`.
        validation: on the split that is reported.
        took: what training took.
        beside: what was measured before, by name.
        again: a command that the user may type next.
        tracker: of the run.
    """
    model, embedded, correction = _finish_model(config, folder / "model", validation)
    took = {**took, "parameters": sum(parameter.numel() for parameter in model.parameters())}
    publish(folder / TRAINING_FILE, json.dumps(took, indent=1).encode())
    trained, others = measure(folder, "", validation, model, embedded, config.data.train)
    keep_hits(folder, trained, embedded.owner, validation.content())
    if model.indexable:
        build_index(model, validation.reader, folder / "index", correction)
    reports = {"trained": trained, **beside, **{other.title: other.report for other in others}}
    page = pages.write_run_page(folder, config, reports, model, validation.reader, embedded)
    tracker.log(_final_numbers(trained, others, took), 0)
    for file in (folder / CONFIG_FILE, folder / "metrics.json", page):
        tracker.artifact(file)
    tracker.artifact(folder / "model", "checkpoint")
    told = [trained.as_table(), *(f"{name}: rSum {report.rsum:.1f}" for name, report in beside.items())]
    print(_summary(folder, validation.reader.dataset, [*told, *map(str, others)], page, again, tracker))


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold a run's folder; the system takes the right back from a process that dies.

    Raises:
        ConfigError: another process holds it.
    """
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"{folder}: another process is at work on this run; wait until it has finished, or end it first"
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _tracked(
    config: RunConfig, folder: Path, dataset: Dataset, columns: Mapping[str, str]
) -> Iterator[tracking.Tracker]:
    """The MLflow run that the folder has, or a new one that knows its data; closed with how the block ended.

    Args:
        config: of the run.
        folder: of the run.
        dataset: the index.
        columns: identities of the columns that are read, by name.
    """
    if (folder / tracking.RUN_FILE).exists():
        tracker = tracking.resume(folder)
    else:
        identities = {f"cache.{name}": identity for name, identity in columns.items()}
        tracker = tracking.start(config, folder, {"cache.dataset": dataset.id, **identities})
        for split, context in ((config.data.train, "training"), (config.data.evaluate, "evaluation")):
            tracker.dataset(f"{dataset.name}-{split}", str(dataset.folder), dataset.id, context)
    status: tracking.Status = "FAILED"
    try:
        yield tracker
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        tracker.close(status)


def _measure_untrained(work: Work, validation: Validation) -> Report:
    """What the heads know before they learn.

    Raises:
        SettingsError: settings do not fit each other or the data, or codes could not be fitted and stored afterwards.
    """
    reader, config = validation.reader, work.config
    targets = Targets.of(reader, work.split, config.objective, config.seed)
    model = start(work, reader, targets, torch.device("cpu")).evaluated.eval()
    embedded = validation.embed(model)
    if config.objective.quantization.weight:
        dim = model.index_vectors(embedded.images).shape[1]
        check_codes(config.objective.quantization, dim, sum(map(len, reader.split(work.split))))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CollapseWarning)  # untrained heads may well know nothing
        return validation.report(model, embedded)


def _finish_model(
    config: RunConfig, folder: Path, validation: Validation
) -> tuple[Embedder, EmbeddedSplit, HubnessCorrection | None]:
    """Store with the trained model what is chosen or fitted after training: local share, correction, codebook.

    Args:
        config: of the run.
        folder: of the model.
        validation: on the split that the share is chosen on.

    Returns:
        The model, the embeddings of that split, and the correction if one is wanted and possible.
    """
    model, inputs = open_model(folder)
    reader, embedded = validation.reader, validation.embed(model)
    if isinstance(model, DualEncoder) and model.image_local is not None:
        share = tune_share(model, *embedded, tile=config.evaluate.tile)
        print(f"local space: share {share:.2f} of the similarity is best on {validation.split}", flush=True)
        save_model(folder, model.state_dict(), config.train.model, feature_dims(reader, config.train), inputs)
    correction = fit_correction(model, reader, config.data.train, config.evaluate.hubness, config.train.seed)
    if correction is not None:
        correction.save(folder / CORRECTION_FILE)
    if config.train.objective.quantization.weight:
        print(f"codes: fitting the codebook to the index vectors of {config.data.train}", flush=True)
        save_codebook(fit_codes(model, reader, config.data.train, config.train.objective.quantization), folder)
    return model, embedded, correction


def _final_numbers(trained: Report, others: Sequence[Measured], took: Mapping[str, float]) -> dict[str, float]:
    """What MLflow gets at the end: the plain score, those measured in other ways, and what training took."""
    beside = {f"{other.name}/{name}": value for other in others for name, value in other.report.as_flat().items()}
    return {**trained.as_flat(), **{f"fit/{name}": float(value) for name, value in took.items()}, **beside}


def _summary(
    folder: Path, dataset: Dataset, told: Sequence[str], page: Path, again: str, tracker: tracking.Tracker
) -> str:
    """What is printed at the end: what was measured, where everything is, and what to type next."""
    indexed = (folder / "index").exists()
    query = shlex.join([str(_shown(folder)), min(dataset.captions, key=len)])
    store = shlex.quote(tracker.uri)
    look = f"mlflow ui --backend-store-uri {store}" if "sqlite" in tracker.uri else f"open {store}"
    return "\n".join(
        [
            "",
            *told,
            "",
            f"run     {folder}",
            f"cache   {dataset.folder}",
            f"page    {page}",
            f"mlflow  {tracker.uri}, experiment {tracker.experiment}",
            "",
            "what to type next",
            *([f"  python -m pipeline search {query}"] if indexed else []),
            f"  {again}",
            f"  {look}",
        ]
    )


def _shown(folder: Path) -> Path:
    """A folder as it is typed from here."""
    try:
        return folder.relative_to(Path.cwd())
    except ValueError:
        return folder


def run(config: RunConfig) -> Path:
    """The whole road; returns the run's folder.

    Raises:
        ConfigError: the protocol does not fit the split that is evaluated.
    """
    with ray_session(config.ray):
        dataset, columns = featurize(config)
        validation = _validation(config, _inputs(config, dataset, columns))
        folder = _new_run(config, dataset, _identities(columns))
        _train(config, folder, validation, columns)
    return folder


def train(config: RunConfig) -> Path:
    """Train on a cache that is complete already; extracts nothing.

    Raises:
        CacheError: a column is missing.
        ConfigError: the protocol does not fit the split that is evaluated.
    """
    dataset = _index(config)
    columns = _plan(config, dataset)
    validation = _validation(config, _inputs(config, dataset, columns))
    folder = _new_run(config, dataset, _identities(columns))
    _train_with_ray_if_needed(config, folder, validation, columns)
    return folder


def _train_with_ray_if_needed(
    config: RunConfig, folder: Path, validation: Validation, columns: Sequence[PlannedColumn]
) -> None:
    with nullcontext() if config.train.workers == 0 else ray_session(config.ray):
        _train(config, folder, validation, columns)


def resume(folder: Path, changes: Mapping[str, str]) -> Path:
    """Continue an interrupted run on the data it began with, from its last checkpoint, in its folder and MLflow run.

    Args:
        folder: of the run.
        changes: of its settings, by dotted keys: where it goes on (`ray.*` and `train.config.PLACEMENT`).

    Raises:
        CacheError: the version of the data that it began with is not in the cache any more.
        ConfigError: it joins other runs, or a changed setting has another type.
        train.state.StateError: a setting differs that has to stay.
    """
    config = merge(_settings(folder), changes, "command line")
    if config.method == ENSEMBLE:
        raise ConfigError(f"{folder} joins other runs and has nothing to train; resume those, or join them again")
    dataset, columns = _pinned(folder)
    _train_with_ray_if_needed(config, folder, _validation(config, _inputs(config, dataset, columns)), columns)
    return folder


def join(folders: list[Path], name: str) -> Path:
    """Make one run of several finished ones: their models' vectors side by side in one index, measured like any run.

    A join that was interrupted is begun anew; it holds nothing that is not made again.

    Args:
        folders: of two or more runs, trained on the same columns of one cache.
        name: of the new run, whose folder stands beside the first; empty: made of data set and time.

    Raises:
        train.models.ModelError: a run is not finished or reads other columns than the first.
        train.config.SettingsError: a model has no vector.
        ConfigError: there is only one run, one is not finished, or the name cannot be a folder's.
    """
    if len(folders) < 2:
        raise ConfigError(f"found one run to join, {folders[0].name}; name two or more")
    own = {"method": ENSEMBLE, "name": name, "runs": str(folders[0].parent)}
    codes = {"train.objective.quantization": dataclasses.asdict(QuantizationConfig())}
    config = merge(_settings(folders[0]), {**own, **codes}, "join")
    members = [folder / "model" for folder in folders]
    _, inputs = open_ensemble(members)
    validation = _validation(config, inputs)
    took = [_took(folder) for folder in folders]
    identities = {ref.name: ref.id for ref in inputs.columns()}
    if name:
        _discard_unfinished_join(Path(config.runs).absolute() / name)
    folder = _new_run(config, validation.reader.dataset, identities)
    with _alone(folder), _tracked(config, folder, validation.reader.dataset, identities) as tracker:
        save_ensemble(folder / "model", members)
        sums = {key: sum(one[key] for one in took) for key in ("seconds", "steps")}
        again = f"python -m pipeline compare {shlex.join(map(str, [*folders, _shown(folder)]))}"
        _conclude(config, folder, validation, sums, {}, again, tracker)
    return folder


def _took(folder: Path) -> dict[str, float]:
    """What training took.

    Raises:
        ConfigError: the run did not come so far.
    """
    try:
        found: dict[str, float] = json.loads((folder / TRAINING_FILE).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{folder} is not finished ({error}); continue it with `train --resume {folder}`, then join"
        ) from error
    return found


def _discard_unfinished_join(folder: Path) -> None:
    """Remove a join that did not come to its end.

    Raises:
        ConfigError: another process is at work on it.
    """
    if not (folder / CONFIG_FILE).exists() or (folder / pages.RUN_PAGE).exists():
        return
    if _settings(folder).method == ENSEMBLE:
        with _alone(folder):
            shutil.rmtree(folder)


def evaluate(folder: Path, split: str | None, protocol: str | None) -> None:
    """Measure a finished run again, on a split or by a protocol of choice; prints, and keeps `metrics-<split>.json`.

    On the run's own split, what `compare` reads is kept again too.
    """
    model, inputs = open_model(folder / "model")
    config = _settings(folder)
    chosen = split or config.data.evaluate
    validation = Validation(inputs, chosen, _protocol(config, protocol), config.evaluate.tile)
    embedded = validation.embed(model)
    report, others = measure(folder, f"-{chosen}", validation, model, embedded, config.data.train)
    if chosen == config.data.evaluate:
        keep_hits(folder, report, embedded.owner, validation.content())
    print(report.as_table(), *others, sep="\n")
    if (folder / tracking.RUN_FILE).exists():
        try:
            tracking.sync(folder)
        except tracking.TrackingError as error:
            print(f"warning: {error}")


def compare(folders: list[Path]) -> None:
    """Print runs side by side: recalls, intervals, and by what each differs from the first."""
    print(comparison(folders))


def search(folder: Path, queries: list[str], k: int, page: Path | None, *, corrected: bool) -> None:
    """Answer queries, each a text or a picture's file, with files and distances; on a page too, if one is named.

    Raises:
        ConfigError: a picture's file cannot be read, or the page cannot be written.
        featurize.images.decode.DecodeError: a picture cannot be decoded.
    """
    if page is not None:
        _check_page(page)
    asked = [Path(text) if _is_picture(text) else text for text in queries]
    pictures = {query: _read_picture(query) for query in asked if isinstance(query, Path)}
    searcher = Searcher.open(folder)
    answers: list[tuple[str | Path, list[Hit]]] = []
    for query in asked:
        hits = searcher.search(pictures[query] if isinstance(query, Path) else query, k, corrected=corrected)
        answers.append((query, hits))
        print(f"\n{query}")
        for hit in hits:
            print(f"  {hit.rank:>3}  {hit.distance:6.3f}  {hit.sample.image}  {hit.sample.captions[0]}")
    if page is not None:
        pages.write_search_page(page, folder.name, answers)
        print(f"\npage {page}")


def _check_page(page: Path) -> None:
    """Refuse, before anything is searched, a page that cannot be written."""
    above = next(folder for folder in page.absolute().parents if folder.exists())
    if page.is_dir() or not (above.is_dir() and os.access(above, os.W_OK)):
        raise ConfigError(f"--page {page}: expected an HTML file in a folder that can be written to")


def _is_picture(text: str) -> bool:
    return Path(text).suffix.lower() in IMAGE_SUFFIXES


def _read_picture(file: Path) -> Image.Image:
    try:
        return decode(file.read_bytes())
    except OSError as error:
        raise ConfigError(
            f"no such picture '{file}' ({error.strerror}): a query that ends in {file.suffix} names a picture's "
            "file; correct its path, or put other words at the end of a text"
        ) from error
    except DecodeError as error:
        raise DecodeError(f"the picture '{file}' cannot be shown to the model: {error}") from error
