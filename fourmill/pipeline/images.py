"""Decoding pictures from strangers: every layout becomes upright 8-bit RGB, or an error that says why not.

Bounded before anything is decoded: bytes, pixels, and the formats Pillow may try.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "JPEG2000", "PPM")  # Pillow opens MPO as JPEG
MAX_PIXELS = 178_956_970  # Pillow's own limit for a decompression bomb: 0.5 GB as RGB
MAX_BYTES = 256 << 20
# Pillow warns at half the limit that we enforce ourselves. For the process, as `catch_warnings` is not thread-safe.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF orientation


class BadImageError(ValueError):
    """A picture that cannot be used; the text begins with a short kind, a colon, and the particulars."""


def decode(data: bytes) -> Image.Image:
    """Upright RGB picture. Alpha is laid over white, 16 bits are scaled to 8, the first frame of several is taken."""
    with _opened(data) as image:
        try:
            image.load()
        except Exception as error:  # Pillow's readers let through whatever damaged bytes make them stumble over
            raise BadImageError(f"truncated or corrupt: {error or type(error).__name__}") from error
        try:
            return _to_rgb(_upright(image))
        except (OSError, ValueError, MemoryError) as error:
            raise BadImageError(f"unsupported: a picture of mode {image.mode}: {error}") from error


def size_of(data: bytes) -> tuple[int, int]:
    """(height, width) of the upright picture, from its header alone."""
    with _opened(data) as image:
        width, height = image.size
        if image.format == "TIFF":  # Pillow's `size` is already turned; in which versions is not worth knowing
            width, height = image.tag_v2[256], image.tag_v2[257]  # type: ignore[attr-defined]
        turned = _orientation(image) in (5, 6, 7, 8)
    return (width, height) if turned else (height, width)


def describe(data: bytes) -> dict[str, object]:
    """What the header says: file format, mode, EXIF orientation, and frames (None if damage hides their number)."""
    with _opened(data) as image:
        # In this order: counting frames can change the mode.
        told = {"format": image.format, "mode": image.mode, "orientation": _orientation(image)}
        return {**told, "frames": _frames(image)}


def _frames(image: Image.Image) -> int | None:
    try:
        return int(getattr(image, "n_frames", 1))
    except Exception:  # a later frame is damaged; the first, which is what we use, may be whole
        return None


def _opened(data: bytes) -> Image.Image:
    if not data:
        raise BadImageError("empty: the image has zero bytes")
    if len(data) > MAX_BYTES:
        raise BadImageError(f"too large: {len(data)} bytes, at most {MAX_BYTES} are decoded")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise BadImageError(f"not an image: begins with {data[:8]!r}") from error
    except Image.DecompressionBombError as error:  # above twice its own limit Pillow refuses by itself
        raise BadImageError(f"too large: {error}") from error
    except Exception as error:
        raise BadImageError(f"unreadable header: {error or type(error).__name__}") from error
    width, height = image.size
    if width < 1 or height < 1:
        raise BadImageError(f"empty: the image has {width} x {height} pixels")
    if width * height > MAX_PIXELS:
        raise BadImageError(f"too large: {width} x {height} pixels, at most {MAX_PIXELS} are decoded")
    return image


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # damaged EXIF blocks raise anything; the picture itself is fine
        return 1


def _upright(image: Image.Image) -> Image.Image:
    turn = _TURNS.get(_orientation(image))
    if turn is None:
        return image
    turned = image.transpose(turn)
    turned.info = {k: v for k, v in image.info.items() if k == "transparency"}  # or its EXIF would turn it once more
    return turned


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit grey PNG and TIFF: I;16, I;16B, or I
        return _scaled_to_8_bits(image)
    if image.mode in ("RGBA", "RGBa", "LA", "PA") or "transparency" in image.info:
        over = image.convert("RGBA")
        white = Image.new("RGBA", over.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, over).convert("RGB")
    return image.convert("RGB")  # L, 1, P, CMYK, YCbCr, LAB


def _scaled_to_8_bits(image: Image.Image) -> Image.Image:
    """65535 -> 255. Pillow's own convert() clips everything above 255 to white."""
    values = np.nan_to_num(np.asarray(image).astype(np.float64))
    if image.mode == "F" and values.max(initial=0) <= 1.0:
        values = values * 65535.0
    grey = np.clip(np.rint(values / 257.0), 0, 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")
