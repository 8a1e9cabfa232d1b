"""Fully sampled k-space to train on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, SupportsIndex

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .cache import Store
from .coils import centered_fft, espirit_maps, one_thread, remove_oversampling
from .datasets import Files, group_of
from .files import PathLike, first_bad, is_hdf5, naming, npz_name, open_npz, stamp
from .hdf5 import dataset, open_hdf5
from .kspace import (
    NAMED,
    SUFFIXES,
    KSpaceHeader,
    read_kspace,
    read_kspace_header,
    readout_oversampling,
    slices_with_signal,
)
from .matlab import is_matlab_file, open_matlab
from .samples import Sample, Samples

# Of espirit_maps, what is not about one scan.
CALIBRATION = tuple(inspect.signature(espirit_maps).parameters)[2:]


@contextmanager
def _stored_maps(path: Path) -> Iterator[Any]:
    """Give the maps of a file, of which the slices that are used are read (of NPZ all)."""
    if is_hdf5(path) and not is_matlab_file(path):
        with open_hdf5(path) as file:
            stored = dataset(file, "maps")
            if stored is None:
                raise ValueError(
                    "it holds no coil maps under the name 'maps'; estimate them with maps='espirit'"
                )
            yield stored
        return
    if path.suffix.lower() == ".npy":
        raise ValueError(
            "an NPY file holds k-space alone, without coil maps; estimate them with maps='espirit'"
        )
    with (open_matlab if is_matlab_file(path) else open_npz)(path) as (names, read):
        yield read(npz_name(names, "maps"))


def _read_maps(path: Path, number: int) -> NDArray[Any]:
    """Return the maps (C, H, W) of a slice; those of a file may be the same for all slices."""
    with _stored_maps(path) as stored:
        per_slice = len(stored.shape) == 4
        values = np.asarray(stored[number : number + 1] if per_slice else stored[:])
    return values[0] if per_slice else values


def _check_sampling(sampled: Tensor) -> None:
    """Raise where lines or samples (H, W) are missing between others."""
    rows, columns = sampled.any(1).nonzero()[:, 0], sampled.any(0).nonzero()[:, 0]
    if not len(columns):
        raise ValueError("its k-space is zero everywhere")
    box = sampled[int(rows[0]) : int(rows[-1]) + 1, int(columns[0]) : int(columns[-1]) + 1]
    missing = int((~box).sum())
    if missing:
        raise ValueError(
            f"its k-space is undersampled, {missing} of {box.numel()} samples are missing; training needs all of them"
        )


class KSpaceFolder(Samples):
    r"""Fully sampled k-space of a folder: each slice is a sample, with coil maps and the image they make of it.

    .. math:: x = \sum_c \bar S_c \, F^{-1} y_c

    The reference `x` is scaled, and the k-space `y` with it, so that its largest magnitude is 1. Noise is what the
    scan has. Zero frequencies are at ``(H // 2, W // 2)``, as `CartesianMRI` expects by default. Lines that are missing
    at the ends of the phase encoding (asymmetric or zero-filled) are zeros, as in the files.

    Files are those that `read_kspace` reads: fastMRI and ISMRMRD (HDF5), NPY, NPZ and MATLAB. Of a folder, hidden files
    and those with other suffixes are left out, and of a file slices that are zero everywhere. Headers are read to begin
    with, of ISMRMRD those of all lines, and the middle of each slice.

    Args:
        source: A folder, a file, or a list of files.
        maps: ``"espirit"`` to estimate coil maps with `espirit_maps`, which takes seconds a slice: give a `cache`, or
            keep the samples (`Cached`); ``"file"`` to read them from the same file, where they are called ``maps``,
            shape ``(slices, C, H, W)`` or ``(C, H, W)``. Of a single coil the estimated map is 1.
        calibration: Arguments of `espirit_maps`: ``calibration_size``, ``kernel_size``, ``threshold``, ``crop``.
        cache: Folder for estimated maps, made where it is not there; later runs and other processes use them, too.
        remove_oversampling: Cut the readout to the field of view that the header asks for, a whole number of pixels.
        array: Which array of NPZ and MATLAB files; needed where none is called ``kspace`` and they hold several.
        select: Counters of ISMRMRD files; see `read_kspace`.
        group: From the path of a file to the name of the patient it shows. None for the patient that its header names,
            and else the file itself.

    Attributes:
        coils: How many coils each sample has.
        left_out: Numbers of files and slices left out, by reason.

    Raises:
        OSError: Where the folder or a file is missing or unreadable.
        TypeError: For an argument of `espirit_maps` that is not there, or where `group` returns something else than a
            text.
        ValueError: For a file that holds no k-space, or no coil maps where they are to be read, a folder without such
            files, or `maps` that are none of those above; on reading, for a damaged file, NaN or Inf, or k-space that
            is undersampled. The message names the file.

    Example:
        >>> import tempfile
        >>> from oder_fast.data import birdcage_maps, shepp_logan
        >>> maps, image = birdcage_maps(4, (32, 32)), shepp_logan(32)
        >>> kspace = torch.fft.fftshift(torch.fft.fft2(torch.fft.ifftshift(maps * image, dim=(1, 2))), dim=(1, 2))
        >>> path = Path(tempfile.mkdtemp()) / "scan.npz"
        >>> np.savez(path, kspace=kspace[None], maps=maps)
        >>> sample = KSpaceFolder(path, maps="file")[0]
        >>> sample.kspace.shape, bool((sample.image - image).abs().max() < 1e-5)
        (torch.Size([4, 32, 32]), True)
    """

    def __init__(
        self,
        source: PathLike | Iterable[PathLike],
        *,
        maps: Literal["espirit", "file"] = "espirit",
        calibration: Mapping[str, float] | None = None,
        cache: PathLike | None = None,
        remove_oversampling: bool = True,
        array: str | None = None,
        select: Mapping[str, int] | None = None,
        group: Callable[[Path], str] | None = None,
    ) -> None:
        if maps not in ("espirit", "file"):
            raise ValueError(f"KSpaceFolder: maps must be 'espirit' or 'file', got {maps!r}")
        self.maps, self.calibration = maps, dict(calibration or {})
        for name in self.calibration:
            if name not in CALIBRATION:
                raise TypeError(f"KSpaceFolder: calibration may hold {', '.join(CALIBRATION)}, got {name!r}")
        self.remove_oversampling, self.array, self.select = remove_oversampling, array, dict(select or {})
        self._store = None if cache is None else Store(cache)
        files = Files(source, lambda path: path.name.lower().endswith(SUFFIXES))
        self.left_out = {"another kind of file": files.left_out} if files.left_out else {}
        self.names, self.groups, self.shapes = [], [], []
        self.coils: list[int] = []
        self._files: list[tuple[Path, KSpaceHeader]] = []
        self._where: list[tuple[int, int]] = []
        for path in files.paths:
            with naming(path):
                header = read_kspace_header(path, array=array, select=self.select)
                shape = self._image_shape(header)
                if maps == "file":
                    with _stored_maps(path) as stored:
                        _check_maps(stored.shape, header.shape, shape)
                numbers = slices_with_signal(path, array, self.select)
                if not numbers:
                    raise ValueError("its k-space is zero everywhere")
            if len(numbers) < header.shape[0]:
                reason = "slice without signal"
                self.left_out[reason] = self.left_out.get(reason, 0) + header.shape[0] - len(numbers)
            patient = header.metadata.get("patient_id") or files.name(path)
            member = group_of(path, files, patient, group, "KSpaceFolder")
            self._where += [(len(self._files), number) for number in numbers]
            self.names += [f"{files.name(path)}[{number}]" for number in numbers]
            self.groups += [member] * len(numbers)
            self.shapes += [shape] * len(numbers)
            self.coils += [header.shape[1]] * len(numbers)
            self._files.append((path, header))
        if not self.groups:
            where = files.root if files.from_folder else "KSpaceFolder: source"
            raise ValueError(f"{where}: no k-space (HDF5, NPY, NPZ, MATLAB) in it")

    def _image_shape(self, header: KSpaceHeader) -> tuple[int, int]:
        _, _, height, width = header.shape
        return round(height / self._factor(header)), width

    def _factor(self, header: KSpaceHeader) -> float:
        """Return by which factor the readout is cut."""
        return readout_oversampling(header.metadata) if self.remove_oversampling else 1.0

    def __getitem__(self, index: SupportsIndex) -> Sample:
        file, number = self._where[self._check(index)]
        path, header = self._files[file]
        # Sums may be ordered otherwise on several threads.
        with naming(path), one_thread():
            kspace = self._kspace(path, header, number)
            maps = self._maps(path, number, kspace)
            image = kspace
            for axis in (-2, -1):
                image = centered_fft(image, axis, inverse=True)
            image = (maps.conj() * image).sum(0)
            largest = image.abs().amax()
            if largest == 0:
                raise ValueError(f"the image of slice {number} is zero everywhere")
            return Sample(self.names[self._check(index)], image / largest, kspace / largest, maps)

    def _kspace(self, path: Path, header: KSpaceHeader, number: int) -> Tensor:
        array = self.array if header.format in NAMED else None
        values, mask, _ = read_kspace(path, number, array=array, select=self.select)
        lines = (values[0] != 0).flatten(0, 1).any(0).expand(values.shape[-2:])
        _check_sampling(lines if mask is None else lines & mask[0])
        factor = self._factor(header)
        return values[0] if factor == 1 else remove_oversampling(values[0], -2, factor)

    def _maps(self, path: Path, number: int, kspace: Tensor) -> Tensor:
        if self.maps == "file":
            maps = torch.from_numpy(_read_maps(path, number).astype(np.complex64))
            bad = first_bad(maps)
            if bad is not None:
                raise ValueError(f"value {bad} of the coil maps of slice {number} is {maps[bad].item()}")
            kept = kspace.shape[-2]
            return maps.narrow(-2, maps.shape[-2] // 2 - kept // 2, kept)
        if len(kspace) == 1:
            return torch.ones_like(kspace)
        if self._store is None:
            return self._estimate(kspace)
        key = self._hash("maps", *self._settings(path, number))
        stored = self._store.read(key)
        if stored is not None and "maps" in stored:
            return stored["maps"]
        maps = self._estimate(kspace)
        self._store.write(key, {"maps": maps})
        return maps

    def _estimate(self, kspace: Tensor) -> Tensor:
        return espirit_maps(kspace, **self.calibration)  # type: ignore[arg-type]

    def _settings(self, path: Path, number: int) -> tuple[object, ...]:
        options = (sorted(self.calibration.items()), self.remove_oversampling, self.array)
        return (stamp(path), number, self.maps, *options, sorted(self.select.items()))

    def fingerprint(self, index: SupportsIndex) -> str:
        """Return what the file is, when it was last changed, and what is made of it."""
        file, number = self._where[self._check(index)]
        return self._hash(*self._settings(self._files[file][0], number))


def _check_maps(found: tuple[int, ...], stored: tuple[int, int, int, int], shape: tuple[int, int]) -> None:
    """Check that maps of a file belong to its k-space, of the shape that is stored or after the readout was cut."""
    slices, coils, height, width = stored
    for rows in (height, shape[0]):
        if found in ((slices, coils, rows, width), (coils, rows, width)):
            return
    raise ValueError(f"its coil maps have the shape {found}, but its k-space {stored}")
