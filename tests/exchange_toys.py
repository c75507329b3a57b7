"""A small dataset that holds every kind of value, odd keys, nulls and reasons, for the tests of export and import."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from fourmill.modalities import modality
from fourmill.pipeline import codecs
from fourmill.pipeline.fingerprints import content_of
from fourmill.pipeline.manifest import Update, read_manifest, update_manifest
from fourmill.pipeline.shards import Record, Spec, commit, digest, producer_id, read_shard, write_shard
from fourmill.pipeline.store import Store, open_store

SIZE, CROPS = 32, 2
KEYS = (
    ("cat", "a/b.c", "sötnos", "100%"),
    ("k" * 70, "dark", "e", "f"),
    ("g", "h", "i", "j"),
)
SPECS: dict[str, Spec] = {
    "rgb": Spec(),
    "alt_text": Spec(),
    "source": Spec(),
    "crop_settings": Spec(CROPS),
    "caption": Spec(),
    "depth": Spec(CROPS, convention="relative"),
    "normal": Spec(CROPS, convention="opencv"),
    "semseg": Spec(CROPS, classes=("sky", "sea", "sand")),
    "canny_edge": Spec(CROPS),
    "det": Spec(CROPS, classes=("box", "ball")),
    "color_palette": Spec(CROPS),
    "metadata": Spec(),
    "clip": Spec(CROPS),
    "tok_rgb": Spec(CROPS, vocabulary=16_384, length=4, grid=(2, 2)),
    "tok_depth": Spec(CROPS, vocabulary=8_192, length=4, grid=(2, 2)),
    "tok_clip_global": Spec(CROPS, vocabulary=70_000, length=3, grid=(1, 3)),
    "tok_caption": Spec(vocabulary=30_000),
}
LICENCES = {"depth": "cc-by-nc-4.0", "caption": "mit"}
MISSING: dict[str, dict[str, str | None]] = {
    "alt_text": {"sötnos": None},
    "depth": {"dark": "constant output: 0"},
    "tok_depth": {"dark": None},
}


def jpeg(index: int, width: int = 48, height: int = 40, **options: Any) -> bytes:
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([(x * 5 + index * 20) % 256, y * 6 % 256, np.full_like(x, index * 19 % 256)], -1)
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "JPEG", quality=90, **options)
    return file.getvalue()


def turned_jpeg(index: int) -> bytes:
    """A picture that lies on its side, with the EXIF mark that says so."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return jpeg(index, exif=exif)


def value(name: str, index: int, crop: int) -> Any:
    """Sample `index`'s value: made of small numbers, and right by its modality's convention."""
    rng = np.random.default_rng([index, crop, len(name)])
    base = modality(name)
    if base.is_tokens:
        return rng.integers(0, SPECS[name].vocabulary or 0, SPECS[name].length or 5 + index)
    boxes = [[0.125, 0.25, 0.5, 0.75], [0.0, 0.0, 1.0, 0.333333]]
    normal = rng.normal(size=(3, SIZE, SIZE)).astype(np.float32)
    normal[2] = -np.abs(normal[2]) - 0.1
    # sample 1 is upright 40 x 48, the others are 48 x 40
    crops = [[4, 0, 40, 40, 0], [2, 3, 33, 30, 1]] if index == 1 else [[0, 4, 40, 40, 0], [3, 2, 30, 33, 1]]
    made = {
        "rgb": turned_jpeg(index) if index == 1 else jpeg(index),
        "alt_text": f"a <b> of {index}, ümlaut",
        "caption": f"caption {index}",
        "source": {"origin": f"00000.tar:{index}", "width": 48, "height": 40, "metadata": {"n": index}},
        "crop_settings": crops[crop],
        "depth": rng.uniform(0.5, 9, (SIZE, SIZE)).astype(np.float32),
        "normal": normal / np.linalg.norm(normal, axis=0),
        "semseg": rng.choice([0, 1, 2, 255], (SIZE, SIZE)).astype(np.uint8),
        "canny_edge": rng.choice([0, 0, 0, 255], (SIZE, SIZE)).astype(np.uint8),
        "det": [
            {"box": b, "class_name": c, "score": s} for b, c, s in zip(boxes, ("box", "ball"), (0.9, 0.7), strict=True)
        ],
        "color_palette": {str(n): [[n, c, index] for c in range(n)] for n in range(1, 4 if index == 2 else 8)},
        "metadata": {"original_width": 48, "n_humans": index, "brightness": 12.5},
        "clip": rng.normal(size=(6, 2, 2)).astype(np.float32),
    }
    if base.name == "det" and index == 3:
        return []
    return made[base.name]


