"""What a run keeps of its measurements, and the hubness banks, which come from the training split, by seed."""

import os
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from evaluate.codes import save_codebook
from evaluate.config import HubnessConfig
from evaluate.embed import embed_caption_rows
from evaluate.hubness import HubnessCorrection
from evaluate.protocols import evaluate_full
from evaluate.ranks import EvaluationError
from pipeline.measuring import HITS_FILE, Validation, comparison, fit_correction, keep_hits, read_hits
from train.batches import FeatureReader
from train.config import ModelConfig, TowerConfig
from train.hosts import build_host
from train.quantize import ProductCodebook
from train.towers import Dims

IMAGES = torch.tensor([[0.0], [10.0]])
CAPTIONS = torch.tensor([[9.0], [4.0], [1.0], [6.0]])
OWNER = torch.tensor([1, 0, 1, 1])


def write_hits(folder, split="val", content="0" * 64):
    folder.mkdir(exist_ok=True)
    keep_hits(folder, evaluate_full(IMAGES, CAPTIONS, OWNER, split=split), OWNER, content)
    return folder


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


def test_runs_on_the_same_content_are_compared(tmp_path):
    runs = [write_hits(tmp_path / name) for name in ("one", "other")]
    assert "+0.0 (+0.0 to +0.0, p 1.000)" in comparison(runs)


def test_runs_on_other_content_of_the_same_size_are_not_compared(tmp_path):
    runs = [write_hits(tmp_path / "one"), write_hits(tmp_path / "other", "test", "1" * 64)]
    expected = (
        f"{runs[1]} was measured on other images or captions than {runs[0]}: found 2 images with 4 captions of the "
        "split 'test' and 2 images with 4 captions of the split 'val', expected the same ones"
    )
    with pytest.raises(EvaluationError, match=re.escape(expected)):
        comparison(runs)


def test_a_run_that_does_not_say_on_what_it_was_measured_is_not_compared(tmp_path):
    """As an older version kept its hits."""
    runs = [write_hits(tmp_path / "one"), write_hits(tmp_path / "older")]
    clusters = read_hits(runs[1])
    np.savez(runs[1] / HITS_FILE, found=clusters.found.numpy(), captions=clusters.captions.numpy())
    assert read_hits(runs[1]).found.equal(clusters.found)
    assert "older" in comparison(runs[1:])  # alone it has nothing to agree with
    with pytest.raises(EvaluationError, match=r"older was measured by an older .* `python -m pipeline evaluate /"):
        comparison(runs)


def test_content_is_what_a_split_says_wherever_it_lies(tiny_cache, tiny_config, tmp_path):
    dataset = tiny_cache.dataset

    def content(samples, split="val", missing=()):
        reader = SimpleNamespace(
            dataset=SimpleNamespace(samples=samples),
            split=lambda name: ([n for n, one in enumerate(samples) if one.split == name and n not in missing], []),
        )
        validation = Validation(tiny_cache.inputs(tiny_config), split, "full", 64)
        validation.__dict__["reader"] = reader
        return validation.content()

    whole = Validation(tiny_cache.inputs(tiny_config), "val", "full", 64).content()
    assert len(whole) == 64
    samples = list(dataset.samples)
    assert content([replace(sample, image=str(tmp_path / "elsewhere")) for sample in samples]) == whole
    assert content(samples[1:]) == whole  # another training split
    others = [
        content(samples, "train"),
        content(samples, missing={50}),
        content([*samples[:-2], samples[-1], samples[-2]]),
        content([*samples[:-1], replace(samples[-1], captions=("another caption",))]),
        content([*samples[:-1], replace(samples[-1], image_id="another image")]),
    ]
    assert len({whole, *others}) == 6


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
