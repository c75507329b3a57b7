"""The report of scenes whose truth is known: labels drawn beside it, tokens decoded, figures taken, on both stores."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import token_toys
from chromium import Browser, chromium
from PIL import Image

from fourmill.config import Config
from fourmill.pipeline.ingest import IngestConfig, ingest
from fourmill.pipeline.report import write_report
from fourmill.pipeline.runner import run
from fourmill.scenes import write_corpus

SCENES, SIZE = 6, 32
PICTURED = ("depth", "normal", "semseg", "panoptic", "instance", "sam_instance", "det")


def config(folder: Path, dataset: str) -> Config:
    tokenizer = {"kind": "token_toys:Bits", "checkpoint": token_toys.folder(folder / "bits"), "shape": [SIZE, SIZE]}
    fields: dict[str, Any] = {
        "dataset": dataset,
        "crops": {"size": SIZE, "min_scale": 0.5},
        "labelers": {
            "maps": {"kind": "scene_labels:SceneLabels", "size": SIZE},
            "words": {"kind": "scene_labels:SceneCaptions"},
        },
        "tokenizers": {"tok_semseg": tokenizer},
        "stages": {"labels": {"labelers": ["maps", "words"]}, "tokens": {"tokenizers": ["tok_semseg"]}},
        "ray": {"address": "none"},
    }
    return Config(**fields)


def labelled(folder: Path, dataset: str) -> Config:
    """Six scenes in three shards with their truth as labels, and class maps as tokens."""
    if not (folder / "corpus").exists():
        write_corpus(folder / "corpus", count=SCENES, size=48, seed=11, truth=True, shard_size=3)
    ingest(str(folder / "corpus"), dataset, IngestConfig(shard_size=2))
    chosen = config(folder, dataset)
    assert run(chosen).ok
    return chosen


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the corpus, the dataset and its report."""
    folder = tmp_path_factory.mktemp("scenes")
    write_report(str(folder / "d"), folder / "report.html", labelled(folder, str(folder / "d")))
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.mark.parametrize(("width", "dark"), [(390, True), (1280, False)])
def test_page_with_figures_fits_and_is_quiet(made: Path, browser: Browser, width: int, dark: bool) -> None:
    page = browser.open(made / "report.html", width=width, dark=dark)
    assert (page.requests, page.complaints) == ([], [])
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    sections = page.evaluate("[...document.querySelectorAll('h2')].map((h) => h.id)")
    assert sections[-3:] == ["lineage", "labels", "tokens"]


def test_every_label_is_drawn_beside_its_truth(made: Path, browser: Browser) -> None:
    page = browser.open(made / "report.html")
    drawn = Counter(page.evaluate("[...document.querySelectorAll('#samples ~ .sample img')].map((i) => i.alt)"))
    for name in PICTURED:
        assert (drawn[f"{name}, truth"], drawn[f"{name}, label"]) == (SCENES, SCENES), name
    assert drawn["semseg, decoded from tokens"] == SCENES
    assert drawn["rgb, picture"] == SCENES


def test_depth_has_a_scale_and_classes_have_a_legend(made: Path, browser: Browser) -> None:
    page = browser.open(made / "report.html")
    scales = page.evaluate("[...document.querySelectorAll('.ramp')].map((r) => r.parentElement.textContent)")
    assert len(scales) == SCENES
    assert all(re.fullmatch(r"[\d.]+[\d.]+ m", words) for words in scales)
    names = set(page.evaluate("[...document.querySelectorAll('.view .legend li')].map((l) => l.textContent)"))
    assert {"floor", "wall"} < names <= {"floor", "wall", "sphere", "box", "cylinder", "cone"}


def test_figures_are_those_of_truth_said_as_labels(made: Path) -> None:
    text = (made / "report.html").read_text()
    for words in ("mIoU 1.000", "PQ 1.000", "AbsRel 0.000", "class agreement 1.000|pixel accuracy 1.000"):
        assert re.search(words, text), words


def test_report_takes_no_more_than_its_share_of_a_mail(made: Path) -> None:
    assert (made / "report.html").stat().st_size < 1e6  # of 12 samples in 31 modalities: 3 MB


def test_contact_sheet_has_a_row_for_every_sample(made: Path) -> None:
    sheet = Image.open(made / "report.png")
    columns = 1 + 2 * 4 + 1 + 3 + 2  # picture; truth and label of four; decoded classes; three of objects; captions
    assert sheet.size == (columns * 116 + 4, 22 + SCENES * 116)


def test_dataset_on_an_object_store_is_reported_alike(made: Path, s3_uri: str, tmp_path: Path) -> None:
    (tmp_path / "corpus").symlink_to(made / "corpus")
    write_report(s3_uri, tmp_path / "report.html", labelled(tmp_path, s3_uri))
    remote, local = (_pictures(folder / "report.html") for folder in (tmp_path, made))
    assert remote == local
    text = (tmp_path / "report.html").read_text()
    assert s3_uri in text
    assert "testsecret123" not in text


def _pictures(page: Path) -> list[str]:
    return re.findall(r'src="(data:image/[^"]+)"', page.read_text())
