"""Scenes: exact truth, true captions, the same bytes every time, and a corpus that img2dataset's readers read."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fourmill.scenes import CLASSES, RGB, SHAPES, Scene, render, write_corpus
from fourmill.scenes.cache import open_cache
from fourmill.scenes.captions import holds

COUNTS = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4}
OBJECT = re.compile(
    rf"\b({'|'.join(COUNTS)}) (small |large )?(striped |checkered |dotted )?"
    rf"({'|'.join(RGB)}) ({'|'.join(SHAPES)})(?:e?s)?\b"
)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    """Sixty scenes of a seed that nothing is trained on."""
    return [render(12, index, 128) for index in range(60)]


def test_import_needs_no_torch() -> None:
    code = "import sys, fourmill.scenes; print(sorted({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_same_seed_and_index_give_the_same_scene() -> None:
    one, other = render(3, 5, 96), render(3, 5, 96)
    for name in ("image", "depth", "normals", "semantic", "instances"):
        assert getattr(one, name).tobytes() == getattr(other, name).tobytes()
    assert (one.objects, one.caption, one.camera) == (other.objects, other.caption, other.camera)
    assert render(3, 6, 96).image.tobytes() != one.image.tobytes()
    assert render(4, 5, 96).image.tobytes() != one.image.tobytes()


def test_arrays_have_the_stated_shapes_and_types() -> None:
    scene = render(0, 0, 48)
    assert scene.image.shape == (48, 48, 3)
    assert scene.depth.shape == (48, 48)
    assert (scene.image.dtype, scene.depth.dtype, scene.normals.dtype) == (np.uint8, np.float32, np.float32)
    assert (scene.semantic.dtype, scene.instances.dtype) == (np.uint8, np.uint8)


def test_another_size_shows_the_same_scene() -> None:
    for index in range(8):
        small, large = render(3, index, 64), render(3, index, 128)
        assert small.caption == large.caption
        assert [o.centre for o in small.objects] == [o.centre for o in large.objects]
        between = large.depth.reshape(64, 2, 64, 2).mean(axis=(1, 3))
        assert np.median(np.abs(between - small.depth) / small.depth) < 1e-3


def test_normals_agree_with_the_depth(scenes: list[Scene]) -> None:
    for scene in scenes[:12]:
        size = len(scene.depth)
        rows, columns = (np.mgrid[:size, :size] + 0.5 - size / 2) / scene.camera.focal
        points = np.stack([columns, rows, np.ones_like(rows)], axis=-1) * scene.depth[..., None]
        across = points[1:-1, 2:] - points[1:-1, :-2]
        down = points[2:, 1:-1] - points[:-2, 1:-1]
        from_depth = np.cross(down, across)
        from_depth /= np.linalg.norm(from_depth, axis=-1, keepdims=True)
        cosine = (from_depth * scene.normals[1:-1, 1:-1]).sum(axis=-1)
        degrees = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
        assert np.median(degrees) < 0.1
        floor = scene.semantic[1:-1, 1:-1] == 0
        assert np.median(degrees[floor]) < 0.1
        bodies = scene.semantic[1:-1, 1:-1] > 1
        assert np.median(degrees[bodies]) < 1.0  # a 128 px chord across a curved side is not its tangent


def test_normals_are_unit_and_face_the_camera(scenes: list[Scene]) -> None:
    for scene in scenes[:12]:
        size = len(scene.depth)
        rows, columns = (np.mgrid[:size, :size] + 0.5 - size / 2) / scene.camera.focal
        view = np.stack([columns, rows, np.ones_like(rows)], axis=-1)
        np.testing.assert_allclose(np.linalg.norm(scene.normals, axis=-1), 1, atol=1e-5)
        assert ((view * scene.normals).sum(axis=-1) < 1e-5).all()


def test_floor_depth_follows_from_camera_height_and_pitch(scenes: list[Scene]) -> None:
    for scene in scenes[:12]:
        size, pitch = len(scene.depth), np.radians(scene.camera.pitch)
        rows = ((np.arange(size) + 0.5 - size / 2) / scene.camera.focal)[:, None]
        expected = scene.camera.height / (rows * np.cos(pitch) + np.sin(pitch)) * np.ones((1, size))
        floor = scene.semantic == 0
        np.testing.assert_allclose(scene.depth[floor], expected[floor], rtol=1e-5)


def test_boxes_are_the_extents_of_the_masks(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert 1 <= len(scene.objects) <= 4
        assert sorted(np.unique(scene.instances)) == [0, *(o.instance for o in scene.objects)]
        for thing in scene.objects:
            mask = scene.instances == thing.instance
            rows, columns = np.nonzero(mask)
            assert thing.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert thing.area == mask.sum() >= 0.01 * mask.size
            assert set(scene.semantic[mask]) == {CLASSES.index(thing.class_name)}
        assert set(np.unique(scene.semantic[scene.instances == 0])) <= {0, 1}


def test_captions_mention_exactly_the_visible_objects(scenes: list[Scene]) -> None:
    for scene in scenes:
        truth = Counter((o.colour, o.class_name) for o in scene.objects)
        mentioned: Counter[tuple[str, str]] = Counter()
        for count, size, texture, colour, shape in OBJECT.findall(scene.caption):
            mentioned[colour, shape] += COUNTS[count]
            fitting = [
                o
                for o in scene.objects
                if (o.colour, o.class_name) == (colour, shape)
                and size.strip() in ("", o.size)
                and texture.strip() in ("", o.texture)
            ]
            assert len(fitting) >= COUNTS[count], (scene.caption, scene.objects)
        assert mentioned == truth, scene.caption
        assert Counter(re.findall(rf"({'|'.join(RGB)}) ({'|'.join(SHAPES)})", scene.summary)) == truth


def test_relations_in_captions_are_true(scenes: list[Scene]) -> None:
    relation = re.compile(rf"{OBJECT.pattern} (?:standing )?(left of|right of|in front of|behind) {OBJECT.pattern}")
    checked = 0
    for scene in [*scenes, *(render(13, index, 32) for index in range(60))]:
        for found in relation.findall(scene.caption):
            one, word, other = found[:5], found[5], found[6:]
            pairs = [(a, b) for a in _fitting(scene, one) for b in _fitting(scene, other) if a is not b]
            assert any(holds(word, a, b) for a, b in pairs), scene.caption
            checked += 1
    assert checked > 15


def _fitting(scene: Scene, words: tuple[str, ...]) -> list:
    _, size, texture, colour, shape = words
    return [
        o
        for o in scene.objects
        if (o.colour, o.class_name) == (colour, shape)
        and size.strip() in ("", o.size)
        and texture.strip() in ("", o.texture)
    ]


def test_relations_hold_in_the_picture_and_unknown_ones_are_refused(scenes: list[Scene]) -> None:
    scene = next(s for s in scenes if len(s.objects) >= 2)
    one, other = sorted(scene.objects, key=lambda o: o.middle)[:2]
    assert holds("left of", one, other) == holds("right of", other, one)
    with pytest.raises(ValueError, match="unknown relation"):
        holds("above", one, other)


def test_backgrounds_in_captions_are_true(scenes: list[Scene]) -> None:
    for scene in scenes:
        for word, (colour, texture) in (("floor", scene.floor), ("wall", scene.wall)):
            found = re.search(rf"(striped |checkered )?(\w+) {word}", scene.caption)
            if found:
                assert found[2] == colour
                assert (found[1] or texture).strip() == texture


def test_captions_nearly_identify_the_scene() -> None:
    assert len({render(14, index, 16).caption for index in range(300)}) >= 295


@pytest.mark.parametrize(("seed", "index", "size"), [(-1, 0, 64), (0, -1, 64), (0, 0, 8), (0, 0, 10_000)])
def test_impossible_requests_are_refused(seed: int, index: int, size: int) -> None:
    with pytest.raises(ValueError, match=r"negative|outside"):
        render(seed, index, size)


def test_corpus_is_byte_identical_whatever_the_workers(tmp_path: Path) -> None:
    write_corpus(tmp_path / "one", 7, 32, seed=2, truth=True, shard_size=4)
    write_corpus(tmp_path / "two", 7, 32, seed=2, truth=True, shard_size=4, workers=2)
    names = sorted(p.name for p in (tmp_path / "one").iterdir())
    stems = ("00000", "00001")
    assert names == sorted(f"{stem}{end}" for stem in stems for end in (".tar", ".parquet", "_stats.json"))
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_corpus_is_read_by_webdataset_and_agrees_with_render(tmp_path: Path) -> None:
    import webdataset

    write_corpus(tmp_path / "c", 5, 48, seed=2, truth=True, shard_size=3)
    shards = sorted(str(p) for p in tmp_path.glob("c/*.tar"))
    samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert [s["__key__"] for s in samples] == ["000000000", "000000001", "000000002", "000010000", "000010001"]
    for index, sample in enumerate(samples):
        scene, row = render(2, index, 48), json.loads(sample["json"])
        assert row["scene"] == {"seed": 2, "index": index, "size": 48}
        assert (row["status"], row["key"], row["width"]) == ("success", sample["__key__"], 48)
        assert sample["txt"].decode() == row["caption"] == scene.caption
        picture = np.asarray(Image.open(io.BytesIO(sample["jpg"])), dtype=float)
        assert np.abs(picture - scene.image).mean() < 8  # JPEG halves the colours of a noisy picture
        np.testing.assert_array_equal(np.load(io.BytesIO(sample["depth.npy"])), scene.depth)
        np.testing.assert_allclose(np.load(io.BytesIO(sample["normal.npy"])), scene.normals, atol=1e-3)
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(sample["semseg.png"]))), scene.semantic)
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(sample["instances.png"]))), scene.instances)
        for box, thing in zip(row["boxes"], scene.objects, strict=True):
            assert box["class_name"] == thing.class_name
            np.testing.assert_allclose(np.array(box["box"]) * 48, thing.box)


def test_corpus_table_holds_the_same_rows(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    write_corpus(tmp_path / "c", 3, 32, seed=2)
    rows = pq.read_table(tmp_path / "c" / "00000.parquet").to_pylist()
    assert [row["caption"] for row in rows] == [render(2, index, 32).caption for index in range(3)]
    assert json.loads((tmp_path / "c" / "00000_stats.json").read_text())["successes"] == 3


def test_corpus_refuses_a_folder_that_is_not_empty_and_impossible_numbers(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        write_corpus(tmp_path, 2, 32, seed=1)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    for wrong in ({"count": 0}, {"shard_size": 0}, {"shard_size": 10_001}, {"workers": 0}, {"size": 4}):
        with pytest.raises(ValueError, match=r"\d"):
            write_corpus(tmp_path / "new", **{"count": 2, "size": 32, "seed": 1, **wrong})
    assert not (tmp_path / "new").exists()


def test_cache_holds_what_render_gives_and_is_reused(tmp_path: Path) -> None:
    cache = open_cache(tmp_path, seed=2, count=3, size=32)
    scene = render(2, 1, 32)
    np.testing.assert_array_equal(cache.images[1], scene.image)
    np.testing.assert_allclose(cache.depth[1], scene.depth, rtol=1e-3)
    np.testing.assert_array_equal(cache.semantic[1], scene.semantic)
    assert (cache.captions[1], cache.summaries[1], len(cache)) == (scene.caption, scene.summary, 3)
    before = sorted((p.name, p.stat().st_mtime_ns) for p in tmp_path.rglob("*"))
    open_cache(tmp_path, seed=2, count=3, size=32)
    assert sorted((p.name, p.stat().st_mtime_ns) for p in tmp_path.rglob("*")) == before
