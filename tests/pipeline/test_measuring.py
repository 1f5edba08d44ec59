"""What a run keeps of its measurements, and the hubness banks, which come from the training split, by seed."""

import os
from dataclasses import replace

import pytest
import torch

from evaluate.codes import save_codebook
from evaluate.config import HubnessConfig
from evaluate.embed import embed_caption_rows
from evaluate.hubness import HubnessCorrection
from evaluate.protocols import evaluate_full
from evaluate.ranks import EvaluationError
from pipeline.measuring import HITS_FILE, fit_correction, keep_hits, read_hits
from train.batches import FeatureReader
from train.config import ModelConfig, TowerConfig
from train.hosts import build_host
from train.quantize import ProductCodebook
from train.towers import Dims

IMAGES = torch.tensor([[0.0], [10.0]])
CAPTIONS = torch.tensor([[9.0], [4.0], [1.0], [6.0]])
OWNER = torch.tensor([1, 0, 1, 1])


def write_hits(folder):
    keep_hits(folder, evaluate_full(IMAGES, CAPTIONS, OWNER, split="val"), OWNER)


def test_hits_are_read_as_they_were_kept(tmp_path):
    """Image 0 meets captions 2, 1, 3, 0 and image 1 meets 0, 3, 1, 2; captions 0, 1 and 3 find their image first."""
    write_hits(tmp_path)
    hits = read_hits(tmp_path)
    assert hits.captions.tolist() == [1, 3]
    assert hits.found.tolist() == [[0, 1, 1, 1, 1, 1], [1, 1, 1, 2, 3, 3]]


@pytest.mark.parametrize("size", [0, 100, -30])
def test_cut_hits_are_not_those_of_a_finished_run(tmp_path, size):
    write_hits(tmp_path)
    file = tmp_path / HITS_FILE
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(EvaluationError, match=r"no hits\.npz of a finished run .*; train it to its end"):
        read_hits(tmp_path)


@pytest.mark.parametrize(
    ("file", "write"),
    [
        (HITS_FILE, write_hits),
        ("codebook.safetensors", lambda folder: save_codebook(ProductCodebook(8, 2, 16), folder)),
        ("bias.safetensors", lambda folder: HubnessCorrection(IMAGES, CAPTIONS).save(folder / "bias.safetensors")),
    ],
)
def test_a_write_that_is_cut_short_leaves_the_old_file(tmp_path, monkeypatch, file, write):
    (tmp_path / file).write_bytes(b"whole")

    def full(_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        write(tmp_path)
    assert (tmp_path / file).read_bytes() == b"whole"


def test_banks_are_sampled_from_the_training_split(tiny_cache, tiny_config):
    reader = FeatureReader(tiny_cache.inputs(tiny_config))
    model = build_host(tiny_config.model, Dims(*reader.image_dims), Dims(*reader.text_dims)).eval()
    config = HubnessConfig(queries=60, strength=0.5, sharpness=10.0)
    first = fit_correction(model, reader, "train", config, 1)
    assert (first.a, first.b) == (0.5, 10.0)
    assert len(first.images) == 48  # fewer than asked for
    assert len(first.captions) == 60
    _, captions = reader.split("train")
    with torch.inference_mode():
        known = embed_caption_rows(model, reader, captions).vector
    assert torch.cdist(first.captions, known).amin(1).max() < 1e-3
    assert fit_correction(model, reader, "train", config, 1).captions.equal(first.captions)
    assert not fit_correction(model, reader, "train", config, 2).captions.equal(first.captions)


def test_no_queries_and_no_vectors_no_correction(tiny_cache, tiny_config):
    reader = FeatureReader(tiny_cache.inputs(tiny_config))
    model = build_host(tiny_config.model, Dims(*reader.image_dims), Dims(*reader.text_dims))
    assert fit_correction(model, reader, "train", HubnessConfig(queries=0), 0) is None
    tower = TowerConfig(vectors=(), parts=("x",))
    scan = build_host(replace(ModelConfig(host="scan"), image=tower, text=tower), Dims(0, (6,)), Dims(0, (6,)))
    assert fit_correction(scan, reader, "train", HubnessConfig(), 0) is None
