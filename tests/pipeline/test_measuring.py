"""The hubness banks come from the training split, by seed."""

from dataclasses import replace

import torch

from evaluate.config import HubnessConfig
from evaluate.embed import embed_caption_rows
from pipeline.measuring import fit_correction
from train.batches import FeatureReader
from train.config import ModelConfig, TowerConfig
from train.hosts import build_host
from train.towers import Dims


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
