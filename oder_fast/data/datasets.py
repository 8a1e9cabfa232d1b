"""Datasets to train on: folders of images, and phantoms made on the fly."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, SupportsIndex

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .coils import one_thread
from .colours import grey
from .dicom import NoImageError, looks_like_dicom
from .files import PathLike, Stamp, first_bad, naming, read_npz, stamp
from .images import DICOM_SUFFIXES, ImageHeader, pick, read_header, read_values
from .nifti import NIFTI_SUFFIXES, is_nifti, nifti_layout, nifti_slice, nifti_values
from .phantoms import brain_like, cell_like, random_ellipses, random_shepp_logan, shepp_logan
from .samples import Sample, Samples, seeded_generator

IMAGE_SUFFIXES = (*DICOM_SUFFIXES, ".tif", ".tiff", ".png", ".npy", ".npz", *NIFTI_SUFFIXES)

Scale = Literal["none", "slice"] | tuple[float, float]


def _walk(folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yield the files below a folder in the order of their names; links that lead back are not followed."""
    real = os.path.realpath(folder)
    if real in above:
        return
    # Hidden files are copies that some systems make beside the real ones.
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(Path(entry.path), (*above, real))
        elif entry.is_file():
            yield Path(entry.path)


class Files:
    """Files of a dataset.

    Args:
        source: A folder, or the files themselves.
        known: Which files of a folder are wanted; of those listed, all are.

    Attributes:
        root: Folder below which all lie.
        from_folder: Whether they were found rather than named.
        left_out: How many files of a folder were not wanted.
    """

    def __init__(self, source: PathLike | Iterable[PathLike], known: Callable[[Path], bool]) -> None:
        self.left_out = 0
        self.from_folder = isinstance(source, (str, os.PathLike)) and not Path(source).is_file()
        if isinstance(source, (str, os.PathLike)):
            paths = list(_walk(Path(source))) if self.from_folder else [Path(source)]
        else:
            paths = [Path(path) for path in source]
        if self.from_folder:
            assert isinstance(source, (str, os.PathLike))
            self.root = Path(source)
            self.paths = [path for path in paths if known(path)]
            self.left_out = len(paths) - len(self.paths)
        else:
            self.paths = paths
            parents = [os.path.dirname(os.path.abspath(path)) for path in paths]
            self.root = Path(os.path.commonpath(parents)) if parents else Path()

    def name(self, path: Path) -> str:
        """Return where a file lies below the root."""
        return Path(os.path.relpath(os.path.abspath(path), os.path.abspath(self.root))).as_posix()

    def group(self, path: Path) -> str:
        """Return the folder of the root that a file lies in, or the file itself."""
        return self.name(path).split("/")[0]


def group_of(
    path: Path, files: Files, patient: str | None, group: Callable[[Path], str] | None, what: str
) -> str:
    """Return the group of a file: by the user's rule, else the patient, else the folder."""
    if group is None:
        return patient or files.group(path)
    chosen = group(path)
    if not isinstance(chosen, str):
        raise TypeError(f"{what}: group must return a str, got {type(chosen).__name__} for {path}")
    return chosen


def is_image(path: Path) -> bool:
    """Tell whether a file is of a kind that `ImageFolder` reads: by its name, or DICOM by its content."""
    if path.name.lower().endswith(IMAGE_SUFFIXES):
        return True
    # Archives give DICOM files names of their own.
    with path.open("rb") as file:
        return looks_like_dicom(file.read(132))


def _header(path: Path, array: str | None) -> ImageHeader:
    if is_nifti(path):
        *frames, height, width = nifti_layout(path)[0]
        return ImageHeader("NIfTI", tuple(frames), [(height, width)] * math.prod(frames))
    return read_header(path, array)


@lru_cache(maxsize=1)
def _volume(path: Path, stamp: Stamp, array: str | None) -> NDArray[Any]:
    """Read a volume that can be read only as a whole; the last one is kept, as its slices are often read in turn."""
    return nifti_values(path) if is_nifti(path) else read_npz(path, array)


def _check_volume(header: ImageHeader) -> None:
    if not header.stack:
        raise ValueError(f"it holds one image of shape {header.shapes[0]}, not a volume")
    if len(header.stack) > 1 or len(set(header.shapes)) > 1:
        shapes = ", ".join(map(str, dict.fromkeys(header.shapes)))
        raise ValueError(f"it holds a stack of {header.stack} images of {shapes}, not one volume")


def _values(path: Path, header: ImageHeader, array: str | None, frame: int | None) -> NDArray[Any]:
    if header.format == "NIfTI":
        part = None if frame is None else nifti_slice(path, frame)
        if part is not None:
            return part
        volume = _volume(path, stamp(path), None)
        return volume if frame is None else volume[frame]
    if header.format == "NPZ" and frame is not None:
        return grey(pick(_volume(path, stamp(path), array), frame))
    return read_values(path, array, frame)[0]


