"""One self-contained HTML page: our style around the body that a template made. Nothing is fetched; text is escaped.

Colours stand once, as pairs for a light and a dark screen; drawings use them by class, so that they follow the theme.
"""

from __future__ import annotations

import base64
import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

_FLAT = 256  # a picture of so many colours is drawn, not photographed: as PNG it is smaller than as WebP, and exact
_QUALITY = 82  # of WebP; a crop of 128 pixels takes 3 KB where PNG takes 25


def rendered(template: Path, **values: Any) -> Any:
    """A template with its values, every one of them escaped; safe to be put into another. Templates may include others
    beside them and beside this module."""
    import jinja2
    import markupsafe

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return markupsafe.Markup(environment.get_template(template.name).render(**values))


def whole_page(title: str, body: Any) -> str:
    """The page around a body from `rendered`. Its security policy lets no script run but ours, by its digest, so that
    text which got past the escaping would still be harmless."""
    import markupsafe

    folder = Path(__file__).parent
    script = (folder / "page.js").read_text(encoding="utf-8")
    sha256 = "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {"title": title, "body": body, "script": markupsafe.Markup(script), "script_digest": sha256}
    return str(rendered(folder / "page.html.j2", **parts))


def data_uri(picture: np.ndarray) -> str:
    """A picture (H, W, 3) inside the page: PNG where it has few colours, WebP where it is a photograph."""
    file = io.BytesIO()
    image = Image.fromarray(picture)
    if image.getcolors(_FLAT) is not None:
        _indexed(picture).save(file, "PNG")
        return _uri("png", file)
    image.save(file, "WEBP", quality=_QUALITY, method=4)
    return _uri("webp", file)


def _indexed(picture: np.ndarray) -> Image.Image:
    """The same pixels as numbers of at most 256 colours."""
    packed = picture.reshape(-1, 3).astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    colours, index = np.unique(packed, return_inverse=True)
    image = Image.fromarray(index.reshape(picture.shape[:2]).astype(np.uint8))
    image.putpalette(np.stack([colours >> 16, colours >> 8 & 255, colours & 255], -1).astype(np.uint8).tobytes())
    return image


def _uri(format_name: str, file: io.BytesIO) -> str:
    return f"data:image/{format_name};base64," + base64.b64encode(file.getvalue()).decode()
