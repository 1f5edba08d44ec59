import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as F

from featurize.images.preprocessing import ResizeAndCrop, Whole, rgb, shorten, to_tensor


def noise(width, height):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("size", [(50, 37), (37, 50), (33, 33), (20, 150), (7, 9)])
@pytest.mark.parametrize("name", ["BILINEAR", "BICUBIC"])
@pytest.mark.parametrize(("resize", "crop"), [(36, 32), (32, 32), (33, 24), (20, 24)])
def test_resize_and_crop_are_torchvisions(size, name, resize, crop):
    ours = ResizeAndCrop(resize, crop, Image.Resampling[name], (0.0,) * 3, (1.0,) * 3)
    theirs = F.center_crop(F.resize(noise(*size), [resize], F.InterpolationMode[name]), [crop])
    assert torch.equal(ours.pixels(noise(*size)), F.pil_to_tensor(theirs))


def test_an_extremely_long_image_costs_no_memory(monkeypatch):
    sizes = []
    resize = Image.Image.resize

    def spy(self, size, *arguments):
        sizes.append(size)
        return resize(self, size, *arguments)

    monkeypatch.setattr(Image.Image, "resize", spy)
    ours = ResizeAndCrop(36, 32, Image.Resampling.BILINEAR, (0.0,) * 3, (1.0,) * 3)
    assert ours.pixels(Image.new("RGB", (5_000, 1), "red")).shape == (3, 32, 32)
    assert sizes == [(8 * 36, 36)]


def test_shorten_keeps_the_middle():
    image = noise(2, 30)
    kept = shorten(image)
    assert kept.size == (2, 16)
    assert np.array_equal(np.asarray(kept), np.asarray(image)[7:23])
    assert shorten(noise(16, 2)).size == (16, 2)


def test_whole_keeps_every_edge():
    image = Image.new("RGB", (64, 16), "black")
    image.paste("white", (60, 0, 64, 16))
    pixels = Whole(16, (127.0,) * 3, (128.0,) * 3).pixels(image)
    assert pixels.shape == (3, 16, 16)
    assert pixels[0, 8, 0] == 0
    assert pixels[0, 8, 15] > 220


def test_whole_leaves_an_image_of_its_size_alone():
    image = noise(24, 24)
    assert torch.equal(Whole(24, (0.0,) * 3, (1.0,) * 3).pixels(image), to_tensor(image))


def test_other_modes_become_rgb():
    assert rgb(Image.new("L", (2, 2), 7)).getpixel((0, 0)) == (7, 7, 7)
    assert Whole(8, (0.0,) * 3, (1.0,) * 3).pixels(Image.new("L", (2, 2), 7)).shape == (3, 8, 8)


def test_to_tensor():
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (4, 5, 6))
    assert to_tensor(image).tolist() == [[[1, 4]], [[2, 5]], [[3, 6]]]


@pytest.mark.parametrize(
    "preprocessing",
    [
        Whole(8, (127.0,) * 3, (128.0,) * 3),
        ResizeAndCrop(9, 8, Image.Resampling.BICUBIC, (1.0, 2.0, 3.0), (4.0, 5.0, 6.0)),
    ],
)
def test_records_survive_json_and_hold_every_setting(preprocessing):
    record = preprocessing.record()
    assert json.loads(json.dumps(record)) == record
    assert record["mean"] == list(preprocessing.mean)
    assert record["std"] == list(preprocessing.std)
    assert record["filter"] == "bicubic"
    assert record["resize"] == (9 if isinstance(preprocessing, ResizeAndCrop) else [8, 8])
    assert record.get("crop", 8) == 8
