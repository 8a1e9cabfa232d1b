"""Keep what is slow to read or to compute: in memory, or in files that any number of processes share."""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path
from typing import SupportsIndex

import numpy as np
import torch
from torch import Tensor

from .._extras import needs
from .files import PathLike, atomic
from .samples import Sample, Samples

SUFFIX = ".cache"
"""Of the files, which no dataset takes for its own."""


class Store:
    """Named arrays in a folder, each set in a file with the name of its key.

    Files are written whole or not at all, with checksums: one that is damaged counts as missing.

    Args:
        folder: Made where it is not there.
    """

    def __init__(self, folder: PathLike) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._full = False

    def read(self, key: str) -> dict[str, Tensor] | None:
        """Return what is stored under a key, or None."""
        try:
            with (
                (self.folder / (key + SUFFIX)).open("rb") as file,
                np.load(file, allow_pickle=False) as archive,
            ):
                return {name: torch.from_numpy(archive[name]) for name in archive.files}
        except (OSError, EOFError, ValueError, TypeError, KeyError, zipfile.BadZipFile):
            return None

    def write(self, key: str, arrays: dict[str, Tensor]) -> None:
        """Store arrays under a key; where that fails, say so once and go on without."""
        try:
            with atomic(self.folder / (key + SUFFIX)) as temporary, temporary.open("wb") as file:
                np.savez(file, **{name: value.numpy() for name, value in arrays.items()})  # type: ignore[arg-type]
        except OSError as error:
            if not self._full:
                warnings.warn(
                    f"{self.folder}: cannot store samples, they are made anew: {error}", stacklevel=2
                )
            self._full = True


class Cached(Samples):
    """Keep the samples of a dataset, so that they are read or computed once.

    Samples are kept in memory until that is full, each worker process for itself; and, where a folder is given, all
    of them in files, which later runs and other processes use, too. A sample is read anew when its file, the settings
    of the dataset or the version of oder_fast have changed; the folder can be deleted at any time.

    That pays for k-space, compressed volumes, PNG and phantoms. TIFF and NPY files are as fast as the files of a cache.

    Args:
        dataset: The dataset.
        folder: For the files, made where it is not there; None for none.
        memory: Bytes of memory to fill in each process.

    Raises:
        OSError: Where the folder cannot be made.
        ValueError: For a negative `memory`.

    Example:
        >>> from oder_fast.data import Phantoms
        >>> dataset = Cached(Phantoms("brain", 10, 64))
        >>> dataset[3].image is dataset[3].image, bool((dataset[3].image == dataset[3].image).all())
        (False, True)
    """

    def __init__(self, dataset: Samples, folder: PathLike | None = None, *, memory: int = 2**30) -> None:
        if memory < 0:
            raise ValueError(f"Cached: memory must be at least 0 bytes, got {memory}")
        self.dataset, self.memory = dataset, memory
        self.names, self.groups, self.shapes = dataset.names, dataset.groups, dataset.shapes
        self._store = None if folder is None else Store(folder)
        self._kept: dict[int, tuple[str, Sample]] = {}
        self._free = memory

    def __getstate__(self) -> dict[str, object]:
        # Processes that are not forked begin without copies of what is kept.
        return {**self.__dict__, "_kept": {}, "_free": self.memory}

    def __getitem__(self, index: SupportsIndex) -> Sample:
        number = self._check(index)
        key = self.dataset.fingerprint(number)
        kept_key, sample = self._kept.get(number, (None, None))
        if sample is None or kept_key != key:
            sample = self._stored(number, key)
            self._keep(number, key, sample)
        # Others may write into what they get.
        return Sample(sample.name, *(None if value is None else value.clone() for value in sample[1:]))  # type: ignore[arg-type]

    def _stored(self, number: int, key: str) -> Sample:
        if self._store is None:
            return self.dataset[number]
        arrays = self._store.read(key)
        if arrays is not None and "image" in arrays:
            rest = (arrays.get(name) for name in ("kspace", "maps", "measured"))
            return Sample(self.names[number], arrays["image"], *rest)
        sample = self.dataset[number]
        self._store.write(key, {k: v for k, v in sample._asdict().items() if isinstance(v, Tensor)})
        return sample

    def _keep(self, number: int, key: str, sample: Sample) -> None:
        if number in self._kept:
            self._free += _size(self._kept.pop(number)[1])
        if _size(sample) <= self._free:
            self._kept[number] = (key, sample)
            self._free -= _size(sample)

    def fingerprint(self, index: SupportsIndex) -> str:
        """Return that of the sample in the dataset."""
        return self.dataset.fingerprint(index)

    def fill(self, *, progress: bool = True) -> None:
        """Read all samples in order, as is fastest for volumes in one file.

        To fill a folder by several processes, walk through the dataset with a `torch.utils.data.DataLoader` that has
        workers, and ``memory=0``.

        Args:
            progress: Show a bar.
        """
        needs("Cached.fill", "tqdm")
        from tqdm import tqdm

        for number in tqdm(
            range(len(self)), desc="reading", unit="sample", disable=not progress, dynamic_ncols=True
        ):
            key = self.dataset.fingerprint(number)
            if self._kept.get(number, (None,))[0] != key:
                self._keep(number, key, self._stored(number, key))


def _size(sample: Sample) -> int:
    return sum(value.nbytes for value in sample if isinstance(value, Tensor))
