"""What tests share: the photographs, a small cache, one Ray."""

import logging
import os
import threading
import uuid
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.models
from torch.overrides import TorchFunctionMode

from featurize.columns import column_folder
from featurize.datasets.sample import Sample
from featurize.encoder import Output
from featurize.index import Dataset, index, open_dataset
from featurize.manifest import ShardRecord, identity
from featurize.places import place
from featurize.plan import PlannedColumn
from featurize.shards import row_key, write_shard
from featurize.texts.lexicon import LexiconEncoder
from train.batches import Inputs
from train.config import ModelConfig, TowerConfig, TrainConfig

ROOT = Path(__file__).parents[1]

torch.set_num_threads(1)  # two threads on two busy cores wait for each other


@pytest.fixture(scope="session")
def flickr8k_root():
    """The folder of Flickr8K's photographs and captions."""
    root = Path(os.environ.get("ISTHMUS_FLICKR8K", ROOT.parent / "shared" / "flickr8k"))
    if not (root / "images").is_dir():
        pytest.skip(f"no Flickr8K photographs at {root}; set ISTHMUS_FLICKR8K to their folder")
    return root


@pytest.fixture(scope="session")
def ray_local():
    """One Ray for the whole session."""
    from pipeline.config import RayConfig
    from pipeline.sessions import ray_session

    with ray_session(RayConfig(cpus=2, object_store_mb=200)):
        yield


@dataclass(frozen=True)
class TinyCache:
    """A cache whose images and captions say the same thing in two languages."""

    dataset: Dataset
    columns: list[PlannedColumn]

    def inputs(self, config: TrainConfig) -> Inputs:
        return Inputs.of(self.dataset.folder, self.columns, config, "float32")


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory):
    """72 images (48 train, 24 val) with 1 to 4 captions; all columns are linear images of one meaning plus noise."""
    folder = tmp_path_factory.mktemp("tiny")
    rng = np.random.default_rng(0)
    samples = []
    for number in range(72):
        path = folder / f"{number}.jpg"
        path.write_bytes(b"image %d" % number)
        captions = tuple(f"caption {k} of image {number}" for k in range(1 + number % 4))
        samples.append(Sample(f"image/{number}", str(path), captions, "train" if number < 48 else "val"))
    dataset = index(samples, "tiny", folder / "cache", max_quarantined=0.0)
    meaning = rng.normal(size=(72, 12))
    owner = dataset.caption_image
    counts = np.array([len(sample.captions) for sample in samples])

    def noisy(rows, *shape):
        mixed = meaning[rows] @ rng.normal(size=(12, int(np.prod(shape))))
        return (mixed.reshape(len(rows), *shape) + 0.3 * rng.normal(size=(len(rows), *shape))).astype(np.float16)

    images = np.arange(72)
    sentences = noisy(owner, 16)
    sentences /= np.linalg.norm(sentences.astype(np.float32), axis=1, keepdims=True).astype(np.float16)
    tokens = noisy(owner, 6, 10)
    made = {
        "one.pooled": ("image", "one", Output("pooled", (20,), False), "plain", noisy(images, 20)),
        "one.pooled.flip": ("image", "one", Output("pooled", (20,), False), "flip", noisy(images, 20)),
        "two.pooled": ("image", "two", Output("pooled", (8,), False), "plain", noisy(images, 8)),
        "two.pooled.flip": ("image", "two", Output("pooled", (8,), False), "flip", noisy(images, 8)),
        "one.grid": ("image", "one", Output("grid", (5, 6), False), "plain", noisy(images, 5, 6)),
        "one.grid.flip": ("image", "one", Output("grid", (5, 6), False), "flip", noisy(images, 5, 6)),
        "words.sentence": ("text", "words", Output("sentence", (16,), False), "plain", sentences),
        "words.tokens": (
            "text",
            "words",
            Output("tokens", (10,), True),
            "plain",
            [row[: 1 + number % 6] for number, row in enumerate(tokens)],
        ),
        "lexicon-en.lemmas": (
            "text",
            "lexicon-en",
            Output("lemmas", (), True, "int32"),
            "plain",
            [np.array(row, np.int32) for row in LexiconEncoder("en").prepare(dataset.captions)],
        ),
    }
    columns = []
    for name, (modality, encoder, output, view, rows) in made.items():
        ingredients = {"encoder": encoder, "weights": "0" * 64, "output": output.name, "view": view}
        target = column_folder(dataset, name, identity({**ingredients, "dataset": dataset.id}))
        ingredients["dataset"] = dataset.id
        target.mkdir()
        records = []
        for shard, first in enumerate(range(0, 72, 32)):
            inside = images[first : first + 32]
            if modality == "image":
                keys = [row_key(samples[row].image_id) for row in inside]
                part = rows[first : first + 32]
            else:
                keys = [row_key(samples[row].image_id, k) for row in inside for k in range(counts[row])]
                part = rows[counts[:first].sum() : counts[: first + 32].sum()]
            file = write_shard(target / f"{shard:06d}.tar", keys, part, ragged=output.ragged)
            records.append(ShardRecord(file.rows, file.size, file.sha256))
        column = PlannedColumn(name, modality, encoder, output, view, ingredients, target)
        column.manifest(32, records).write(target)
        columns.append(column)
    return TinyCache(open_dataset(dataset.folder), columns)


