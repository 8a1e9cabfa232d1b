"""Read multi-coil Cartesian k-space of real formats."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .files import PathLike, first_bad, is_hdf5, map_npy, naming, npz_layout, npz_name

HDF5_SUFFIXES = (".h5", ".hdf5", ".hdf", ".mrd")

# Flags of ISMRMRD acquisitions count from 1.
NOISE = 19
CALIBRATION = 20
REVERSE = 22
NO_IMAGE = {
    CALIBRATION: "separate calibration",
    23: "navigator",
    24: "phase correction",
    26: "feedback",
    27: "dummy",
    28: "feedback",
    29: "surface coil correction",
    30: "phase stabilization",
    31: "phase stabilization",
}
AVERAGED = ("average", "repetition")
NUMPY_LAYOUT = "(H, W), (coils, H, W) or (slices, coils, H, W)"
DISTINCT = ("contrast", "phase", "set")


class KSpaceFile(NamedTuple):
    """Multi-coil k-space as read from a file.

    Attributes:
        kspace: Shape ``(S, C, H, W)``: slices, coils, rows, columns; complex64; the zero frequency at
            ``(H // 2, W // 2)``.
        mask: Sampling mask, shape ``(S, H, W)``, bool, or None where the file has none.
        metadata: ``format``, ``slices`` (indices of those read), and where the file says so:

            - ``acquisition``, ``patient_id``: what was measured, of whom;
            - ``readout_axis``: axis of `kspace` of the frequency encoding, counted from the end;
            - ``encoded_matrix``, ``recon_matrix``: samples along readout, phase encoding and slice;
            - ``encoded_fov``, ``recon_fov``: field of view along the same, in mm;
            - ``voxel_size``: of the image of all of `kspace`, slice, row, column in mm;
            - ``padding``: columns before the first acquired one, and those up to the last (fastMRI);
            - ``reference``, ``reference_name``: images that came with the k-space, float32;
            - ``attributes``: the other attributes of a fastMRI file;
            - ``averages``: most repetitions of one sample that were averaged (ISMRMRD);
            - ``left_out``: acquisitions not used, and why (ISMRMRD);
            - ``noise``: samples of the noise acquisitions, ``(C, N)``, complex64 (ISMRMRD);
            - ``dwell_time``, ``noise_dwell_time``: time between samples in microseconds. The noise variance of
              a sample is inverse to it.
    """

    kspace: Tensor
    mask: Tensor | None
    metadata: dict[str, Any]


def readout_oversampling(metadata: Mapping[str, Any]) -> float:
    """Return how much longer the field of view is along the readout than that of the image."""
    encoded, wanted = (metadata.get(f"{space}_fov") for space in ("encoded", "recon"))
    return encoded[0] / wanted[0] if encoded and wanted and encoded[0] > wanted[0] > 0 else 1.0


class KSpaceHeader(NamedTuple):
    """What a file says of its k-space before it is read.

    Attributes:
        format: Kind of the file.
        shape: Slices, coils, rows, columns.
        metadata: As `KSpaceFile` has it, as far as it is known.
    """

    format: str
    shape: tuple[int, int, int, int]
    metadata: dict[str, Any]


def _format(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(8)
    if not head:
        raise ValueError("the file is empty")
    if head.startswith(b"\x93NUMPY"):
        return "NPY"
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "NPZ"
    if is_hdf5(path):
        return "HDF5"
    if path.suffix.lower() in HDF5_SUFFIXES:
        raise ValueError(f"its name ends in {path.suffix}, but its content is not HDF5")
    raise ValueError("not an HDF5, NPY or NPZ file")


def _chosen(slices: int | slice | None, count: int) -> range:
    """Return the indices of the slices asked for, of `count`."""
    if slices is None:
        return range(count)
    if isinstance(slices, slice):
        chosen = range(count)[slices]
        if not chosen or chosen.step < 0:
            raise ValueError(
                f"slices {slices.start}:{slices.stop}:{slices.step} are none of its {count} in order"
            )
        return chosen
    if isinstance(slices, bool) or not isinstance(slices, int):
        raise TypeError(f"slices must be an int, a slice or None, got {type(slices).__name__}")
    if not -count <= slices < count:
        raise ValueError(f"it has {count} slices, slice {slices} is not among them")
    return range(slices % count, slices % count + 1)


def _as_slice(chosen: range) -> slice:
    return slice(chosen.start, chosen.stop, chosen.step)


def _check_kspace(
    shape: tuple[int, ...], dtype: np.dtype[Any], dimensions: tuple[int, ...], meaning: str
) -> None:
    if len(shape) not in dimensions or 0 in shape:
        raise ValueError(f"its k-space has the shape {shape}, not {meaning}")
    if dtype.kind != "c":
        raise ValueError(f"its k-space is {dtype}, not complex")


def _mask(values: NDArray[Any], shape: tuple[int, ...], slices: range | None) -> Tensor:
    """Return a stored mask as (S, H, W); `shape` is that of the k-space in the file, (S, H, W)."""
    count, height, width = shape
    if values.shape not in ((width,), (height, width), (count, height, width)):
        raise ValueError(
            f"its mask has the shape {values.shape}, but its k-space has {height} rows and {width} columns"
        )
    if values.dtype.kind not in "biuf" or not np.isin(values, (0, 1)).all():
        raise ValueError("its mask holds values other than 0 and 1")
    mask = np.broadcast_to(values.astype(np.bool_), shape)
    return torch.from_numpy(np.array(mask if slices is None else mask[_as_slice(slices)]))


# ------------------------------------------------------------------ ISMRMRD header


def _numbers(node: ElementTree.Element | None, names: tuple[str, ...]) -> tuple[float, ...] | None:
    """Return the numbers that children of a node hold, or None where one is absent."""
    if node is None:
        return None
    texts = [node.findtext(f"{{*}}{name}") for name in names]
    return None if None in texts else tuple(float(text) for text in texts if text is not None)


def _parse_header(xml: bytes | str) -> tuple[ElementTree.Element, dict[str, Any]]:
    """Read what an ISMRMRD header (XML) says of the geometry, the acquisition and the patient."""
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError as error:
        raise ValueError(f"its ISMRMRD header is not XML ({error})") from error
    metadata: dict[str, Any] = {}
    for name, where in (
        ("acquisition", "{*}measurementInformation/{*}protocolName"),
        ("patient_id", "{*}subjectInformation/{*}patientID"),
    ):
        text = root.findtext(where)
        if text:
            metadata[name] = text
    for space in ("encoded", "recon"):
        node = root.find(f"{{*}}encoding/{{*}}{space}Space")
        if node is None:
            continue
        matrix = _numbers(node.find("{*}matrixSize"), ("x", "y", "z"))
        fov = _numbers(node.find("{*}fieldOfView_mm"), ("x", "y", "z"))
        if matrix is not None:
            metadata[f"{space}_matrix"] = tuple(int(n) for n in matrix)
        if fov is not None:
            metadata[f"{space}_fov"] = fov
    return root, metadata


def _voxel_size(metadata: dict[str, Any], height: int, width: int) -> dict[str, tuple[float, float, float]]:
    """Return the voxel size of (H, W) samples that cover the encoded field of view: readout along rows."""
    if "encoded_fov" not in metadata:
        return {}
    x, y, z = metadata["encoded_fov"]
    slices = metadata.get("encoded_matrix", (1, 1, 1))[2]
    return {"voxel_size": (z / max(slices, 1), x / height, y / width)}


def _phase_encoding(root: ElementTree.Element) -> tuple[int | None, int | None]:
    """Return the number of the central phase encoding and of the last one."""
    limits = root.find("{*}encoding/{*}encodingLimits/{*}kspace_encoding_step_1")
    center, last = _numbers(limits, ("center",)), _numbers(limits, ("maximum",))
    return (None if center is None else int(center[0])), (None if last is None else int(last[0]))


# ------------------------------------------------------------------ fastMRI


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value.item() if isinstance(value, np.generic) else value


def _fastmri_metadata(file: Any, height: int, width: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    if "ismrmrd_header" in file:
        root, header = _parse_header(file["ismrmrd_header"][()])
        metadata |= header | _voxel_size(header, height, width)
        center, last = _phase_encoding(root)
        if center is not None and last is not None and "encoded_matrix" in header:
            left = header["encoded_matrix"][1] // 2 - center
            metadata["padding"] = (left, left + last + 1)
    attributes = {name: _plain(value) for name, value in file.attrs.items()}
    for name in ("acquisition", "patient_id"):
        if name in attributes:
            metadata[name] = attributes.pop(name)
    metadata["attributes"] = attributes
    return metadata


def _read_fastmri(
    file: Any, slices: int | slice | None
) -> tuple[NDArray[Any], Tensor | None, dict[str, Any]]:
    dataset = file["kspace"]
    _check_kspace(dataset.shape, dataset.dtype, (3, 4), "(slices, coils, H, W) or (slices, H, W)")
    count, (height, width) = dataset.shape[0], dataset.shape[-2:]
    chosen = _chosen(slices, count)
    kspace = dataset[_as_slice(chosen)]
    if kspace.ndim == 3:
        kspace = kspace[:, None]
    mask = _mask(file["mask"][()], (count, height, width), chosen) if "mask" in file else None
    metadata: dict[str, Any] = {"format": "fastMRI", "slices": tuple(chosen), "readout_axis": -2}
    metadata |= _fastmri_metadata(file, height, width)
    for name in ("reconstruction_rss", "reconstruction_esc"):
        if name in file:
            reference = file[name]
            if reference.ndim != 3 or reference.shape[0] != count:
                raise ValueError(
                    f"its {name} has the shape {reference.shape}, but its k-space {count} slices"
                )
            metadata["reference_name"] = name
            metadata["reference"] = torch.from_numpy(np.array(reference[_as_slice(chosen)], np.float32))
            break
    return kspace, mask, metadata


# ------------------------------------------------------------------ ISMRMRD


def _flagged(flags: NDArray[np.uint64], flag: int) -> NDArray[np.bool_]:
    flagged: NDArray[np.bool_] = (flags >> np.uint64(flag - 1)) & np.uint64(1) == 1
    return flagged


def _lines(
    dataset: Any, heads: NDArray[Any], wanted: NDArray[np.bool_]
) -> Iterator[tuple[int, NDArray[np.complex64]]]:
    """Yield the index of each wanted acquisition and its samples (C, N), reading a few at a time."""
    block = 256
    for start in range(0, len(heads), block):
        inside = np.flatnonzero(wanted[start : start + block])
        if not len(inside):
            continue
        first = start + int(inside[0])
        samples = dataset.fields("data")[first : start + int(inside[-1]) + 1]
        for index in (start + inside).tolist():
            head, values = heads[index], np.asarray(samples[index - first])
            channels, n = int(head["active_channels"]), int(head["number_of_samples"])
            if values.dtype != np.float32 or values.size != 2 * channels * n:
                raise ValueError(
                    f"acquisition {index} holds {values.size} values of {values.dtype}, not the {2 * channels * n} of "
                    f"float32 of {channels} coils with {n} complex samples"
                )
            yield index, values.view(np.complex64).reshape(channels, n)


def _select(index: NDArray[Any], imaging: NDArray[np.bool_], select: Mapping[str, int]) -> NDArray[np.bool_]:
    """Narrow the imaging acquisitions to one contrast, phase and set, and to the counters in `select`."""
    for counter in select:
        if counter not in AVERAGED + DISTINCT:
            raise ValueError(
                f"it has no counter {counter!r} to select, only: {', '.join(AVERAGED + DISTINCT)}"
            )
    for counter in AVERAGED + DISTINCT:
        values = np.unique(index[counter][imaging]).tolist()
        if counter in select:
            if select[counter] not in values:
                raise ValueError(
                    f"it has no {counter} {select[counter]}, only: {', '.join(map(str, values))}"
                )
            imaging = imaging & (index[counter] == select[counter])
        elif counter in DISTINCT and len(values) > 1:
            raise ValueError(f"it holds several of {counter}, select one of: {', '.join(map(str, values))}")
    return imaging


class _Scan(NamedTuple):
    """What header and heads of an ISMRMRD group say.

    Attributes:
        root: Of the header.
        header: What of it goes into the metadata.
        size: Rows and columns.
        heads: Of all acquisitions.
        imaging: Which of them are lines of the image.
        noise: Which of them are noise.
        slices: Numbers of the slices.
        coils: Number of coils.
        left_out: Acquisitions not used, by reason.
    """

    root: ElementTree.Element
    header: dict[str, Any]
    size: tuple[int, int]
    heads: NDArray[Any]
    imaging: NDArray[np.bool_]
    noise: NDArray[np.bool_]
    slices: list[int]
    coils: int
    left_out: dict[str, int]


def _scan(group: Any, select: Mapping[str, int]) -> _Scan:
    root, header = _parse_header(np.asarray(group["xml"][()]).reshape(-1)[0])
    trajectory = root.findtext("{*}encoding/{*}trajectory")
    if trajectory not in (None, "cartesian"):
        raise ValueError(f"its trajectory is {trajectory!r}, not Cartesian")
    if "encoded_matrix" not in header:
        raise ValueError("its ISMRMRD header has no encoded matrix size")
    height, width, depth = header["encoded_matrix"]
    if depth > 1:
        raise ValueError(f"its encoding is three-dimensional ({depth} partitions), slices are needed")
    heads = group["data"].fields("head")[()]
    flags, index = heads["flags"], heads["idx"]

    # Calibration lines that belong to the image are lines like others.
    mode = root.findtext("{*}encoding/{*}parallelImaging/{*}calibrationMode")
    noise = _flagged(flags, NOISE)
    imaging, left_out = ~noise, dict[str, int]()
    for flag, reason in NO_IMAGE.items():
        if flag != CALIBRATION or mode not in ("embedded", "interleaved"):
            dropped = imaging & _flagged(flags, flag)
            imaging = imaging & ~dropped
            if dropped.any():
                left_out[reason] = left_out.get(reason, 0) + int(dropped.sum())
    other = imaging & (heads["encoding_space_ref"] != 0)
    imaging = imaging & ~other
    if other.any():
        left_out["another encoding space"] = int(other.sum())
    if not imaging.any():
        raise ValueError(
            f"a file without k-space: none of its {len(heads)} acquisitions are lines of an image"
        )
    imaging = _select(index, imaging, select)
    if len(np.unique(index["kspace_encode_step_2"][imaging])) > 1:
        raise ValueError("its lines have several partitions (kspace_encode_step_2), slices are needed")

    coils = np.unique(heads["active_channels"][imaging]).tolist()
    if len(coils) != 1:
        raise ValueError(f"its lines have different numbers of coils: {', '.join(map(str, coils))}")
    numbers = np.unique(index["slice"][imaging]).tolist()
    return _Scan(root, header, (height, width), heads, imaging, noise, numbers, coils[0], left_out)


def _read_ismrmrd(
    group: Any, slices: int | slice | None, select: Mapping[str, int]
) -> tuple[NDArray[Any], Tensor, dict[str, Any]]:
    root, header, (height, width), heads, imaging, noise, numbers, coils, left_out = _scan(group, select)
    dataset, index = group["data"], heads["idx"]
    chosen = _chosen(slices, len(numbers))
    position = {number: s for s, number in enumerate(numbers[_as_slice(chosen)])}
    imaging = imaging & np.isin(index["slice"], list(position))

    kspace = np.zeros((len(chosen), coils, height, width), dtype=np.complex64)
    count = np.zeros((len(chosen), height, width), dtype=np.int32)
    center = _phase_encoding(root)[0]
    first_column = 0 if center is None else width // 2 - center
    for number, samples in _lines(dataset, heads, imaging):
        head = heads[number]
        n, middle = samples.shape[1], int(head["center_sample"])
        kept = slice(int(head["discard_pre"]), n - int(head["discard_post"]))
        # Some writers leave the centre of a complete readout at 0.
        if middle == 0 and n == height:
            middle = n // 2
        samples, middle = samples[:, kept], middle - kept.start
        if _flagged(head["flags"], REVERSE):
            samples, middle = samples[:, ::-1], samples.shape[1] - 1 - middle
        top, column = height // 2 - middle, int(head["idx"]["kspace_encode_step_1"]) + first_column
        if not (top >= 0 and top + samples.shape[1] <= height and 0 <= column < width):
            raise ValueError(
                f"acquisition {number} lies outside the encoded matrix of {height} by {width}: samples "
                f"{top}..{top + samples.shape[1] - 1} of the readout, phase encoding {column}"
            )
        s = position[int(head["idx"]["slice"])]
        kspace[s, :, top : top + samples.shape[1], column] += samples
        count[s, top : top + samples.shape[1], column] += 1
    kspace /= np.maximum(count, 1)[:, None]

    metadata: dict[str, Any] = {"format": "ISMRMRD", "slices": tuple(chosen), "readout_axis": -2}
    metadata |= header | _voxel_size(header, height, width)
    metadata |= {"averages": int(count.max()), "left_out": left_out}
    metadata["dwell_time"] = float(heads["sample_time_us"][imaging][0])
    if noise.any():
        noises = [samples for _, samples in _lines(dataset, heads, noise)]
        if len({samples.shape[0] for samples in noises}) > 1:
            raise ValueError("its noise acquisitions have different numbers of coils")
        metadata["noise"] = torch.from_numpy(np.concatenate(noises, axis=1))
        metadata["noise_dwell_time"] = float(heads["sample_time_us"][noise][0])
    return kspace, torch.from_numpy(count > 0), metadata


def _is_ismrmrd(group: Any) -> bool:
    import h5py

    if not (isinstance(group, h5py.Group) and "data" in group and "xml" in group):
        return False
    names = getattr(getattr(group["data"], "dtype", None), "names", None)
    return names is not None and {"head", "data"} <= set(names)


def _ismrmrd_group(file: Any, select: Mapping[str, int]) -> Any:
    """Return the ISMRMRD group of a file, or None where it is one of fastMRI."""
    import h5py

    if isinstance(file.get("kspace"), h5py.Dataset):
        if select:
            raise ValueError(f"a fastMRI file has no counters, cannot select {', '.join(select)}")
        return None
    groups = [name for name in file if _is_ismrmrd(file[name])]
    if len(groups) > 1 and "dataset" not in groups:
        raise ValueError(f"it holds several ISMRMRD groups: {', '.join(groups)}")
    if not groups:
        raise ValueError(
            "a file without k-space: neither 'kspace' (fastMRI) nor a group with 'data' and 'xml' (ISMRMRD), "
            f"only: {', '.join(file) or 'nothing'}"
        )
    return file["dataset" if "dataset" in groups else groups[0]]


def _hdf5_header(path: Path, select: Mapping[str, int]) -> KSpaceHeader:
    import h5py

    with h5py.File(path, "r") as file:
        group = _ismrmrd_group(file, select)
        if group is not None:
            scan = _scan(group, select)
            return KSpaceHeader("ISMRMRD", (len(scan.slices), scan.coils, *scan.size), scan.header)
        dataset = file["kspace"]
        _check_kspace(dataset.shape, dataset.dtype, (3, 4), "(slices, coils, H, W) or (slices, H, W)")
        height, width = dataset.shape[-2:]
        coils = dataset.shape[1] if dataset.ndim == 4 else 1
        metadata = _fastmri_metadata(file, height, width)
        return KSpaceHeader("fastMRI", (len(dataset), coils, height, width), metadata)


def _read_hdf5(
    path: Path, slices: int | slice | None, select: Mapping[str, int]
) -> tuple[NDArray[Any], Tensor | None, dict[str, Any]]:
    import h5py

    with h5py.File(path, "r") as file:
        group = _ismrmrd_group(file, select)
        return _read_fastmri(file, slices) if group is None else _read_ismrmrd(group, slices, select)


# ------------------------------------------------------------------ NPY, NPZ


def _kspace_name(names: list[str], array: str | None) -> str:
    """Return the name of the array asked for, of that called kspace, or of the only one beside a mask."""
    if array is None and "kspace" in names:
        return "kspace"
    return npz_name([name for name in names if name != "mask"], array)


def _numpy_header(path: Path, kind: str, array: str | None) -> KSpaceHeader:
    shape: tuple[int, ...]
    if kind == "NPY":
        values = map_npy(path)
        shape, dtype = values.shape, values.dtype
    else:
        shape, dtype = npz_layout(path, lambda names: _kspace_name(names, array))
    _check_kspace(shape, dtype, (2, 3, 4), NUMPY_LAYOUT)
    slices, coils, height, width = (*(1,) * (4 - len(shape)), *shape)
    return KSpaceHeader(kind, (slices, coils, height, width), {})


def _read_numpy(
    path: Path, kind: str, array: str | None, slices: int | slice | None
) -> tuple[NDArray[Any], Tensor | None, dict[str, Any]]:
    stored = None
    if kind == "NPY":
        values = map_npy(path)
    else:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            values = archive[_kspace_name(archive.files, array)]
            stored = archive["mask"] if "mask" in archive.files else None
    _check_kspace(values.shape, values.dtype, (2, 3, 4), NUMPY_LAYOUT)
    values = values.reshape((1,) * (4 - values.ndim) + values.shape)
    chosen = _chosen(slices, values.shape[0])
    shape = (values.shape[0], *values.shape[-2:])
    mask = None if stored is None else _mask(stored, shape, chosen)
    return np.array(values[_as_slice(chosen)]), mask, {"format": kind, "slices": tuple(chosen)}


def read_kspace_header(
    path: Path, *, array: str | None = None, select: Mapping[str, int] | None = None
) -> KSpaceHeader:
    """Read what a file says of its k-space, not the k-space; arguments and errors are those of `read_kspace`."""
    select = dict(select or {})
    kind = _format(path)
    if kind == "HDF5":
        return _hdf5_header(path, select)
    return _numpy_header(path, kind, array if kind == "NPZ" else None)


def read_kspace(
    path: PathLike,
    slices: int | slice | None = None,
    *,
    array: str | None = None,
    select: Mapping[str, int] | None = None,
) -> KSpaceFile:
    r"""Read multi-coil Cartesian k-space from a fastMRI, ISMRMRD, NPY or NPZ file.

    The kind of file is told from its content.

    - fastMRI (HDF5): ``kspace`` of shape ``(slices, coils, H, W)``, or ``(slices, H, W)`` of a single coil, with
      the readout along the rows; where there, ``mask``, the header and the reconstruction.
    - ISMRMRD (HDF5): the lines of the first encoding space are placed on the encoded matrix, the readout along
      the rows, by their phase encoding and the sample at the centre of k-space. Lines measured repeatedly
      (averages, repetitions) are averaged; samples without a line are 0 and not in the mask. Slices are in the
      order of their numbers. Of an encoding in three dimensions or along another trajectory nothing is read.
    - NPY, NPZ: a complex array ``(H, W)``, ``(coils, H, W)`` or ``(slices, coils, H, W)``; in an NPZ file it is
      called ``kspace`` or is the only one besides ``mask``.

    A stored mask may have the shape ``(W,)`` (lines along the columns), ``(H, W)`` or ``(slices, H, W)``.

    Args:
        path: The file.
        slices: One slice, or a range such as ``slice(10, 14)``; the others are not loaded (except from NPZ).
            All of them where None. A single slice keeps its dimension.
        array: Which array of an NPZ file.
        select: Counters of an ISMRMRD file to take the lines of: ``contrast``, ``phase``, ``set`` (needed where
            there are several), ``average``, ``repetition`` (one of them in place of their mean).

    Returns:
        K-space ``(S, C, H, W)``, mask ``(S, H, W)`` or None, and what the file says about them.

    Raises:
        OSError: Where the file is missing or unreadable.
        ValueError: For a file that is truncated, of another kind, without k-space, of a wrong number of
            dimensions, real-valued, with a mask that does not fit, or with NaN or Inf; for slices or counters
            that are not there. The message names the file and the reason.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "kspace.npy"
        >>> np.save(path, np.ones((2, 4, 6), np.complex64))
        >>> kspace, mask, metadata = read_kspace(path)
        >>> kspace.shape, mask, metadata["format"]
        (torch.Size([1, 2, 4, 6]), None, 'NPY')

    References:
        Inati et al., "ISMRM raw data format: a proposed standard for MRI raw datasets", Magn. Reson. Med. 77
        (2017).
        Zbontar et al., "fastMRI: an open dataset and benchmarks for accelerated MRI", arXiv:1811.08839 (2018).
    """
    path = Path(path)
    select = dict(select or {})
    with naming(path):
        kind = _format(path)
        if array is not None and kind != "NPZ":
            raise ValueError(f"an {kind} file has no named arrays to choose from")
        if kind == "HDF5":
            values, mask, metadata = _read_hdf5(path, slices, select)
        elif select:
            raise ValueError(f"an {kind} file has no counters, cannot select {', '.join(select)}")
        else:
            values, mask, metadata = _read_numpy(path, kind, array, slices)
        with np.errstate(over="ignore"):
            kspace = torch.from_numpy(np.ascontiguousarray(values, dtype=np.complex64))
        bad = first_bad(kspace)
        if bad is not None:
            s, c, i, j = bad
            raise ValueError(
                f"sample ({i}, {j}) of coil {c} in slice {metadata['slices'][s]} is {kspace[bad].item()}"
            )
    return KSpaceFile(kspace, mask, metadata)
