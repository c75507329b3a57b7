"""Captions tables as rows of plain values: CSV, JSON lines or parquet, read one stretch at a time.

Invariant: row n is the n-th of the table whatever else is broken; a line that cannot be read goes into `damage`.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fourmill.pipeline.corpus import open_binary, suffix_of
from fourmill.pipeline.corpus.values import MAX_TEXT_BYTES
from fourmill.pipeline.store import ObjectInfo, Store

TABLE_SUFFIXES = ("csv", "jsonl", "parquet")
Row = dict[str, Any]


class NotParquetError(ValueError):
    """An object that is no whole parquet file; others beside it may be fine."""


def read_columns(store: Store, table: ObjectInfo) -> list[str]:
    """The table's columns; of JSON lines, the names in the first line. ValueError if it cannot be read at all."""
    damage: list[str] = []
    if suffix_of(table.name) == "parquet":
        with open_parquet(store, table) as file:
            return list(file.schema_arrow.names)
    if suffix_of(table.name) == "csv":
        with _text(store, table) as lines:
            return next(csv.reader(lines), [])
    return list(next(read_rows(store, table, damage), (0, {}))[1])


def read_rows(store: Store, table: ObjectInfo, damage: list[str]) -> Iterator[tuple[int, Row]]:
    """(number from 0, row) of every row that can be read."""
    suffix = suffix_of(table.name)
    if suffix == "parquet":
        yield from _parquet_rows(store, table, damage)
        return
    with _text(store, table) as lines:
        yield from (_csv_rows if suffix == "csv" else _json_rows)(lines, table.name, damage)


@contextlib.contextmanager
def _text(store: Store, table: ObjectInfo) -> Iterator[io.TextIOWrapper]:
    with open_binary(store, table) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as lines:
        try:
            yield lines
        except UnicodeDecodeError as error:
            raise ValueError(f"{table.name} in {store.uri} is not UTF-8: {error}") from error


def _csv_rows(lines: io.TextIOWrapper, name: str, damage: list[str]) -> Iterator[tuple[int, Row]]:
    rows = csv.DictReader(lines, restkey="further")
    for number in itertools.count():
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:  # such as a field beyond csv's limit of 2^17 characters: an open quote
            damage.append(f"{name}: line {rows.line_num}: {error}")
            continue
        yield number, dict(row)


def _json_rows(lines: io.TextIOWrapper, name: str, damage: list[str]) -> Iterator[tuple[int, Row]]:
    number = 0
    for place in itertools.count(1):
        line = lines.readline(8 * MAX_TEXT_BYTES)
        if not line:
            return
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"a {type(row).__name__}, not an object")
            yield number, row
        except (ValueError, RecursionError) as error:
            damage.append(f"{name}: line {place}: {error}")
        number += 1


@contextlib.contextmanager
def open_parquet(store: Store, info: ObjectInfo) -> Iterator[pq.ParquetFile]:
    """A parquet object, open for reading by row groups. NotParquetError if it is none."""
    with open_binary(store, info) as file:
        try:
            parquet = pq.ParquetFile(pa.PythonFile(file, mode="r"))
        except (pa.ArrowException, OSError) as error:
            raise NotParquetError(f"{info.name} in {store.uri} is not a whole parquet file: {error}") from error
        yield parquet


def parquet_batches(
    parquet: pq.ParquetFile, name: str, damage: list[str], columns: list[str] | None = None, rows: int = 64
) -> Iterator[tuple[int, list[Row]]]:
    """(number of the first, rows), `rows` at a time. A row group that is broken goes into `damage`, the next is read.

    64 rows of pictures of 200 KB are 13 MB beside the row group's compressed pages.
    """
    start = 0
    for group in range(parquet.num_row_groups):
        at, stop = start, start + parquet.metadata.row_group(group).num_rows
        try:
            for batch in parquet.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False):
                yield at, batch.to_pylist()
                at += batch.num_rows
        except (pa.ArrowException, OSError, ValueError) as error:
            damage.append(f"{name}: rows {at} to {stop - 1} cannot be read: {error}")
        start = stop


def _parquet_rows(store: Store, table: ObjectInfo, damage: list[str]) -> Iterator[tuple[int, Row]]:
    with open_parquet(store, table) as parquet:
        for start, rows in parquet_batches(parquet, table.name, damage, rows=1024):
            yield from enumerate(rows, start)
