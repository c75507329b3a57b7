"""The demonstration at a small size: every step runs, the page is whole, and a second run does nothing again."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import pytest
from helpers import all_records
from PIL import Image

from fourmill.config import Config
from fourmill.demo.run import run_demo
from fourmill.pipeline.manifest import read_manifest
from fourmill.pipeline.manifest.verify import verify
from fourmill.pipeline.runner import run
from fourmill.pipeline.store import open_store

SMALL = ["pretrain.steps=6", "pretrain.batch_size=8", "pretrain.eval_every=6", "pretrain.num_threads=1"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo on 40 scenes with a model that has no time to learn."""
    out = tmp_path_factory.mktemp("demo")
    run_demo(str(out), [*SMALL, "ray.address=none"], count=40)
    return out


def test_demo_makes_every_modality_and_a_sound_manifest(demo: Path) -> None:
    store = open_store(demo / "dataset")
    manifest = read_manifest(store)
    ingested = ["rgb", "alt_text", "source", "crop_settings"]
    segments = ["panoptic", "instance", "sam_instance"]
    labels = ["depth", "normal", "semseg", *segments, "det", "clip", "clip_global", "caption"]
    labels += ["canny_edge", "color_palette", "metadata"]
    tokens = [f"tok_{name}" for name in (*labels, "rgb", "alt_text") if name != "panoptic"]
    assert manifest.modalities == sorted([*ingested, *labels, *tokens])
    assert {r.present for r in all_records(manifest)} == {40}
    assert verify(store, manifest).ok


def test_report_is_one_page_with_pictures_and_figures_and_fetches_nothing(demo: Path) -> None:
    page = (demo / "report.html").read_text()
    pictures = re.findall(r'src="data:image/(?:png|webp);base64,([^"]+)"', page)
    sizes = {Image.open(io.BytesIO(base64.b64decode(p))).size for p in pictures}
    assert len(pictures) > 4 * 12  # more than four pictures a sample
    assert sizes == {(128, 128), (256, 256), (144, 144)}  # boxes at twice the size, palettes
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    teachers = ("depth", "normal", "semseg", "panoptic", "detection", "sam", "caption", "clip")
    for words in ("Labels against truth", *(f"demo:{name}" for name in teachers)):
        assert words in page
    for words in ("AbsRel", "mIoU", "PQ", "AP50", "best-mask IoU", "phrase F1", "image to text r1"):
        assert words in page
    for words in ("The worst labels", "token frequencies", "4M from RGB alone", "Lineage"):
        assert words in page
    assert Image.open(demo / "report.png").size[0] > 2000  # a column for every label, and most in three ways


def test_corpus_text_is_escaped_in_the_report(tmp_path: Path) -> None:
    import toys

    from fourmill.pipeline.report import write_report

    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.jpg").write_bytes(toys.jpeg(toys.picture(0)))
    (corpus / "a.txt").write_text("<script>alert(1)</script>")
    dataset = toys.make_dataset(tmp_path, str(tmp_path / "d"))
    run(Config(**toys.config(dataset)))
    page, _ = write_report(dataset, tmp_path / "r.html")
    assert "<script>alert" not in page.read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page.read_text()


def test_one_pass_without_stored_labels_gives_the_tokens_of_two_passes(demo: Path, tmp_path: Path) -> None:
    from fourmill.config import load_config
    from fourmill.pipeline.ingest import IngestConfig, ingest

    dataset = str(tmp_path / "fused")
    ingest(str(demo / "corpus"), dataset, IngestConfig(shard_size=128))
    stage = {"labelers": ["clip", "depth"], "tokenizers": ["tok_clip", "tok_depth"], "store": ["tok_clip", "tok_depth"]}
    config = load_config(demo / "config.yaml", [f"dataset={dataset}", f"stages={json.dumps({'one': stage})}"])
    assert run(config).ok
    fused, phased = read_manifest(open_store(dataset)), read_manifest(open_store(demo / "dataset"))
    assert "clip" not in fused.modalities
    for name in ("tok_clip", "tok_depth"):
        assert [r.digest for r in fused.records(name)] == [r.digest for r in phased.records(name)]


def test_second_run_of_the_demo_computes_nothing_again(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {i.name for i in open_store(demo / "dataset").list()}
    run_demo(str(demo), [*SMALL, "ray.address=none"], count=40)
    assert {i.name for i in open_store(demo / "dataset").list()} == before
    assert "0 of 0 units done" in capsys.readouterr().out