def producer(name: str, version: int = 1) -> dict[str, Any]:
    """A lineage; crop_settings' says how large crops are, as the real one does."""
    config: dict[str, Any] = {"crops": {"size": SIZE}} if name == "crop_settings" else {}
    made: dict[str, Any] = {"class": f"Toy_{name}", "version": version, "licence": "Apache-2.0", "config": config}
    if name in LICENCES:
        made["checkpoint"] = {"reference": f"owner/{name}", "digest": digest(name), "licence": LICENCES[name]}
    return made


def write(store: Store, name: str, shard: int, keys: Sequence[str], version: int = 1) -> Record:
    """One shard object of a modality, with the nulls of MISSING."""
    entry, spec, lost = modality(name), SPECS[name], MISSING.get(name, {})
    first = 4 * shard
    columns = [
        [None if k in lost else codecs.encode(entry, value(name, first + i, crop)) for i, k in enumerate(keys)]
        for crop in range(spec.crops)
    ]
    reasons = {k: why for k in keys if (why := lost.get(k))}
    fingerprint = digest(name, str(shard), *keys, str(version))[:16]
    data = write_shard(name, shard, fingerprint, keys, columns, spec, content_of(producer(name, version)), reasons)
    return commit(store, data)


def make(uri: str, names: Sequence[str] = tuple(SPECS), keys: Sequence[Sequence[str]] = KEYS) -> str:
    """A dataset of those modalities; its last shard lacks `clip`."""
    store = open_store(uri)
    records = [
        write(store, name, shard, row_keys)
        for name in names
        for shard, row_keys in enumerate(keys)
        if not (name == "clip" and shard == len(keys) - 1)
    ]
    producers = {producer_id(content_of(producer(n))): producer(n) for n in names}
    corpus = {"sources": ["/somewhere/corpus"], "samples": sum(map(len, keys)), "digest": "toy"}
    update_manifest(store, lambda old: Update(records, producers, corpus))
    return uri


def values_of(uri: str, names: Sequence[str] | None = None) -> dict[str, dict[str, list[Any]]]:
    """Every decoded value of a dataset: by modality and key, one per crop."""
    store = open_store(uri)
    manifest = read_manifest(store)
    found: dict[str, dict[str, list[Any]]] = {}
    for name in names or manifest.modalities:
        for record in manifest.records(name):
            shard = read_shard(store, record.name)
            columns = [shard.values(crop) for crop in range(shard.spec.crops)]
            for row, key in enumerate(shard.keys):
                found.setdefault(name, {})[key] = [column[row] for column in columns]
    return found


def reasons_of(uri: str, name: str) -> dict[str, str]:
    store = open_store(uri)
    return {
        key: why
        for record in read_manifest(store).records(name)
        for key, why in read_shard(store, record.name).quarantine.items()
    }


def assert_equal(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Modality by modality, key by key (in order), crop by crop, to the bit."""
    assert sorted(found) == sorted(expected)
    for name, samples in expected.items():
        assert list(found[name]) == list(samples), name
        for key, crops in samples.items():
            for mine, theirs in zip(found[name][key], crops, strict=True):
                assert same(mine, theirs), (name, key, mine, theirs)


def same(mine: Any, theirs: Any) -> bool:
    if isinstance(theirs, np.ndarray) and isinstance(mine, np.ndarray):
        return mine.dtype == theirs.dtype and np.array_equal(mine, theirs)
    return bool(json.dumps(mine, default=repr) == json.dumps(theirs, default=repr))


def read_keys(src: str) -> dict[int, list[str]]:
    """Keys by output shard of a WebDataset export, by its own part files and names, without our reader."""
    import tarfile
    import urllib.parse
    from pathlib import Path

    found: dict[int, list[str]] = {}
    for part in sorted(Path(src).glob(".fourmill/part-*.json")):
        tree = json.loads(part.read_text())
        with tarfile.open(Path(src) / tree["files"][0]["name"]) as tar:
            stems = dict.fromkeys(name.split(".", 1)[0] for name in tar.getnames())
        odd = tree["odd"]
        found[tree["number"]] = [odd.get(s, {}).get("key", urllib.parse.unquote(s)) for s in stems]
    return found
