import io
import struct
import threading
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from featurize.images import decode as module
from featurize.images.decode import DecodeError, decode

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def encoded(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def halves():
    """Left half red, right half blue: 4 by 2 pixels."""
    image = Image.new("RGB", (4, 2), RED)
    image.paste(BLUE, (2, 0, 4, 2))
    return image


def test_rgb_passes_unchanged():
    image = decode(encoded(halves()))
    assert (image.mode, image.size) == ("RGB", (4, 2))
    assert image.getpixel((0, 0)) == RED
    assert image.getpixel((3, 1)) == BLUE


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("JPEG", {"quality": 95, "subsampling": 0}),
        ("JPEG", {"quality": 95, "progressive": True}),
        ("GIF", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("WEBP", {"lossless": True}),
        ("PPM", {}),
    ],
)
def test_formats(form, options):
    image = decode(encoded(halves().resize((32, 16), Image.Resampling.NEAREST), form, **options))
    assert (image.mode, image.size) == ("RGB", (32, 16))
    np.testing.assert_allclose(image.getpixel((2, 8)), RED, atol=4)
    np.testing.assert_allclose(image.getpixel((29, 8)), BLUE, atol=4)


def test_one_bit_and_grey_become_rgb():
    assert decode(encoded(Image.new("1", (2, 2), 1))).getpixel((0, 0)) == WHITE
    assert decode(encoded(Image.new("L", (2, 2), 77))).getpixel((0, 0)) == (77, 77, 77)


def test_palette():
    image = halves().quantize(4)
    assert image.mode == "P"
    assert decode(encoded(image)).getpixel((0, 0)) == RED


def test_palette_with_transparency_is_laid_on_white():
    image = halves().quantize(4)
    clear = image.getpixel((0, 0))
    decoded = decode(encoded(image, transparency=clear))
    assert decoded.getpixel((0, 0)) == WHITE
    assert decoded.getpixel((3, 0)) == BLUE


def test_palette_with_transparency_as_bytes_gives_no_warning():
    image = halves().quantize(4)
    decoded = decode(encoded(image, transparency=bytes([255, 0, 0, 0])))
    assert {decoded.getpixel((0, 0)), decoded.getpixel((3, 0))} & {WHITE}


def test_alpha_is_laid_on_white():
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 128))
    image.putpixel((1, 0), (0, 0, 255, 0))
    decoded = decode(encoded(image))
    np.testing.assert_allclose(decoded.getpixel((0, 0)), (255, 127, 127), atol=1)
    assert decoded.getpixel((1, 0)) == WHITE


def test_grey_with_alpha_and_colour_key():
    assert decode(encoded(Image.new("LA", (1, 1), (0, 0)))).getpixel((0, 0)) == WHITE
    assert decode(encoded(Image.new("RGB", (1, 1), RED), transparency=RED)).getpixel((0, 0)) == WHITE
    assert decode(encoded(Image.new("L", (1, 1), 9), transparency=9)).getpixel((0, 0)) == WHITE


def test_cmyk():
    decoded = decode(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95))
    np.testing.assert_allclose(decoded.getpixel((4, 4)), RED, atol=3)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled_not_clipped(form):
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)  # 0, 1, 128, 255 times 257
    decoded = decode(encoded(Image.fromarray(values), form))
    assert [decoded.getpixel((x, 0)) for x in range(4)] == [(0,) * 3, (1,) * 3, (128,) * 3, WHITE]


def test_wider_integers_are_refused():
    with pytest.raises(DecodeError, match=r"integer pixels from 0 to 70000: more than 16 bits.*save the image with"):
        decode(encoded(Image.fromarray(np.array([[0, 70000]], dtype=np.int32)), "TIFF"))


@pytest.mark.parametrize(("values", "expected"), [([0.0, 1.0], [0, 255]), ([0.0, 100.4], [0, 100])])
def test_floats_of_a_known_range(values, expected):
    decoded = decode(encoded(Image.fromarray(np.array([values], dtype=np.float32)), "TIFF"))
    assert [decoded.getpixel((x, 0))[0] for x in range(2)] == expected


