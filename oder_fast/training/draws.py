"""Samples in the order of a run, each with random numbers that follow from the seed and its position alone."""

from __future__ import annotations

import copy
import hashlib
import multiprocessing
import random
import signal
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..data.files import first_bad
from ..data.samples import Batch, Sample, collate
from .processes import rank, world_size
from .scans import Scan

TRIES = 100
"""How many images are drawn until one is not 0 everywhere."""


def seed_of(*key: Any) -> int:
    """Return a seed that depends on all of the key, equal in every process and on every machine."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seed_generators(*key: Any) -> None:
    """Seed the generators of Python, NumPy and torch that a user's own code may draw from, as `seed_of` says."""
    seed = seed_of(*key)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (others draw from it)
    torch.manual_seed(seed)


class Draws(Dataset[tuple[Sample, int]]):
    """Samples by their position in the run: epoch after epoch, each in an order of its own."""

    def __init__(
        self, samples: Dataset[Sample], transform: Any, scan: Scan, key: tuple[Any, ...], with_kspace: bool
    ) -> None:
        self.samples, self.transform, self.scan, self.key = samples, transform, scan, key
        self.with_kspace = with_kspace
        self._order: tuple[int, list[int]] = (-1, [])

    def __getitem__(self, position: int) -> tuple[Sample, int]:
        epoch, place = divmod(position, len(self.samples))  # type: ignore[arg-type]
        if self._order[0] != epoch:
            g = torch.Generator().manual_seed(seed_of(*self.key, "order", epoch))
            self._order = epoch, torch.randperm(len(self.samples), generator=g).tolist()  # type: ignore[arg-type]
        g = torch.Generator().manual_seed(seed_of(*self.key, "sample", position))
        index = self._order[1][place]
        seed_generators(*self.key, "reading", position)
        for _ in range(TRIES):
            sample = checked(self.samples[index])
            if not self.with_kspace:
                sample = sample._replace(kspace=None, maps=None, measured=None)
            if sample.measured is None:
                # What was measured cannot be turned or cut with its image.
                sample = self.transform(sample, g)
            if bool(sample.image.any()):
                return self.scan.prepare(sample, g), seed_of(*self.key, "noise", position)
            # An empty slice or patch, as volumes have at their ends, has nothing to be measured: another one.
            index = int(torch.randint(len(self.samples), (), generator=g))  # type: ignore[arg-type]
        raise ValueError(f"{sample.name}: of {TRIES} images or patches drawn after it all are 0 everywhere")


def checked(sample: Any) -> Sample:
    """Return a sample if it is one.

    Raises:
        TypeError: For something else, or an image of another dtype.
        ValueError: For NaN or infinity.
    """
    if not isinstance(sample, Sample) or not isinstance(sample.image, Tensor):
        kind = type(sample.image if isinstance(sample, Sample) else sample).__name__
        raise TypeError(
            f"a dataset must return oder_fast.data.Sample(name, image) with a torch.Tensor as image, got {kind}"
        )
    image = sample.image
    if image.dtype not in (torch.float32, torch.complex64):
        raise TypeError(f"{sample.name}: its image must be float32 or complex64, got {image.dtype}")
    for what, values in (("image", image), ("measurements", sample.measured)):
        bad = None if values is None else first_bad(values)
        if bad is not None and values is not None:
            raise ValueError(f"{sample.name}: its {what} must be finite, got {values[bad].item()} at {bad}")
    return sample


def collate_seeded(items: Sequence[tuple[Sample, int]]) -> tuple[Batch, list[int]]:
    """Stack samples, and list their seeds."""
    samples, seeds = zip(*items, strict=True)
    return collate(samples), list(seeds)


def positions(start: int, batch: int) -> Iterator[list[int]]:
    """Yield the positions of this process's part of each step's batch."""
    step = start
    while True:
        first = (step * world_size() + rank()) * batch
        yield list(range(first, first + batch))
        step += 1


class Flag:
    """An event without a lock: a process that is killed while it looks at one of `multiprocessing` leaves that locked.

    The loader then waits for it without end, where it should say that a process is gone.
    """

    def __init__(self) -> None:
        self._value = multiprocessing.RawValue("b", 0)

    def set(self) -> None:
        """Set it, for all processes."""
        self._value.value = 1

    def is_set(self) -> bool:
        """Tell whether a process has set it."""
        return bool(self._value.value)


def loading_context() -> multiprocessing.context.BaseContext:
    """Return the context of `multiprocessing` for processes that load, and that may be killed."""
    context = copy.copy(multiprocessing.get_context())
    vars(context)["Event"] = Flag
    return context


def begin_worker(_: int) -> None:
    """Prepare a process that loads."""
    # Signals to the whole group (Ctrl-C, a batch system, torchrun) reach workers too: the run ends them itself, after
    # its last checkpoint.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _obey_the_next)
    torch.set_num_threads(1)


def _obey_the_next(number: int, _: Any) -> None:
    signal.signal(number, signal.SIG_DFL)
