"""Checking objects in parallel: threads where waiting for the store takes the time, processes where decoding does.

Results come in the order of the tasks, so that two verifications of one dataset say the same in the same order, and no
more tasks are drawn than are under way.
"""

from __future__ import annotations

import itertools
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from typing import TypeVar

from fourmill.pipeline.manifest.verify.objects import Checked, Task, check_object
from fourmill.pipeline.store import Store

_CHUNK = 16  # tasks that go to a process at once
_IN_MEMORY = 512 << 20  # bytes of objects that one process reads at once from a store that is no local folder

T = TypeVar("T")
R = TypeVar("R")


def check_objects(store: Store, tasks: Iterable[Task], processes: int, threads: int) -> Iterator[Checked]:
    """Every task's outcome, in order. `threads`: in each process. One process means this one."""
    if processes == 1:
        for chunk in _chunks(tasks):
            yield from _check_chunk(store, threads, chunk)
        return
    # Not forked: the parent has threads, and an S3 client that must not be shared.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _prepare, (store, threads)) as pool:
        for found in in_order(pool, _check_in_worker, _chunks(tasks), 2 * processes):
            yield from found


def _chunks(tasks: Iterable[Task]) -> Iterator[list[Task]]:
    waiting = iter(tasks)
    while chunk := list(itertools.islice(waiting, _CHUNK)):
        yield chunk


def _check_chunk(store: Store, threads: int, tasks: Sequence[Task]) -> list[Checked]:
    """As many at once as there are threads, and memory by the largest object."""
    fitting = _IN_MEMORY // max(1, *(t.record.num_bytes for t in tasks))
    with ThreadPoolExecutor(max(1, min(threads, fitting)), thread_name_prefix="verify") as pool:
        return list(pool.map(lambda task: check_object(store, task), tasks))


def in_order(pool: Executor, work: Callable[[T], R], items: Iterable[T], window: int) -> Iterator[R]:
    """`pool.map` that draws at most `window` items ahead."""
    waiting: deque[Future[R]] = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) >= window:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


_worker: tuple[Store, int] | None = None  # of this process


def _prepare(store: Store, threads: int) -> None:
    global _worker  # noqa: PLW0603 - what a pool's process is started with has no other place
    _worker = store, threads


def _check_in_worker(tasks: Sequence[Task]) -> list[Checked]:
    assert _worker is not None
    return _check_chunk(*_worker, tasks)