@pytest.fixture
def tiny_config():
    """A training run of a few seconds on the tiny cache."""
    return TrainConfig(
        model=ModelConfig(
            dim=16,
            image=TowerConfig(vectors=("pooled",), width=32, input_dropout=0.1, dropout=0.1),
            text=TowerConfig(vectors=("sentence",), width=32, input_dropout=0.1, dropout=0.1),
        ),
        epochs=3,
        batch=24,
        lr=1e-2,
        ema=0.9,
        workers=0,
    )


@pytest.fixture(scope="session")
def detector_file(tmp_path_factory):
    """Weights of fasterrcnn_mobilenet_v3_large_320_fpn that know nothing, but see a difference between boxes.

    Its norms are fitted to noise: with plain random weights hardly a signal reaches the last layers.
    """
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = torchvision.models.get_model(
            "fasterrcnn_mobilenet_v3_large_320_fpn", weights=None, weights_backbone=None
        )
        noise = torch.randn(2, 3, 320, 320)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.backbone.train()(noise)
        model.roi_heads.box_predictor.cls_score.weight *= 10
    path = tmp_path_factory.mktemp("detector") / "weights.pth"
    torch.save({"model": model.state_dict(), "epoch": 3}, path)
    return path


@pytest.fixture(scope="session")
def s3_server():
    """The endpoint of an S3 server on this machine; one request at a time, for moto closes what it replaces."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    app, alone = DomainDispatcherApplication(create_backend_app), threading.Lock()

    def one_by_one(environ, start_response):
        with alone:
            return app(environ, start_response)

    server = make_server("127.0.0.1", 0, one_by_one, threaded=True, request_handler=MotoRequestHandler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def s3(s3_server, monkeypatch):
    """The variables of a user of that server."""
    from featurize.remote import OPEN

    variables = {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "1",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    yield variables
    OPEN.clear()


@pytest.fixture
def node(tmp_path, monkeypatch):
    """This node's folder of copies, empty, with room for what tests copy however full the disk is."""
    from featurize.remote import OPEN

    OPEN.clear()
    folder = tmp_path / "node"
    monkeypatch.setenv("ISTHMUS_LOCAL", str(folder))
    monkeypatch.setenv("ISTHMUS_LOCAL_GIB", "1")
    monkeypatch.delenv("ISTHMUS_MEMORY_GIB", raising=False)
    yield folder
    OPEN.clear()


@pytest.fixture
def bucket(s3, node):
    """A bucket of a test's own."""
    made = place(f"s3://bucket-{uuid.uuid4().hex}", ValueError)
    made.fs.mkdir(made.path)
    return made


class Largest(TorchFunctionMode):
    """Remembers the most elements that any tensor had."""

    elements = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


@pytest.fixture
def largest():
    """Entered, it watches all that torch computes."""
    return Largest()