@pytest.mark.parametrize("values", [[-1.0, 1.0], [0.0, 256.0], [0.0, np.nan]])
def test_floats_of_an_unknown_range_are_refused(values):
    with pytest.raises(DecodeError, match=r"float pixels .* expected \[0, 1\] or \[0, 255\]"):
        decode(encoded(Image.fromarray(np.array([values], dtype=np.float32)), "TIFF"))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize(
    ("orientation", "size", "red_at"),
    [
        (1, (32, 16), (2, 8)),
        (2, (32, 16), (29, 8)),
        (3, (32, 16), (29, 8)),
        (4, (32, 16), (2, 8)),
        (5, (16, 32), (8, 2)),
        (6, (16, 32), (8, 2)),
        (7, (16, 32), (8, 29)),
        (8, (16, 32), (8, 29)),
    ],
)
def test_exif_orientation_is_applied_once(form, orientation, size, red_at):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image = halves().resize((32, 16), Image.Resampling.NEAREST)
    decoded = decode(encoded(image, form, exif=exif))
    assert decoded.size == size
    red, _, blue = decoded.getpixel(red_at)
    assert red > 200
    assert blue < 50


def test_a_damaged_exif_block_does_not_cost_the_image():
    data = encoded(halves(), "JPEG", exif=b"Exif\x00\x00MM\x00\x2a\x00\x00\x00\x08\xff\xff\x01")
    assert decode(data).size == (4, 2)


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]
    for form in ("GIF", "PNG", "WEBP"):
        decoded = decode(encoded(frames[0], form, save_all=True, append_images=frames[1:], lossless=True))
        assert decoded.getpixel((4, 4)) == RED


def test_no_bytes():
    with pytest.raises(DecodeError, match="empty"):
        decode(b"")


def test_not_an_image():
    with pytest.raises(DecodeError, match=r"no image format that PIL knows: 16 bytes that start b'<!doctyp'"):
        decode(b"<!doctype html>\n")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_truncated(form, share):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(pixels), form)
    with pytest.raises(DecodeError):
        decode(data[: int(len(data) * share)])


def test_a_truncated_jpeg_says_so():
    data = encoded(Image.effect_noise((64, 64), 80), "JPEG")
    with pytest.raises(DecodeError, match=r"truncated or corrupt image: OSError: image file is truncated"):
        decode(data[:-200])


def png_header(width, height):
    """A PNG that claims a size and holds no pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 100) + b"IDAT"


@pytest.mark.parametrize("side", [9_470, 30_000])  # PIL warns of the first and refuses the second
def test_too_many_pixels(side):
    with pytest.raises(DecodeError, match=r"more than 89,478,485 pixels; shrink"):
        decode(png_header(side, side))


def test_an_icon_that_holds_a_larger_image_than_it_says():
    inside = png_header(9_470, 9_470)
    directory = struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(inside), 22)
    with pytest.raises(DecodeError, match=r"more than 89,478,485 pixels|truncated or corrupt"):
        decode(directory + inside)


@pytest.mark.parametrize("size", [(0, 5), (5, 0)])
def test_no_pixels(monkeypatch, size):
    """Whatever format lets such a size through."""
    monkeypatch.setattr(Image, "open", lambda _: Image.new("RGB", size))
    with pytest.raises(DecodeError, match=rf"no pixels \({size[0]} by {size[1]}\)"):
        decode(b"x")


def test_too_little_memory(monkeypatch):
    def load(_):
        raise MemoryError

    data = encoded(halves())
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(DecodeError, match=r"^too little memory to decode it; shrink the image first$"):
        decode(data)


def test_too_many_pixels_where_pil_does_not_check(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(DecodeError, match=r"more than 89,478,485 pixels; shrink .*9470 by 9470"):
        decode(png_header(9_470, 9_470))


def test_the_limit_is_pils_own():
    assert Image.MAX_IMAGE_PIXELS == module.MAX_PIXELS


def test_threads_leave_the_warning_filters_as_they_were():
    before = list(warnings.filters)
    data = encoded(halves())
    bomb = png_header(9_470, 9_470)
    failures = []

    def work():
        for _ in range(20):
            decode(data)
            try:
                decode(bomb)
            except DecodeError:
                continue
            failures.append("the bomb passed")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert list(warnings.filters) == before


@pytest.fixture(scope="module")
def samples():
    pixels = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return [encoded(image, form, exif=exif) for form in ("JPEG", "PNG", "WEBP", "TIFF")] + [encoded(image, "GIF")]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_bytes_give_an_image_or_a_decode_error(samples, data):
    damaged = bytearray(data.draw(st.sampled_from(samples)))
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        image = decode(bytes(damaged))
    except DecodeError:
        return
    assert image.mode == "RGB"