class ImageFolder(Samples):
    r"""Images of a folder, with all folders in it: each slice, frame or page is a sample, or each volume.

    Read are DICOM (one frame or several), TIFF (each page), PNG, NPY and NPZ (``(H, W)`` or slices first), and NIfTI
    (each slice of a volume), real or complex. CT slices in DICOM are linear attenuation coefficients in 1/mm as
    `read_image` returns them; other values are as stored. Only headers are read to begin with, and of colours whether
    they are grey; a file that is damaged further down is an error when its sample is asked for.

    Of a folder, hidden files and other kinds of files are left out, and DICOM files that hold no image, CT localizers,
    captures of the screen among slices, and DICOM images in colours. Of a TIFF file, reduced copies and masks of other
    pages are; pages of other sizes are samples of their own, and so are the planes of each file of an OME-TIFF set.
    ``left_out`` says how many. A list of files is taken as it is. A warning tells of CT files that are not in
    Hounsfield units.

    Args:
        source: A folder, a file, or a list of files.
        scale: What values become:

            - ``"slice"``: those of each slice fill [0, 1], from its least to its largest; a complex one, or a volume,
              is divided by its largest magnitude.
            - ``(low, high)``: the same window for all, brought to [0, 1] and clipped; of CT in 1/mm.
            - ``"none"``: as read.
        array: Which array of NPZ files; needed only where they hold several.
        volumes: Take each file as one volume ``(Z, H, W)``, complex, as diffraction tomography does.
        group: From the path of a file to the name of the patient it shows. None for the patient (or the study) that
            a DICOM file names, and else the folder in `source` that the file lies in at whatever depth, or the file
            itself where it lies in none.

    Attributes:
        left_out: Numbers of files left out, by reason.

    Raises:
        OSError: Where the folder or a file is missing or unreadable.
        TypeError: Where `group` returns something else than a text.
        ValueError: For a file of a known kind with a damaged header, a folder without images, or a `scale` that is
            none of those above; on reading, for a damaged file, or NaN or Inf. The message names the file.

    Example:
        >>> import tempfile, numpy as np
        >>> folder = Path(tempfile.mkdtemp())
        >>> for patient in "ab":
        ...     (folder / patient).mkdir()
        ...     np.save(folder / patient / "slices.npy", np.arange(60.0).reshape(3, 4, 5))
        >>> dataset = ImageFolder(folder)
        >>> len(dataset), dataset.groups[3], dataset.shapes[3], dataset[3].image.max().item()
        (6, 'b', (4, 5), 1.0)
    """

    def __init__(
        self,
        source: PathLike | Iterable[PathLike],
        *,
        scale: Scale = "slice",
        array: str | None = None,
        volumes: bool = False,
        group: Callable[[Path], str] | None = None,
    ) -> None:
        self.scale = _check_scale(scale)
        self.array, self.volumes = array, volumes
        self.left_out: dict[str, int] = {}
        files = Files(source, is_image)
        if files.left_out:
            self.left_out["another kind of file"] = files.left_out
        self.names, self.groups, self.shapes = [], [], []
        self._files: list[tuple[Path, ImageHeader]] = []
        # Number of the file, and of the frame in it.
        self._where: list[tuple[int, int | None]] = []
        doubts: dict[str, list[Path]] = {}
        for path in files.paths:
            try:
                with naming(path):
                    header = _header(path, array if path.suffix.lower() == ".npz" else None)
                    if volumes:
                        _check_volume(header)
            except ValueError as error:
                if not (files.from_folder and isinstance(error.__cause__, NoImageError)):
                    raise
                reason = str(error.__cause__)
                self.left_out[reason] = self.left_out.get(reason, 0) + 1
                continue
            name, member = files.name(path), group_of(path, files, header.patient, group, "ImageFolder")
            frames = [None] if header.frames is None or volumes else range(header.frames)
            for frame in frames:
                self.names.append(name if frame is None else f"{name}[{frame}]")
                self._where.append((len(self._files), frame))
            self.groups += [member] * len(frames)
            self.shapes += [header.stack + header.shapes[0]] if volumes else header.shapes
            for reason, count in header.left_out.items():
                self.left_out[reason] = self.left_out.get(reason, 0) + count
            self._files.append((path, header))
            if header.warning is not None:
                doubts.setdefault(header.warning, []).append(path)
        for doubt, paths in doubts.items():
            warnings.warn(f"ImageFolder: {len(paths)} of {doubt}; the first is {paths[0]}", stacklevel=2)
        if not self.groups:
            found = ", ".join(f"{count} of {reason}" for reason, count in self.left_out.items()) or "nothing"
            where = files.root if files.from_folder else "ImageFolder: source"
            raise ValueError(f"{where}: no images (DICOM, TIFF, PNG, NPY, NPZ, NIfTI) in it, only: {found}")

    def __getitem__(self, index: SupportsIndex) -> Sample:
        number = self._check(index)
        file, frame = self._where[number]
        path, header = self._files[file]
        with naming(path):
            array = self.array if header.format == "NPZ" else None
            image = _as_image(_values(path, header, array, frame), 3 if self.volumes else 2)
            image = _scaled(image, self.scale)
        return Sample(self.names[number], image)

    def fingerprint(self, index: SupportsIndex) -> str:
        """Return what the file is, when it was last changed, and what is made of it."""
        file, frame = self._where[self._check(index)]
        return self._hash(stamp(self._files[file][0]), frame, self.scale, self.array, self.volumes)


