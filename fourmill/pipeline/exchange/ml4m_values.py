"""Values in ml-4m's files, and back: what differs from our own encoding, with what is lost.

rgb            .jpg/.png    the same bytes; .png of the decoded picture where ml-4m would see another picture
caption        .json        {"caption": text}
det            .json        boxes of crop 0 in 0..1 of the picture; each crop's own under "crops", which ml-4m ignores
color_palette  .json        [{"1": [...], ..., "7": [...]}, ...]; a missing n repeats the next smaller one
metadata       .json        the same text
crop_settings  .npy int64   (crops, 5)
tokens         .npy int16   (crops, L); int32 for vocabularies above 32,768
depth          .png 16 bit  65535 is the map's maximum, which stands in the file: error 2^-17 of it
normal         .png RGB     (n + 1) / 2, in Omnidata's frame, which is ours: error 1/255 in each number
semseg, edges  .png         the same bytes
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image, PngImagePlugin

from fourmill.modalities import Modality
from fourmill.pipeline import codecs, images
from fourmill.pipeline.exchange.members import image_extension, to_npy
from fourmill.pipeline.geometry import Crop, apply_crop
from fourmill.pipeline.shards import Spec

Frame = Literal["picture", "crop"]
Converted = tuple[str, bytes, str | None]  # extension, content, what had to be changed
_INT16_IDS = 1 << 15
_PALETTES = 7
_MAXIMUM = "Maximum"  # the PNG text field with a depth map's largest value
_SAME_TO_ALL = ("RGB", "L")  # modes that every decoder turns into the same RGB


def tokens(stored: Sequence[Any], spec: Spec) -> Converted:
    narrow = (spec.vocabulary or 0) <= _INT16_IDS
    return "npy", to_npy(np.stack(stored).astype(np.int16 if narrow else np.int32)), None


def crops(stored: Sequence[Any]) -> Converted:
    return "npy", to_npy(np.stack([np.asarray(c) for c in stored]).astype(np.int64)), None


def caption(text: str) -> Converted:
    # ASCII: ml-4m opens the file in the machine's own encoding
    return "json", json.dumps({"caption": text}).encode(), None


def picture(data: bytes) -> Converted:
    """ml-4m neither turns a picture upright nor lays it over white; crops are in upright pixels."""
    told, extension = images.describe(data), image_extension(data)
    if extension in ("jpg", "png") and told["orientation"] == 1 and told["mode"] in _SAME_TO_ALL:
        with Image.open(io.BytesIO(data), formats=images.FORMATS) as image:
            if "transparency" not in image.info:
                return extension, data, None
    return "png", _png(images.decode(data)), f"{told['format']} rewritten as upright PNG"


def cut_picture(data: bytes, crop: Any, size: int) -> Converted:
    return "png", _png(Image.fromarray(apply_crop(images.decode(data), Crop(*map(int, crop)), size))), None


def _png(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def boxes(stored: Sequence[str], crop_rows: Sequence[Any], picture_data: bytes) -> Converted:
    """Crop 0's boxes in the frame of the picture; ml-4m cuts them to whichever crop it draws."""
    height, width = images.size_of(picture_data)
    crop = Crop(*map(int, crop_rows[0]))
    own = [json.loads(text) for text in stored]
    instances = [
        {"boxes": _in_picture(o["box"], crop, height, width), "class_name": o["class_name"], "score": o["score"]}
        for o in own[0]
    ]
    return "json", json.dumps({"instances": instances, "crops": own}).encode(), None


def cut_boxes(stored: str) -> Converted:
    own = json.loads(stored)
    instances = [{"boxes": o["box"], "class_name": o["class_name"], "score": o["score"]} for o in own]
    return "json", json.dumps({"instances": instances, "crops": [own]}).encode(), None


def _in_picture(box: Sequence[float], crop: Crop, height: int, width: int) -> list[float]:
    x0, y0, x1, y1 = box
    if crop.flip:
        x0, x1 = 1.0 - x1, 1.0 - x0
    return [
        (crop.left + x0 * crop.width) / width,
        (crop.top + y0 * crop.height) / height,
        (crop.left + x1 * crop.width) / width,
        (crop.top + y1 * crop.height) / height,
    ]


