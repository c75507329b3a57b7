"""What a snapshot names beside its record tables: sample tables and the list of retries."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from fourmill.pipeline.manifest.snapshot import Manifest
from fourmill.pipeline.manifest.verify.problems import Problem


def check_sample_tables(manifest: Manifest, read: bool) -> Iterator[Problem]:
    """That they are there, of the right size and, if read, of the right bytes; one after another, 10 to 15 MB each."""
    names = [str(entry["name"]) for entry in manifest.sample_tables]
    sizes = manifest.store.sizes(names)
    for entry, name, size in zip(manifest.sample_tables, names, sizes, strict=True):
        if size is None:
            yield Problem("missing-table", name, "the sample table is gone")
        elif size != entry["num_bytes"]:
            yield Problem("wrong-table", name, f"has {size:,} bytes; the snapshot says {entry['num_bytes']:,}")
        elif read and hashlib.sha256(manifest.store.get(name)).hexdigest() != entry["digest"]:
            yield Problem("wrong-table", name, "its SHA-256 differs from the snapshot's: the sample table has changed")


def check_retries(manifest: Manifest) -> Iterator[Problem]:
    """That the list can be read, without which fingerprints cannot be followed."""
    try:
        _ = manifest.retries
    except FileNotFoundError:
        yield Problem("missing-table", manifest.retries_name or "", "the list of retries is gone")
    except (ValueError, AttributeError) as error:
        yield Problem("bad-table", manifest.retries_name or "", f"is no list of retries: {error}")
