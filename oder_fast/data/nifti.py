"""Write and read images as NIfTI."""

from __future__ import annotations

import gzip
import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._extras import needs
from .files import PathLike, atomic, first_bad, naming

NIFTI_SUFFIXES = (".nii", ".nii.gz")

Size = tuple[float, float, float]


def is_nifti(path: Path) -> bool:
    """Tell from its name whether a file is NIfTI."""
    return path.name.lower().endswith(NIFTI_SUFFIXES)


def _check_values(where: str, values: Tensor) -> None:
    bad = first_bad(values)
    if bad is not None:
        raise ValueError(f"{where} value {bad} is {values[bad].item()}")


def write_nifti(path: PathLike, image: Tensor, voxel_size: Size = (1.0, 1.0, 1.0)) -> None:
    """Write an image or a volume to a NIfTI-1 file, atomically.

    The file says of the axes what an axial slice of a patient on the back has: columns grow to the left of the
    patient, rows to the back, slices to the head. Where the real orientation is another, only the voxel size
    can be relied on.

    Args:
        path: The file, ending in ``.nii`` or ``.nii.gz`` (compressed); an existing one is replaced.
        image: Shape ``(H, W)`` or, slices first, ``(S, H, W)``; real (stored as float32) or complex (stored as
            complex64).
        voxel_size: Slice, row and column distance in mm: ``metadata["voxel_size"]`` of `read_kspace`.

    Raises:
        OSError: Where the file cannot be written.
        ValueError: For another suffix, a wrong shape, NaN or Inf, or a voxel size that is not above 0.

    Example:
        >>> import tempfile, torch
        >>> path = Path(tempfile.mkdtemp()) / "volume.nii.gz"
        >>> write_nifti(path, torch.rand(3, 4, 5), (3.0, 0.5, 0.75))
        >>> values, voxel_size = read_nifti(path)
        >>> values.shape, voxel_size
        (torch.Size([3, 4, 5]), (3.0, 0.5, 0.75))
    """
    path = Path(path)
    if not path.name.endswith(NIFTI_SUFFIXES):
        raise ValueError(f"write_nifti: path must end in .nii or .nii.gz, got {path}")
    if image.ndim not in (2, 3) or 0 in image.shape:
        raise ValueError(
            f"write_nifti: image must be (H, W) or (S, H, W), none of them 0, got {tuple(image.shape)}"
        )
    if len(voxel_size) != 3 or not all(math.isfinite(size) and size > 0 for size in voxel_size):
        raise ValueError(f"write_nifti: voxel_size must be three numbers above 0, got {tuple(voxel_size)}")
    values = image.detach().cpu().to(torch.complex64 if image.is_complex() else torch.float32).resolve_conj()
    _check_values("write_nifti: image must be finite,", values)
    with atomic(path) as temporary:
        save_nifti(temporary, values.numpy(), voxel_size, compressed=path.suffix == ".gz")


def save_nifti(
    path: Path,
    values: NDArray[Any],
    voxel_size: Size,
    affine: NDArray[Any] | None = None,
    *,
    compressed: bool,
) -> None:
    """Write values, slices first, as `write_nifti` does, unless an affine map says where the voxels lie."""
    needs("writing NIfTI", "nibabel")
    import nibabel

    # NIfTI's axes are column, row, slice; x grows to the right of the patient and y to the front.
    between, row, column = voxel_size
    stored = values.astype(np.complex64 if np.iscomplexobj(values) else np.float32)
    volume = nibabel.Nifti1Image(
        stored.T, np.diag([-column, -row, between, 1.0]) if affine is None else affine
    )
    volume.header.set_xyzt_units("mm")
    content = volume.to_bytes()
    path.write_bytes(gzip.compress(content, mtime=0) if compressed else content)


class _Header(NamedTuple):
    """What a NIfTI file says of its voxels.

    Attributes:
        header: As nibabel has it.
        shape: Column, row and slice, without further axes of length one, which carry nothing.
        start: Byte of the first voxel.
        size: Bytes of all.
    """

    header: Any
    shape: tuple[int, ...]
    start: int
    size: int


@contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], _Header, bool]]:
    """Give the content of a file, its header, and whether it is compressed."""
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if compressed:
            with gzip.open(file) as unpacked:
                content: Any = unpacked
                yield content, _read_header(content, None), True
        else:
            yield file, _read_header(file, path.stat().st_size), False


@lru_cache(maxsize=1)
def _kinds() -> tuple[Any, Any]:
    """Return the headers of NIfTI-1 and NIfTI-2, of which quaternions may be off by rounding."""
    needs("reading NIfTI", "nibabel")
    import nibabel

    # Components of two or three digits, as some programs write them, can have a norm this much above 1.
    rounded = {"quaternion_threshold": -1e-2}
    return type("_Header1", (nibabel.Nifti1Header,), rounded), type(
        "_Header2", (nibabel.Nifti2Header,), rounded
    )


