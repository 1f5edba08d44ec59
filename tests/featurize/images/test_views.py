import numpy as np
import pytest
from PIL import Image

from featurize.images.views import view


@pytest.fixture
def image():
    """Red grows from left to right, green from top to bottom: a pixel tells where it was."""
    across, down = np.meshgrid(np.arange(200), np.arange(100))
    return Image.fromarray(np.stack([across, down, np.zeros_like(down)], axis=-1).astype(np.uint8))


def test_plain_is_the_image_itself(image):
    assert view(image, "plain", "a") is image


def test_flip_mirrors_left_to_right(image):
    flipped = view(image, "flip", "a")
    assert flipped.size == image.size
    assert flipped.getpixel((0, 3)) == (199, 3, 0)
    assert np.array_equal(np.asarray(view(flipped, "flip", "b")), np.asarray(image))


def test_crops_have_the_stated_sides_lie_inside_and_differ(image):
    crops = [view(image, "crop", f"image {i}") for i in range(300)]
    shares = np.array([[crop.width / 200, crop.height / 100] for crop in crops])
    assert shares.min() >= 0.645
    assert shares.max() <= 0.905
    assert shares[:, 0].max() > 0.88
    assert shares[:, 0].min() < 0.67
    assert np.abs(shares[:, 0] - shares[:, 1]).max() < 0.01  # the aspect ratio stays
    corners = np.array([[c.getpixel((0, 0))[:2], c.getpixel((c.width - 1, c.height - 1))[:2]] for c in crops])
    mirrored = corners[:, 0, 0] > corners[:, 1, 0]
    assert 0.4 < mirrored.mean() < 0.6
    left = corners[:, :, 0].min(axis=1)
    top = corners[:, 0, 1]
    assert left.min() == 0
    assert left.max() > 55
    assert top.max() > 27
    for crop, edge, upper in zip(crops, left, top, strict=True):
        straight = np.sort(np.asarray(crop)[:, :, 0], axis=1)
        assert np.array_equal(straight[0], np.arange(edge, edge + crop.width))
        assert np.asarray(crop)[:, 0, 1].tolist() == list(range(upper, upper + crop.height))


def test_a_crop_follows_from_its_key_alone(image):
    # sha256("a") = ca978112 ca1bbdca fac231b3 9a23dc4d a786eff8 147c4e72 b9807785 afee48bb: the uniform numbers are
    # .7914 (side .8479: 170 by 85), .9795 (of 30 columns), .6544 (of 15 rows), .7246 (not mirrored).
    crop = view(image, "crop", "a")
    assert crop.size == (170, 85)
    assert crop.getpixel((0, 0)) == (29, 10, 0)
    assert crop.getpixel((169, 84)) == (198, 94, 0)


@pytest.mark.parametrize(("name", "seed"), [("crop2", "crop2 a"), ("crop3", "crop3 a"), ("crop4", "crop4 a")])
def test_other_crops_are_other_parts(image, name, seed):
    other = np.asarray(view(image, name, "a"))
    assert other.tobytes() == np.asarray(view(image, "crop", seed)).tobytes()
    assert other.tobytes() != np.asarray(view(image, "crop", "a")).tobytes()


def test_a_single_pixel_can_be_cropped():
    assert view(Image.new("RGB", (1, 1)), "crop", "a").size == (1, 1)


def test_an_unknown_view(image):
    with pytest.raises(ValueError, match=r"unknown view 'zoom': expected plain, flip, crop, crop2, crop3, crop4"):
        view(image, "zoom", "a")