def palettes(stored: Sequence[str]) -> Converted:
    """ml-4m draws n from 1 to 7 and fails where a picture has fewer colours: gaps repeat the next smaller palette."""
    filled, note = [], None
    for text in stored:
        own: dict[str, list[Any]] = json.loads(text)
        whole: dict[str, list[Any]] = {}
        for n in range(1, _PALETTES + 1):
            whole[str(n)] = own.get(str(n)) or whole.get(str(n - 1)) or next(iter(own.values()), [])
        note = "fewer than 7 palettes, the largest repeated" if len(own) < _PALETTES else note
        filled.append(whole)
    return "json", json.dumps(filled).encode(), note


def map_picture(entry: Modality, stored: Any) -> Converted:
    if entry.codec == "png8":
        return "png", stored, None
    values = codecs.decode(entry, stored)
    if entry.name == "normal":
        coded = np.rint((values.transpose(1, 2, 0) + 1) * 127.5).clip(0, 255).astype(np.uint8)
        return "png", _png(Image.fromarray(coded)), "8 bits a number"
    top = float(values.max()) or 1.0
    meta = PngImagePlugin.PngInfo()
    meta.add_text(_MAXIMUM, repr(top))
    coded = np.rint(values.clip(0) * (65535.0 / top)).astype(np.uint16)
    return "png", _png(Image.fromarray(coded), pnginfo=meta), "16 bits a pixel"


def side_of(entry: Modality, stored: Any) -> int:
    return int(codecs.decode(entry, stored).shape[-1])


def read_caption(tree: Any) -> list[str]:
    """The texts of a caption file: a string, {"caption": …}, or a list of either."""
    texts = [t.get("caption") if isinstance(t, Mapping) else t for t in (tree if isinstance(tree, list) else [tree])]
    found = [text for text in texts if isinstance(text, str)]
    if not found or len(found) < len(texts):
        raise ValueError("not a caption: a string, {'caption': string} or a list of them is needed")
    return found


def read_boxes(tree: Any, crop_rows: Sequence[Any], picture_data: bytes) -> list[list[dict[str, Any]]]:
    """Objects for each crop: our own if they are there, else those of the picture moved into each crop."""
    own = tree.get("crops") if isinstance(tree, Mapping) else None
    if isinstance(own, list) and len(own) == len(crop_rows):
        return own
    found = [(o["boxes"], str(o["class_name"]), float(o["score"])) for o in tree["instances"]]
    found.sort(key=lambda o: -o[2])
    height, width = images.size_of(picture_data)
    corners = np.array([b for b, _, _ in found], np.float64).reshape(-1, 4)
    result = []
    for crop in crop_rows:
        moved, left = Crop(*map(int, crop)).boxes(corners, height, width)
        result.append(
            [
                {"box": box, "class_name": name, "score": score}
                for box, (_, name, score), keep in zip(moved.round(6).tolist(), found, left, strict=True)
                if keep and box[0] < box[2] and box[1] < box[3]
            ]
        )
    return result


def read_palettes(tree: Any, count: int) -> list[dict[str, Any]]:
    """Palettes for each crop, without those that only fill a gap; one for the picture serves all crops."""
    if not isinstance(tree, list) or len(tree) not in (1, count):
        raise ValueError(f"not palettes of {count} crops: a list of 1 or {count} objects is needed")
    own = [{n: p[n] for n in sorted(p, key=int) if len(p[n]) == int(n)} for p in tree]
    return own * count if len(own) == 1 else own


def read_map(entry: Modality, data: bytes, crop: Any, size: int) -> np.ndarray:
    """A map as we hold it, of one crop: cut out and resized if the file is of the whole picture."""
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        image.load()
        top = float(image.info.get(_MAXIMUM, 0)) or 1.0
        cut = Crop(*map(int, crop))
        box = (cut.left, cut.top, cut.left + cut.width, cut.top + cut.height)
        if box != (0, 0, *image.size) or image.size != (size, size):
            image = image.crop(box).resize((size, size), Image.Resampling.NEAREST)  # noqa: PLW2901
        values = np.asarray(image)
    values = values[:, ::-1] if cut.flip else values
    if entry.name == "normal":
        return _normals(values, bool(cut.flip))
    return values.astype(np.float64) * (top / 65535.0) if entry.name == "depth" else values


def _normals(values: np.ndarray, flipped: bool) -> np.ndarray:
    coded = values[..., :3].transpose(2, 0, 1).astype(np.float32) / 127.5 - 1
    if flipped:
        coded[0] = -coded[0]
    length = np.linalg.norm(coded, axis=0)
    known = length > 0.5  # (0, 0, 0), no normal, comes back as three times 1/255
    return np.where(known, coded / np.where(known, length, 1), 0)
