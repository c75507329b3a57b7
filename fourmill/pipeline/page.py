"""One self-contained HTML page: our style around the body that a template made. Nothing is fetched; text is escaped."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def rendered(template: Path, **values: Any) -> Any:
    """A template with its values, every one of them escaped; safe to be put into another."""
    import jinja2
    import markupsafe

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return markupsafe.Markup(environment.from_string(template.read_text(encoding="utf-8")).render(**values))


def whole_page(title: str, body: Any) -> str:
    """The page around a body from `rendered`."""
    return str(rendered(Path(__file__).parent / "page.html.j2", title=title, body=body))


def data_uri(picture: np.ndarray) -> str:
    """A picture (H, W, 3) as PNG inside the page."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")  # optimize=True saves 3 % and takes ten times as long
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
