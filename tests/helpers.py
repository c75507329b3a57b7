"""Small pictures and corpora that tests write down literally."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from fourmill.pipeline.corpus import Sample, open_corpus
from fourmill.pipeline.ingest import IngestConfig, IngestReport, ingest
from fourmill.pipeline.manifest import Manifest, read_manifest
from fourmill.pipeline.shards import Record, Shard, read_shard
from fourmill.pipeline.store import open_store


def all_records(manifest: Manifest) -> list[Record]:
    """Every record of a small snapshot, by modality and shard."""
    return [record for name in manifest.modalities for record in manifest.records(name)]


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    """A picture as a file's bytes."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def make_picture(height: int = 24, width: int = 32, seed: int = 0) -> Image.Image:
    """A smooth picture, (height, width), that survives JPEG; different for each seed."""
    ys, xs = np.mgrid[0:height, 0:width]
    red, green, blue = xs * 255 // max(width - 1, 1), ys * 255 // max(height - 1, 1), np.full_like(xs, seed * 37 % 256)
    return Image.fromarray(np.stack([red, green, blue], -1).astype(np.uint8))


def make_jpeg(height: int = 24, width: int = 32, seed: int = 0, orientation: int | None = None) -> bytes:
    """`make_picture` as JPEG, with an EXIF orientation if given."""
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    return encoded(make_picture(height, width, seed), "JPEG", quality=95, exif=exif)


def make_png(height: int = 24, width: int = 32, seed: int = 0) -> bytes:
    return encoded(make_picture(height, width, seed), "PNG")


def png_claiming(height: int, width: int) -> bytes:
    """A PNG of 1 x 1 pixels whose header claims another size, its checksum mended."""
    import struct
    import zlib

    data = make_png(1, 1)
    header = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """A tar with these members in this order; names may repeat."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_files(folder: Path, files: Mapping[str, bytes | str | dict[str, Any]]) -> Path:
    """Files below a folder: bytes, text, or an object as JSON."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


def write_parquet(path: Path, columns: dict[str, Any], **options: Any) -> None:
    """A parquet file of these columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)


class Dataset:
    """What ingest wrote, by key."""

    def __init__(self, uri: str | Path) -> None:
        self.store = open_store(uri)
        self.manifest = read_manifest(self.store)

    def shards(self, modality: str) -> list[Shard]:
        return [read_shard(self.store, record.name) for record in self.manifest.records(modality)]

    def values(self, modality: str) -> dict[str, Any]:
        return {k: v for s in self.shards(modality) for k, v in zip(s.keys, s.values(), strict=True)}

    def quarantine(self, modality: str = "rgb") -> dict[str, str]:
        return {k: v for shard in self.shards(modality) for k, v in shard.quarantine.items()}


def ingested(src: str | Path, dataset: str | Path, **config: Any) -> tuple[IngestReport, Dataset]:
    report = ingest(str(src), str(dataset), IngestConfig(workers=2, **config))
    return report, Dataset(dataset)


def samples(src: str | Path, format: str | None = None, **fields: str) -> list[Sample]:
    return list(open_corpus(str(src), format, **fields))


def as_rows(src: str | Path, **fields: Any) -> list[tuple[str, str | None, bytes]]:
    return [(s.key, s.text, s.image) for s in samples(src, **fields)]