def _check_scale(scale: Any) -> Scale:
    if scale in ("none", "slice"):
        chosen: Scale = scale
        return chosen
    if isinstance(scale, (tuple, list)) and len(scale) == 2:
        low, high = (float(value) for value in scale)
        if np.isfinite([low, high]).all() and low < high:
            return low, high
    raise ValueError(
        f"ImageFolder: scale must be 'none', 'slice' or a window (low, high) with low < high, got {scale!r}"
    )


def _as_image(values: NDArray[Any], dimensions: int) -> Tensor:
    """Return an image as float32 or complex64, a volume as complex64."""
    if values.ndim != dimensions or 0 in values.shape:
        wanted = "a volume" if dimensions == 3 else "a two-dimensional image"
        raise ValueError(f"it holds an array of shape {values.shape}, not {wanted}")
    if values.dtype.kind not in "biufc":
        raise ValueError(f"its values are {values.dtype}, not numbers")
    dtype = np.complex64 if values.dtype.kind == "c" or dimensions == 3 else np.float32
    with np.errstate(over="ignore"):
        # Of its own, as it is changed in place.
        image = torch.from_numpy(np.require(values, dtype, ("C", "W", "O")))
    bad = first_bad(image)
    if bad is not None:
        raise ValueError(f"pixel {bad} is {image[bad].item()}")
    return image


def _scaled(image: Tensor, scale: Scale) -> Tensor:
    """Bring values to the scale, in place where they are real."""
    if scale == "none":
        return image
    if scale == "slice":
        if image.is_complex():
            largest = image.abs().amax()
            return image / largest if largest > 0 else image
        low, high = (float(value) for value in torch.aminmax(image))
        return image.sub_(low).div_(high - low) if high > low else image.zero_()
    assert not isinstance(scale, str)
    if image.is_complex():
        raise ValueError("it is complex, and a window is for real values; use scale='slice' or 'none'")
    low, high = scale
    return image.sub_(low).div_(high - low).clamp_(0, 1)


# ------------------------------------------------------------------ phantoms

KINDS: dict[str, Callable[..., Tensor]] = {
    "ellipses": random_ellipses,
    "shepp-logan": lambda n, size, generator=None: shepp_logan(size).expand(n, size, size),
    "shepp-logan-random": random_shepp_logan,
    "brain": brain_like,
    "cells": cell_like,
}


class Phantoms(Samples):
    """Phantoms drawn when they are asked for, each from the seed and its index alone; nothing is stored.

    Args:
        kind: ``"ellipses"`` (`random_ellipses`), ``"shepp-logan"`` (`shepp_logan`, always the same),
            ``"shepp-logan-random"`` (`random_shepp_logan`), ``"brain"`` (`brain_like`, complex), or ``"cells"``
            (`cell_like`, complex volumes).
        n: How many.
        size: Rows and columns; of cells the shape ``(Z, H, W)``.
        seed: At least 0; another one gives other phantoms.
        options: Further arguments of the function that draws.

    Raises:
        TypeError: For an option that the function does not have.
        ValueError: For an unknown kind, or an argument out of range.

    Example:
        >>> dataset = Phantoms("ellipses", 100, 64, seed=0, texture=0.01)
        >>> len(dataset), dataset[7].image.shape
        (100, torch.Size([64, 64]))
    """

    def __init__(
        self, kind: str, n: int, size: int | tuple[int, int, int], seed: int = 0, **options: Any
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"Phantoms: kind must be one of {', '.join(KINDS)}, got {kind!r}")
        if n < 1:
            raise ValueError(f"Phantoms: n must be at least 1, got {n}")
        if seed < 0:
            raise ValueError(f"Phantoms: seed must be at least 0, got {seed}")
        volumes = kind == "cells"
        if isinstance(size, int) == volumes:
            needed = "three numbers (Z, H, W)" if volumes else "a whole number"
            raise ValueError(f"Phantoms: size must be {needed} for {kind}, got {size}")
        self.kind, self.size, self.seed, self.options = kind, size, seed, options
        try:
            # None drawn, but all arguments checked.
            KINDS[kind](0, size, **options)
        except TypeError as error:
            raise TypeError(f"Phantoms: {kind}: {error}") from error
        self.names = [f"{kind}[{index}]" for index in range(n)]
        self.groups = self.names
        shape = (size, size) if isinstance(size, int) else tuple(size)
        self.shapes = [shape] * n

    def __getitem__(self, index: SupportsIndex) -> Sample:
        number = self._check(index)
        generator = seeded_generator(self.seed, number)
        # Sums may be ordered otherwise on several threads.
        with one_thread():
            image = KINDS[self.kind](1, self.size, generator=generator, **self.options)[0]
        return Sample(self.names[number], image.clone())

    def fingerprint(self, index: SupportsIndex) -> str:
        """Return what is drawn, and from which seed."""
        return self._hash(self.kind, self.size, self.seed, sorted(self.options.items()), self._check(index))
