"""Write and read images as NIfTI."""

from __future__ import annotations

import gzip
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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


def _kind(head: bytes) -> Any:
    """Return the class of a NIfTI file from its first 348 bytes."""
    import nibabel

    if head[344:347] in (b"n+1", b"ni1"):
        return nibabel.Nifti1Image
    if head[4:7] in (b"n+2", b"ni2"):
        return nibabel.Nifti2Image
    raise ValueError("not a NIfTI file")


def _check_layout(shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    if len(shape) not in (2, 3) or 0 in shape:
        raise ValueError(f"it holds an array of shape {shape}, not (W, H) or (W, H, S)")
    if dtype.kind not in "biufc":
        raise ValueError(f"its values are {dtype}, not numbers")


def _affine(volume: Any) -> NDArray[Any]:
    """Return the map from voxels (column, row, slice) to mm."""
    unit = {"meter": 1000.0, "micron": 1e-3}.get(volume.header.get_xyzt_units()[0], 1.0)
    affine: NDArray[Any] = np.diag([unit, unit, unit, 1.0]) @ volume.affine
    return affine


def nifti_affine(path: Path) -> tuple[tuple[int, ...], NDArray[Any]]:
    """Read the shape of a file ending in .nii or .nii.gz, slices first, and its map from voxels to mm."""
    import nibabel

    volume = nibabel.load(path)
    return volume.shape[::-1], _affine(volume)


def nifti_shape(path: Path) -> tuple[int, ...]:
    """Read the shape of an image ``(H, W)`` or a volume ``(S, H, W)`` from the header of a NIfTI file."""
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    with gzip.open(path) if compressed else path.open("rb") as stream:
        head = stream.read(348)
        stream.seek(0)
        header = _kind(head).header_class.from_fileobj(stream)
    shape: tuple[int, ...] = header.get_data_shape()
    _check_layout(shape, header.get_data_dtype())
    return shape[::-1]


def nifti_slice(path: Path, number: int) -> NDArray[Any] | None:
    """Read one slice ``(H, W)`` of a volume, or None where the file is compressed and must be read as a whole."""
    with path.open("rb") as file:
        head = file.read(348)
    if head.startswith(b"\x1f\x8b"):
        return None
    volume = _kind(head).from_filename(path)
    _check_layout(volume.shape, volume.get_data_dtype())
    values: NDArray[Any] = np.asanyarray(volume.dataobj[..., number]).T
    return values


def read_nifti(path: PathLike) -> tuple[Tensor, Size]:
    """Read an image or a volume from a NIfTI file, as `write_nifti` writes it.

    Whether it is compressed is told from the content. The axes are brought into the order slice, row, column;
    their directions are left as stored.

    Args:
        path: The file.

    Returns:
        Values, shape ``(H, W)`` or ``(S, H, W)``, float32 or complex64, and the voxel size (slice, row, column)
        in mm.

    Raises:
        OSError: Where the file is missing or unreadable.
        ValueError: For a file that is truncated, not NIfTI, of other than two or three dimensions, or with NaN
            or Inf; the message names the file and the reason.
    """
    from nibabel.affines import voxel_sizes

    path = Path(path)
    with naming(path):
        content = path.read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
        volume = _kind(content[:348]).from_bytes(content)
        stored = np.asanyarray(volume.dataobj)
        _check_layout(volume.shape, stored.dtype)
        dtype = np.complex64 if stored.dtype.kind == "c" else np.float32
        with np.errstate(over="ignore"):
            values = torch.from_numpy(np.ascontiguousarray(stored.T, dtype=dtype))
        column, row, between = (float(size) for size in voxel_sizes(_affine(volume)))
    _check_values(f"{path}:", values)
    return values, (between, row, column)
