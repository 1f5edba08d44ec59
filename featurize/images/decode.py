"""From an image file's bytes to an upright RGB image, or one clear error."""

import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import ExifTags, Image, UnidentifiedImageError

# PIL's own default limit (89.5 megapixels): an image within it makes no later PIL call warn of a bomb.
MAX_PIXELS = 89_478_485
_TOO_LARGE = f"more than {MAX_PIXELS:,} pixels; shrink the image first"

_UPRIGHT = {  # EXIF orientation → what brings the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_filters_lock = threading.Lock()


class DecodeError(ValueError):
    """The bytes hold no image that can be shown to a network; the message says why."""


def decode(data: bytes) -> Image.Image:
    """Decodes an image of any kind that PIL reads (JPEG, PNG, GIF, WebP, TIFF, BMP, ...) to 8-bit RGB.

    The EXIF orientation is applied, transparency is laid on white, an animation gives its first frame.
    Integers of 16 bits are scaled to 8; floats are read as [0, 1] if no pixel exceeds 1, else as [0, 255].

    Raises:
        DecodeError: empty, truncated or corrupt data, an unknown format, more than `MAX_PIXELS` pixels, or
            values whose range is unknown.
    """
    if not data:
        raise DecodeError("the file is empty (0 bytes)")
    try:
        with _metadata_warnings_off():
            image = Image.open(io.BytesIO(data))
        _check_size(image)
        image.load()
        _check_size(image)  # icons hold an image of another size than they say
        with _metadata_warnings_off():
            turn = _UPRIGHT.get(_orientation(image))
        upright = image if turn is None else image.transpose(turn)
        return _rgb(upright)
    except DecodeError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DecodeError(f"{_TOO_LARGE} ({error})") from error
    except MemoryError as error:
        raise DecodeError("too little memory to decode it; shrink the image first") from error
    except UnidentifiedImageError as error:
        raise DecodeError(f"no image format that PIL knows: {len(data)} bytes that start {data[:8]!r}") from error
    except Exception as error:
        # Damaged bytes make PIL's readers fail in every way there is.
        raise DecodeError(f"truncated or corrupt image: {type(error).__name__}: {error}") from error


def _check_size(image: Image.Image) -> None:
    if not (image.width and image.height):
        raise DecodeError(f"no pixels ({image.width} by {image.height})")
    if image.width * image.height > MAX_PIXELS:  # PIL checks too, unless the process has switched that off
        raise DecodeError(f"{_TOO_LARGE} ({image.width} by {image.height})")


@contextmanager
def _metadata_warnings_off() -> Iterator[None]:
    """Silences PIL on odd metadata, which is not used, and makes its warning of a bomb an error.

    Warning filters belong to the process, so threads take turns; nothing slow happens inside.
    """
    with _filters_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) where it is absent or unreadable."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # noqa: BLE001 - a damaged EXIF block fails in many ways and must not cost the image
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _eight_bits(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    import numpy as np  # most images need it not, and the process that decodes starts in half the time without

    values = np.asarray(image)
    if image.mode == "F":
        if not (values.min() >= 0 and values.max() <= 255):  # also true of NaN
            raise DecodeError(
                f"float pixels from {values.min()} to {values.max()}: expected [0, 1] or [0, 255]; "
                "save the image with 8 or 16 bits"
            )
        scale = 255.0 if values.max() <= 1 else 1.0
    else:
        if values.min() < 0 or values.max() > 65535:
            raise DecodeError(
                f"integer pixels from {values.min()} to {values.max()}: more than 16 bits, so their range is "
                "unknown; save the image with 8 or 16 bits"
            )
        scale = 1 / 257
    return Image.fromarray(np.rint(values * scale).astype(np.uint8)).convert("RGB")
