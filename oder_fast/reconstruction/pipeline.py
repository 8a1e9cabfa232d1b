"""Files read in some threads, solved for in one, and written in another."""

from __future__ import annotations

import errno
import sys
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from ..training.logs import live_line
from ..training.trainer import RunError
from .jobs import Item, Job, Solved, escaped, reason_of
from .ledger import Ledger

NO_MORE_FILES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
"""Errors after which no other file can be written either."""


class Task(ABC):
    """What is done with files."""

    @abstractmethod
    def read(self, job: Job, chunk: slice | None) -> list[Item]:
        """Return the images of a file, all or some."""

    @abstractmethod
    def solve(self, items: Sequence[Item]) -> list[Solved]:
        """Reconstruct images of equal shape."""

    @abstractmethod
    def write(self, job: Job, output: Path) -> list[str]:
        """Write what became of a file; return the names, below the folder."""


class Pipeline:
    """Files being read in some threads, solved for in this one, and written in another."""

    def __init__(
        self, task: Task, ledger: Ledger, output: Path, batch: int, workers: int, progress: bool
    ) -> None:
        self.task, self.ledger, self.output = task, ledger, output
        self.batch, self.workers, self.progress = batch, workers, progress
        self.waiting: list[Item] = []
        self.writes: deque[tuple[Job, Future[None]]] = deque()
        self.reader = ThreadPoolExecutor(workers, "read")
        self.writer = ThreadPoolExecutor(1, "write")

    def run(self, jobs: list[Job]) -> None:
        """Do all jobs; what fails is noted in them.

        Raises:
            RunError: Where nothing more can be written.
        """
        total = sum(job.count for job in jobs)
        with live_line("reconstruct", "image", total, self.progress and total > 0) as self.bar:
            try:
                for items in self._read_ahead(jobs):
                    for item in items:
                        if self.waiting and item.key != self.waiting[0].key:
                            self._flush()
                        self.waiting.append(item)
                        if len(self.waiting) == self.batch:
                            self._flush()
                self._flush()
                while self.writes:
                    self._finish_write()
            finally:
                # What is complete is written; what is being read is not needed any more.
                self.reader.shutdown(cancel_futures=True)
                self.writer.shutdown()

    def _read_ahead(self, jobs: list[Job]) -> Iterator[list[Item]]:
        chunks = iter([(job, chunk) for job in jobs for chunk in job.chunks(self.batch)])
        ahead: deque[tuple[Job, Future[list[Item]]]] = deque()
        while True:
            while len(ahead) <= self.workers and (following := next(chunks, None)) is not None:
                job, chunk = following
                if job.failed is None:
                    ahead.append((job, self.reader.submit(self.task.read, job, chunk)))
            if not ahead:
                return
            job, future = ahead.popleft()
            items: list[Item] = []
            with self._failing(job):
                items = future.result()
            if job.failed is None:
                yield items

    @contextmanager
    def _failing(self, job: Job) -> Iterator[None]:
        """Note what goes wrong with one file."""
        try:
            yield
        except RunError:
            raise
        except Exception as error:
            self._fail(job, error)

    def _fail(self, job: Job, error: Exception) -> None:
        if job.failed is None:
            job.failed = reason_of(error, job.path)
            self.bar.update(job.count - len(job.images))
            if self.progress:
                tqdm.write(f"oder-fast: {escaped(job.name)}: {job.failed}", file=sys.stderr)
        job.images.clear()

    def _flush(self) -> None:
        items, self.waiting = [item for item in self.waiting if item.job.failed is None], []
        if not items:
            return
        try:
            results = self.task.solve(items)
        except Exception as error:
            if len(items) == 1:
                self._fail(items[0].job, error)
                return
            # One image that cannot be solved for takes no others with it.
            for item in items:
                self.waiting = [item]
                self._flush()
            return
        for item, (image, converged, quality, calls) in zip(items, results, strict=True):
            job = item.job
            job.images[item.number] = image
            job.converged &= converged
            if quality is not None:
                job.quality.append(quality)
            self.bar.set_postfix({"denoiser calls": calls}, refresh=False)
            self.bar.update()
            if len(job.images) == job.count:
                self.writes.append((job, self.writer.submit(self._write, job)))
        while len(self.writes) > self.workers:
            self._finish_write()

    def _write(self, job: Job) -> None:
        self.ledger.add(job, self.task.write(job, self.output))
        job.images.clear()

    def _finish_write(self) -> None:
        job, future = self.writes.popleft()
        with self._failing(job):
            try:
                future.result()
            except OSError as error:
                if error.errno in NO_MORE_FILES:
                    raise RunError(
                        f"{self.output}: cannot write any more: {error.strerror}; the same command goes on from here"
                    ) from error
                raise
