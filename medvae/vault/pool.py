"""An ordered map over one process, several, or a Ray cluster. Memory holds a few results at a time, never all.

A worker that dies (a decoder that crashes on a malformed file, or the machine's memory guard) costs the item that
killed it and no other: the items in flight are tried again one by one, each in a process of its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from itertools import islice
from multiprocessing import forkserver, get_context
from typing import Any, Protocol, TypeVar

from medvae.errors import ConfigError, MissingPart

A = TypeVar("A")
B = TypeVar("B")
AHEAD = 4  # items in flight for each worker


class Map(Protocol):
    """Calls a function on every item and yields the results in order; None stands for a worker that died."""

    def __call__(self, work: Callable[[A], B], items: Iterable[A], /) -> Iterator[B | None]:  # noqa: D102
        ...


def one_by_one(work: Callable[[A], B], items: Iterable[A]) -> Iterator[B | None]:
    """Call `work` here, item by item."""
    yield from map(work, items)


def in_chunks(run: Map, work: Callable[[A], B], items: Iterable[A], size: int) -> Iterator[B | None]:
    """Map with up to `size` items a task, which costs less where they are small; None for the item that killed one."""
    waiting, flying = iter(items), deque[list[A]]()

    def chunks() -> Iterator[list[A]]:
        while chunk := list(islice(waiting, size)):
            flying.append(chunk)
            yield chunk

    for made in run(partial(_each, work), chunks()):
        chunk = flying.popleft()
        yield from run(work, chunk) if made is None else made


def _each(work: Callable[[A], B], items: list[A]) -> list[B]:
    return [work(item) for item in items]


@contextmanager
def parallel(workers: int, cluster: str | None = None) -> Iterator[Map]:
    """Give a map over that many processes, or over the Ray cluster at an address ("local" starts one here).

    Raises MissingPart where Ray is asked for and not installed.
    """
    if cluster is not None:
        with _ray(workers, cluster) as mapped:
            yield mapped
    elif workers == 1:
        yield one_by_one
    else:
        pool = _Pool(workers)
        try:
            yield pool.map
        finally:
            pool.close()


class _Pool:
    """Processes that are kept between maps, and made anew when one dies."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._pool: ProcessPoolExecutor | None = None
        _server()
        forkserver.ensure_running()  # imports while this process looks for files

    def _submit(self, work: Callable[[A], B], item: A) -> Future[B]:
        """Hand an item to the pool; to a new one where it has died meanwhile."""
        try:
            self._pool = self._pool or _processes(self._workers)
            return self._pool.submit(work, item)
        except BrokenProcessPool:
            self.close()
            self._pool = _processes(self._workers)
            return self._pool.submit(work, item)

    def map(self, work: Callable[[A], B], items: Iterable[A], /) -> Iterator[B | None]:
        flying: deque[tuple[A, Future[B]]] = deque()
        waiting = iter(items)
        while True:
            while len(flying) < AHEAD * self._workers:
                item = next(waiting, flying)
                if item is flying:
                    break
                flying.append((item, self._submit(work, item)))  # type: ignore[arg-type]
            if not flying:
                return
            item, future = flying.popleft()
            try:
                result = future.result()
            except (BrokenProcessPool, CancelledError):
                self.close()
                yield _alone(work, item)
                flying = deque((i, self._submit(work, i) if _lost(f) else f) for i, f in flying)
            else:
                yield result

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None


def _lost(future: Future[Any]) -> bool:
    """Whether a future of a pool that broke and was closed has no result."""
    return future.cancelled() or not future.done() or future.exception() is not None


def _alone(work: Callable[[A], B], item: A) -> B | None:
    """Try one item in a process of its own; None where it dies again.

    Raises ConfigError where no process lives, whatever it is given.
    """
    try:
        with _processes(1) as pool:
            return pool.submit(work, item).result()
    except BrokenProcessPool:
        pass
    try:
        with _processes(1) as pool:
            pool.submit(int).result()
    except BrokenProcessPool:
        raise ConfigError(
            'no further process can be started: put what a script calls under `if __name__ == "__main__":`, or set '
            "workers to 1"
        ) from None
    return None


def _processes(count: int) -> ProcessPoolExecutor:
    """Return processes forked from one that has imported what they need and started no thread.

    A fork of this process, beside the threads of torch, may hang; new ones would each import for seconds.
    """
    return ProcessPoolExecutor(count, mp_context=_server(), initializer=_calm)


def _server() -> Any:
    """Return the way to that process; what runs the command is imported there, too, and not by every fork again."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["__main__", "nibabel", "pydicom", "medvae.vault.ingest"])
    return context


def _calm() -> None:
    """One thread a worker, no word from libraries (they quote header values), and Ctrl-C left to the parent."""
    import logging
    import os
    import signal
    import sys
    import warnings

    os.environ["OMP_NUM_THREADS"] = "1"  # read by torch when it is imported
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def _ray(workers: int, address: str) -> Iterator[Map]:
    """Map by Ray tasks. All machines must see the source under the same path; pixels travel by Ray's own network."""
    try:
        import ray
    except ImportError:
        raise MissingPart("Ray is not installed: pip install 'medvae-dp[cluster]'") from None
    own = not ray.is_initialized()
    if own and address == "local":
        ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    elif own:
        ray.init(address=address, log_to_driver=False)
    task = ray.remote(max_retries=1)(_in_calm)

    def mapped(work: Callable[[A], B], items: Iterable[A], /) -> Iterator[B | None]:
        function = ray.put(work)
        flying: deque[Any] = deque()
        for item in items:
            flying.append(task.remote(function, item))
            if len(flying) >= AHEAD * workers:
                yield _fetched(ray, flying.popleft())
        while flying:
            yield _fetched(ray, flying.popleft())

    try:
        yield mapped
    finally:
        if own:
            ray.shutdown()


def _in_calm(work: Callable[[A], B], item: A) -> B:
    _calm()
    return work(item)


def _fetched(ray: Any, reference: Any) -> Any:
    try:
        return ray.get(reference)
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError):
        return None
