"""The page in a real browser: whole, quiet, and readable whatever a stranger's corpus holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import helpers
import markupsafe
import numpy as np
import pytest
import report_manifests as made
import token_toys
from chromium import Browser, chromium
from PIL import Image
from token_toys import Literal

from fourmill.pipeline.manifest import Update, update_manifest
from fourmill.pipeline.page import whole_page
from fourmill.pipeline.report import write_report
from fourmill.pipeline.shards import Spec
from fourmill.pipeline.store import open_store

SCRIPT = "<script>document.title = 'taken over'</script>"
IMAGE = '"><img src=x onerror="document.title = \'taken over\'">'
KEYS = [SCRIPT, IMAGE, "مفتاح-" * 4, "k" * 3000, "plain"]
TEXTS = [SCRIPT, IMAGE, "\u202eنص من اليمين إلى اليسار\u202e", "w" * 5000, "two cats and a dog"]
SIZE = 16
SCREENS = [(390, False), (390, True), (768, False), (1280, True)]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a dataset whose keys, texts, classes, reasons, licences and paths all try to be more than text."""
    folder = tmp_path_factory.mktemp("hostile")
    rng = np.random.default_rng(0)
    data = Literal(str(folder / "d"), KEYS, size=SIZE)
    data.pictures([rng.integers(0, 255, (SIZE, SIZE, 3), np.uint8) for _ in KEYS], [{"origin": IMAGE} for _ in KEYS])
    data.put("alt_text", [*TEXTS[:4], None], quarantine={"plain": f"{IMAGE}: {SCRIPT}"})
    maker = {"class": SCRIPT, "version": IMAGE, "licence": IMAGE, "inputs": {"rgb": "corpus"}}
    weights = {
        "reference": "s3://user:hunter2@host/w?token=hunter2&x=" + "y" * 400,
        "digest": IMAGE,
        "licence": "cc-by-nc",
    }
    depth = [np.linspace(0.5, 9, SIZE * SIZE, dtype=np.float32).reshape(SIZE, SIZE) for _ in KEYS]
    data.put("depth", depth, spec=Spec(convention="metric"), producer={**maker, "checkpoint": weights})
    classes = [np.tile(np.arange(SIZE, dtype=np.uint8) // 8, (SIZE, 1)) for _ in KEYS]
    data.put("semseg", classes, spec=Spec(classes=(SCRIPT, "n" * 400)), producer=maker)
    boxes = [{"class_name": IMAGE, "score": 0.9, "box": [0.1, 0.1, 0.9, 0.9]}]
    data.put("det", [boxes for _ in KEYS], producer=maker)
    data.tokens(token_toys.bits("tok_depth", token_toys.folder(folder / "gone"), (SIZE, SIZE)), depth)
    data.done()
    corpus = {"sources": [f"https://user:hunter2@host/{SCRIPT}"], "ignored": {IMAGE: 3}, "damaged": [SCRIPT]}
    update_manifest(open_store(folder / "d"), lambda _: Update(corpus=corpus))
    write_report(str(folder / "d"), folder / "report.html")
    return folder / "report.html"


@pytest.mark.parametrize(("width", "dark"), SCREENS)
def test_page_asks_for_nothing_complains_of_nothing_and_fits(
    hostile: Path, browser: Browser, tmp_path: Path, width: int, dark: bool
) -> None:
    page = browser.open(hostile, width=width, dark=dark)
    assert page.requests == []
    assert page.complaints == []
    assert page.evaluate("document.title") == "d · Fourmill"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("[...document.images].filter((i) => !i.complete || !i.naturalWidth).length") == 0
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(20, 22, 26)" if dark else "rgb(255, 255, 255)")
    shot = Image.open(page.screenshot(tmp_path / "page.png", whole=True))
    assert shot.width == width
    assert len(shot.convert("RGB").getcolors(1 << 24) or ()) > 100  # something was drawn


def test_browser_would_tell_of_requests_errors_and_pages_too_wide(browser: Browser, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text('<img src="http://127.0.0.1:9/x.png"><p style="width:2000px">wide</p><script>nowhere()</script>')
    page = browser.open(bad, width=390)
    assert page.requests == ["http://127.0.0.1:9/x.png"]
    assert any("nowhere is not defined" in words for words in page.complaints)
    assert page.evaluate("document.documentElement.scrollWidth") > 390


def test_script_that_got_past_the_escaping_would_not_run(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(whole_page("safe", markupsafe.Markup(f"<p>{SCRIPT}{IMAGE[2:]}</p>")))
    page = browser.open(tmp_path / "page.html")
    assert page.evaluate("document.title") == "safe"
    refused = [words for words in page.complaints if "Content Security Policy" in words]
    assert sum("inline script" in words for words in refused) == 1
    assert sum("inline event handler" in words for words in refused) == 1
    assert sum("Loading the image" in words for words in refused) == 1


def test_every_section_is_there_and_reached_from_the_contents(hostile: Path, browser: Browser) -> None:
    page = browser.open(hostile)
    targets = page.evaluate("[...document.querySelectorAll('nav.toc a')].map((a) => a.getAttribute('href').slice(1))")
    sections = page.evaluate("[...document.querySelectorAll('h2')].map((h) => h.id)")
    assert targets == sections
    assert sections[:8] == ["dataset", "health", "cost", "errors", "values", "presence", "samples", "lineage"]


def test_strangers_text_is_shown_as_it_is(hostile: Path, browser: Browser) -> None:
    page = browser.open(hostile)
    keys = page.evaluate("[...document.querySelectorAll('.sample h3 .key')].map((k) => k.textContent)")
    assert keys == KEYS
    texts = page.evaluate("[...document.querySelectorAll('.texts dd')].map((k) => k.textContent)")
    assert texts == TEXTS[:4]
    legends = page.evaluate("[...document.querySelectorAll('.legend li')].map((k) => k.textContent)")
    assert f"{SCRIPT[:39]}…" in legends
    assert page.evaluate("document.querySelectorAll('script').length") == 1
    assert page.evaluate("document.querySelectorAll('img:not([src^=\"data:\"])').length") == 0


def test_drawings_say_in_words_what_they_show(hostile: Path, browser: Browser) -> None:
    page = browser.open(hostile)
    silent = "[...document.querySelectorAll('svg[role=img]')].filter((s) => !s.getAttribute('aria-label')).length"
    assert page.evaluate(silent) == 0
    assert page.evaluate("[...document.images].filter((i) => !i.alt).length") == 0
    assert page.evaluate("document.querySelectorAll('svg[role=img]').length") >= 5


def test_a_picture_is_enlarged_by_a_click_and_the_theme_by_the_button(hostile: Path, browser: Browser) -> None:
    page = browser.open(hostile)
    page.evaluate("document.querySelector('.row img').click()")
    assert page.evaluate("document.querySelector('dialog[open] p').textContent") == "rgb, picture"
    page.evaluate("document.querySelector('dialog').close()")
    page.evaluate("document.querySelector('button.theme').click()")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 22, 26)"


def test_print_is_light_without_buttons_and_unfolds_what_is_folded(hostile: Path, browser: Browser) -> None:
    page = browser.open(hostile, width=794, dark=True, media="print")  # A4 at 96 dots an inch
    assert page.evaluate("getComputedStyle(document.querySelector('button.theme')).display") == "none"
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("[...document.querySelectorAll('details')].every((d) => d.open)") is True
    assert page.evaluate("document.documentElement.scrollWidth") <= 794


def test_passwords_in_uris_are_left_out(hostile: Path) -> None:
    text = hostile.read_text()
    assert "hunter2" not in text
    assert "s3://host/w?token=…" in text


def test_weights_that_may_not_be_sold_are_flagged_wherever_they_are_named(hostile: Path, browser: Browser) -> None:
    page = browser.open(hostile)
    assert page.evaluate("document.querySelectorAll('#dataset ~ .wide .flag').length") >= 1
    licences = (
        "[...document.querySelectorAll('.check')].find((c) => c.textContent.startsWith('! lookLicences')).textContent"
    )
    assert "depth: NON-COMMERCIAL" in page.evaluate(licences)


# Datasets that lack something


def test_dataset_of_one_sample_without_labels_or_tokens(browser: Browser, tmp_path: Path) -> None:
    helpers.write_files(tmp_path / "corpus", {"a.jpg": helpers.make_jpeg(40, 50)})
    helpers.ingested(tmp_path / "corpus", tmp_path / "d")
    page = _quiet(browser, str(tmp_path / "d"), tmp_path)
    assert "No sample can be shown" in page
    assert "1samples" in page.replace("\n", "")


def test_checkpoint_that_is_gone_is_named(tmp_path: Path, browser: Browser) -> None:
    data = Literal(str(tmp_path / "d"), ["a"], size=4)
    data.pictures([np.zeros((4, 4, 3), np.uint8)])
    lineage = {
        "class": "SpatialTokenizer",
        "version": 2,
        "config": {"kind": "spatial"},
        "checkpoint": {"reference": str(tmp_path / "nowhere"), "digest": "0" * 64, "licence": "mit"},
    }
    data.put("tok_rgb", [np.array([1, 2, 3, 4])], spec=Spec(vocabulary=9, length=4, grid=(2, 2)), producer=lineage)
    page = _quiet(browser, data.done(), tmp_path)
    assert "tokens are not shown decoded: the tokenizer of tok_rgb cannot be brought back" in page
    assert "nowhere" in page


def test_objects_that_are_gone_cost_the_samples_and_no_more(tmp_path: Path, browser: Browser) -> None:
    made.publish(tmp_path / "d", made.ingested(range(3)))
    page = _quiet(browser, str(tmp_path / "d"), tmp_path)
    assert "shard 0 cannot be shown: no object" in page
    assert "3 modalities, each with all of 3 shards." in page


def test_older_snapshot_is_reported_as_it_was(tmp_path: Path, browser: Browser) -> None:
    made.publish(tmp_path / "d", made.ingested(range(2)))
    made.publish(tmp_path / "d", made.ingested(range(4)))
    write_report(str(tmp_path / "d"), tmp_path / "old.html", snapshot=1)
    text = (tmp_path / "old.html").read_text()
    assert "snapshot 1," in text
    assert "3 modalities, each with all of 2 shards." in text


def test_of_many_shards_only_those_with_the_samples_are_read(tmp_path: Path, browser: Browser) -> None:
    keys = [f"{n:03}" for n in range(800)]
    data = Literal(str(tmp_path / "d"), keys, size=4, shards=40)
    data.pictures([np.full((4, 4, 3), n % 251, np.uint8) for n in range(800)])
    data.put("tok_rgb", [np.array([1, 2])] * 800, spec=Spec(vocabulary=9, length=2, grid=(1, 2)))
    dataset = data.done()
    for path in (tmp_path / "d").glob("*/shard-*.arrow"):
        if int(path.name[6:12]) not in (0, 10, 20, 30):
            path.unlink()
    page = _quiet(browser, dataset, tmp_path)
    assert "cannot be shown" not in page
    assert "not measured" not in page
    assert "64 of 800 samples" in page


def test_dataset_without_anything_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no manifest"):
        write_report(str(tmp_path / "d"), tmp_path / "r.html")


def _quiet(browser: Browser, dataset: str, folder: Path) -> str:
    """The text of a report that was opened on a phone without a complaint."""
    write_report(dataset, folder / "r.html")
    page = browser.open(folder / "r.html", width=390)
    assert (page.requests, page.complaints) == ([], [])
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    return str(page.evaluate("document.body.innerText"))