def _read_header(file: IO[bytes], size: int | None) -> _Header:
    """Read the header at the beginning of a file, of which the size is known or not."""
    content = file.read(540)
    if content[344:347] == b"n+1":
        kind, length = _kinds()[0], 348
    elif content[4:7] == b"n+2":
        kind, length = _kinds()[1], 540
    elif content[344:347] == b"ni1" or content[4:7] == b"ni2":
        raise ValueError(
            "a NIfTI header whose voxels are in another file (.img); convert both to one .nii file"
        )
    else:
        raise ValueError("not a NIfTI file")
    header = kind.from_fileobj(io.BytesIO(content[:length]))
    # Some leave the offset at 0, and before its least value is the header itself.
    start = int(header["vox_offset"]) or length + 4
    shape = header.get_data_shape()
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    dtype = header.get_data_dtype()
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise ValueError(f"it holds an array of shape {shape}, not (W, H) or (W, H, S)")
    if dtype.kind not in "biufc":
        raise ValueError(f"its values are {dtype}, not numbers")
    nbytes = math.prod(shape) * dtype.itemsize
    if size is not None and start + nbytes > size:
        raise ValueError(f"it is truncated: it has {size} bytes, and its voxels end at {start + nbytes}")
    return _Header(header, shape, start, nbytes)


def _affine(header: Any) -> NDArray[Any]:
    """Return the map from voxels (column, row, slice) to mm; without a unit that is known, they are taken for mm."""
    unit = {1: 1000.0, 3: 1e-3}.get(int(header["xyzt_units"]) & 7, 1.0)
    try:
        affine: NDArray[Any] = np.diag([unit, unit, unit, 1.0]) @ header.get_best_affine()
    except ValueError as error:
        quaternion = tuple(float(header[f"quatern_{part}"]) for part in "bcd")
        raise ValueError(f"its quaternion {quaternion} is no rotation") from error
    return affine


def _voxel_size(header: Any) -> Size:
    column, row, between = (math.hypot(*axis) for axis in _affine(header)[:3, :3].T)
    if not all(math.isfinite(size) and size > 0 for size in (between, row, column)):
        raise ValueError(f"its voxel size is {(between, row, column)} mm, which must be above 0")
    return between, row, column


def nifti_affine(path: Path) -> tuple[tuple[int, ...], NDArray[Any]]:
    """Read the shape of a NIfTI file, slices first, and its map from voxels to mm."""
    with _opened(path) as (_, header, _):
        return header.shape[::-1], _affine(header.header)


def nifti_voxel_size(path: Path) -> Size:
    """Read the size of voxels (slice, row, column) in mm."""
    with _opened(path) as (_, header, _):
        return _voxel_size(header.header)


def nifti_layout(path: Path) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Read the shape of an image ``(H, W)`` or a volume ``(S, H, W)``, and the kind of numbers stored."""
    with _opened(path) as (_, header, _):
        return header.shape[::-1], header.header.get_data_dtype()


def _values(header: _Header, content: bytes | bytearray, shape: tuple[int, ...]) -> NDArray[Any]:
    """Return what the voxels stored mean, slices first."""
    from nibabel.volumeutils import apply_read_scaling

    if len(content) < math.prod(shape) * header.header.get_data_dtype().itemsize:
        raise ValueError(f"it is truncated: of its voxels {len(content)} bytes are there")
    stored = np.frombuffer(content, header.header.get_data_dtype(), math.prod(shape)).reshape(shape[::-1])
    values: NDArray[Any] = apply_read_scaling(stored, *(header.header.get_slope_inter()))
    return values


def nifti_slice(path: Path, number: int) -> NDArray[Any] | None:
    """Read one slice ``(H, W)`` of a volume, or None where the file is compressed and must be read as a whole."""
    with _opened(path) as (file, header, compressed):
        if compressed:
            return None
        one = header.size // header.shape[2]
        file.seek(header.start + number * one)
        return _values(header, file.read(one), header.shape[:2])


def _read(path: Path) -> tuple[NDArray[Any], Any]:
    """Read all values of a file, slices first, and its header."""
    with _opened(path) as (file, header, compressed):
        file.seek(header.start)
        # In parts: memory is taken for what is there, not for what the header says.
        content = bytearray()
        while part := file.read(min(2**24, header.size - len(content))):
            content += part
        # The checksum is at the end.
        while compressed and file.read(2**20):
            pass
    return _values(header, content, header.shape), header.header


def nifti_values(path: Path) -> NDArray[Any]:
    """Read all values of a file, slices first."""
    return _read(path)[0]


def read_nifti(path: PathLike) -> tuple[Tensor, Size]:
    """Read an image or a volume from a NIfTI file, as `write_nifti` writes it.

    Whether it is compressed is told from the content. The axes are brought into the order slice, row, column;
    their directions are left as stored. Axes of length one after the third carry nothing.

    Args:
        path: The file.

    Returns:
        Values, shape ``(H, W)`` or ``(S, H, W)``, float32 or complex64, and the voxel size (slice, row, column)
        in mm.

    Raises:
        OSError: Where the file is missing or unreadable.
        ValueError: For a file that is truncated, not NIfTI, of other than two or three dimensions, without a voxel
            size, with its voxels in another file, or with NaN or Inf; the message names the file and the reason.
    """
    path = Path(path)
    with naming(path):
        stored, header = _read(path)
        dtype = np.complex64 if stored.dtype.kind == "c" else np.float32
        with np.errstate(over="ignore"):
            values = torch.from_numpy(np.array(stored, dtype, order="C"))
        size = _voxel_size(header)
    _check_values(f"{path}:", values)
    return values, size
