"""Pictures from strangers: exact upright pixels for every layout, or a reason; nothing huge is ever decoded."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
from helpers import encoded, make_jpeg, make_picture, make_png, png_claiming
from PIL import Image, ImageFile

from fourmill.pipeline import images
from fourmill.pipeline.images import BadImageError, decode, describe, size_of

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)
UPRIGHT = np.array([[RED, GREEN, BLUE], [WHITE, BLACK, RED]], np.uint8)  # 2 x 3 pixels, no two turns alike

# How a camera that notes orientation n stores the upright picture above (EXIF 2.3, tag 0x0112).
STORED = {
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.transpose(1, 0, 2),
    6: UPRIGHT.transpose(1, 0, 2)[::-1],
    7: UPRIGHT.transpose(1, 0, 2)[::-1, ::-1],
    8: UPRIGHT.transpose(1, 0, 2)[:, ::-1],
}


def pixels(data: bytes) -> np.ndarray:
    picture = decode(data)
    assert picture.mode == "RGB"
    return np.asarray(picture)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_each_orientation_comes_upright_to_the_pixel(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(Image.fromarray(np.ascontiguousarray(STORED[orientation])), format, exif=exif, **options)
    np.testing.assert_array_equal(pixels(data), UPRIGHT)
    assert size_of(data) == (2, 3)
    assert describe(data) == {"format": format, "mode": "RGB", "orientation": orientation, "frames": 1}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_each_orientation_of_a_jpeg_comes_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(STORED[orientation].repeat(16, 0).repeat(16, 1))  # 16: whole blocks, so hardly any loss
    data = encoded(stored, "JPEG", quality=100, subsampling=0, exif=exif)
    found = pixels(data)[8::16, 8::16].astype(int)
    assert np.abs(found - UPRIGHT).max() <= 3
    assert size_of(data) == (32, 48)


def test_an_upright_result_is_not_turned_again_by_its_exif() -> None:
    assert decode(make_jpeg(orientation=6)).getexif().get(0x0112, 1) == 1


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_an_orientation_that_does_not_exist_is_upright(orientation: int) -> None:
    assert decode(make_jpeg(24, 32, orientation=orientation)).size == (32, 24)


def test_cmyk_jpeg_has_the_colours_of_its_inks() -> None:
    inks = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # magenta and yellow make red
    assert np.abs(pixels(encoded(inks, "JPEG", quality=100)).astype(int) - RED).max() <= 3


def test_grey_and_one_bit_pictures_have_three_equal_channels() -> None:
    grey = np.array([[0, 7, 255]], np.uint8)
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(grey))), grey[..., None].repeat(3, 2))
    bits = Image.fromarray(np.array([[True, False]]))
    np.testing.assert_array_equal(pixels(encoded(bits)), [[WHITE, BLACK]])


def test_alpha_is_laid_over_white() -> None:
    rgba = np.array([[(255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 51)]], np.uint8)  # 51 of 255: a fifth of black
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(rgba))), [[RED, WHITE, (204, 204, 204)]])
    grey_alpha = Image.fromarray(np.array([[(0, 255), (0, 0)]], np.uint8), "LA")
    np.testing.assert_array_equal(pixels(encoded(grey_alpha)), [[BLACK, WHITE]])


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(format: str) -> None:
    values = np.array([[0, 257, 32896, 65535]], np.uint16)
    expected = np.array([0, 1, 128, 255], np.uint8)[None, :, None].repeat(3, 2)
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(values), format)), expected)


def test_float_tiff_of_zero_to_one_spans_black_to_white() -> None:
    values = np.array([[0.0, 0.5, 1.0, np.nan]], np.float32)
    assert pixels(encoded(Image.fromarray(values), "TIFF"))[0, :3, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("format", ["GIF", "WEBP", "TIFF", "PNG"])
def test_of_several_frames_the_first_is_taken(format: str) -> None:
    frames = [Image.new("RGB", (4, 2), color) for color in (RED, GREEN, BLUE)]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    np.testing.assert_array_equal(pixels(data), np.full((2, 4, 3), RED))
    assert describe(data)["frames"] == 3


def test_palette_with_a_transparent_entry_shows_white_there() -> None:
    indexed = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    indexed.putpalette([255, 0, 0, 0, 0, 255])
    for format in ("PNG", "GIF"):
        np.testing.assert_array_equal(pixels(encoded(indexed, format, transparency=0)), [[WHITE, BLUE]])
        np.testing.assert_array_equal(pixels(encoded(indexed, format)), [[RED, BLUE]])


def test_a_transparent_colour_of_an_rgb_png_shows_white() -> None:
    data = encoded(Image.fromarray(np.array([[RED, BLUE]], np.uint8)), transparency=RED)
    np.testing.assert_array_equal(pixels(data), [[WHITE, BLUE]])


@pytest.mark.parametrize("pillows_limit", [Image.MAX_IMAGE_PIXELS, None])  # None: as other libraries set it
@pytest.mark.parametrize(("height", "width"), [(13_378, 13_378), (20_000, 20_000), (30_000, 2**31 - 1)])
def test_a_huge_picture_is_refused_before_any_pixel_is_decoded(
    height: int, width: int, pillows_limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillows_limit)
    data = png_claiming(height, width)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("decoded"))
    for reader in (decode, size_of, describe):
        with pytest.raises(BadImageError, match=r"^too large: "):
            reader(data)


@pytest.mark.filterwarnings("ignore:Image size")
def test_the_largest_picture_allowed_is_not_refused_for_its_size() -> None:
    assert size_of(png_claiming(13_377, 13_377)) == (13_377, 13_377)  # 178,944,129 of 178,956,970 pixels


def test_too_many_bytes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_BYTES", 100)
    with pytest.raises(BadImageError, match=r"^too large: 101 bytes, at most 100"):
        decode(b"x" * 101)


def test_zero_bytes_are_an_empty_image() -> None:
    with pytest.raises(BadImageError, match=r"^empty: "):
        decode(b"")


@pytest.mark.parametrize("data", [b"<!DOCTYPE html><html></html>", b"\0" * 1000, b"%PDF-1.7", b"%!PS-Adobe-3.0 EPSF"])
def test_what_is_no_image_is_called_so(data: bytes) -> None:
    with pytest.raises(BadImageError, match=r"^not an image: begins with b'"):
        decode(data)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "JPEG2000", "PPM"])
def test_each_format_decodes_whole_and_cut_in_half_is_truncated(format: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 48, 3), np.uint8))
    data = encoded(noise, format)
    assert decode(data).size == (48, 64)
    # A TIFF keeps its directory, a WebP its length where half a file ends: those have no header left to read.
    with pytest.raises(BadImageError, match=r"^(truncated or corrupt|not an image|unreadable header): "):
        decode(data[: len(data) // 2])


def test_a_jpeg_that_lacks_its_end_is_truncated() -> None:
    with pytest.raises(BadImageError, match=r"^truncated or corrupt: .*truncated"):
        decode(make_jpeg(64, 64)[:-200])


def test_a_gif_whose_second_frame_is_broken_still_gives_its_first() -> None:
    frames = [Image.new("RGB", (40, 20), color) for color in (RED, GREEN)]
    data = bytearray(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    second = data.rfind(b",", 0, len(data) - 4)
    data[second + 5 :] = b"\xff" * 3
    assert decode(bytes(data)).size == (40, 20)
    assert describe(bytes(data))["frames"] in (None, 1, 2)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "JPEG2000", "PPM"])
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_give_a_picture_or_a_reason_and_nothing_else(
    format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 1 << 20)  # or damaged headers ask for a minute of work
    rng = random.Random(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif} if format in ("JPEG", "PNG", "WEBP", "TIFF") else {}
    frames = {"save_all": True, "append_images": [make_picture(8, 12, 1)]} if format in ("GIF", "TIFF") else {}
    whole = encoded(make_picture(8, 12), format, **options, **frames)
    usable, reasons = 0, set()
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        for reader in (decode, size_of, describe):
            try:
                reader(bytes(data))
                usable += 1
            except BadImageError as error:
                reasons.add(str(error).partition(": ")[0])
    assert usable > 0
    assert reasons <= {"truncated or corrupt", "unsupported", "not an image", "unreadable header", "too large", "empty"}


def test_size_of_agrees_with_decode() -> None:
    for data in (make_png(5, 9), make_jpeg(5, 9), make_jpeg(5, 9, orientation=8)):
        height, width = size_of(data)
        assert decode(data).size == (width, height)


def test_decoding_does_not_change_what_describe_says() -> None:
    data = encoded(Image.open(io.BytesIO(make_png())).convert("P"))
    decode(data)
    assert describe(data) == {"format": "PNG", "mode": "P", "orientation": 1, "frames": 1}
