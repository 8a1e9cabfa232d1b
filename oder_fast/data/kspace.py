"""Read multi-coil Cartesian k-space of real formats."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .files import PathLike, check_size, first_bad, is_hdf5, map_npy, naming, npz_layout, npz_name, open_npz
from .hdf5 import Numbers, check_heaps, dataset, open_hdf5
from .matlab import MATLAB_SUFFIX, is_matlab_file, open_matlab

HDF5_SUFFIXES = (".h5", ".hdf5", ".hdf", ".mrd")
SUFFIXES = (*HDF5_SUFFIXES, MATLAB_SUFFIX, ".npy", ".npz")
NAMED = ("NPZ", "MATLAB")
"""Kinds of files whose arrays have names to choose from."""

MOST_SAMPLES = 2**31
"""No size, centre or field of view of a header reaches this."""

# Flags of ISMRMRD acquisitions count from 1.
NOISE = 19
CALIBRATION = 20
CALIBRATION_AND_IMAGE = 21
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
ROUNDING = 1e-3
"""By how much values of a mask may differ from 0 and 1."""

LAYOUT = "(H, W), (coils, H, W) or (slices, coils, H, W)"
DISTINCT = ("contrast", "phase", "set")
COUNTERS = AVERAGED + DISTINCT

TOLERANCE = 0.01
"""Relative, of fields of view, which some writers round."""


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
    if is_matlab_file(path):
        return "MATLAB"
    if is_hdf5(path):
        return "HDF5"
    if path.suffix.lower() in HDF5_SUFFIXES:
        raise ValueError(f"its name ends in {path.suffix}, but its content is not HDF5")
    raise ValueError("not an HDF5, NPY, NPZ or MATLAB file")


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


def _mask(values: NDArray[Any], shape: tuple[int, ...], slices: range) -> Tensor:
    """Return a stored mask as (S, H, W); `shape` is that of the k-space in the file, (S, H, W)."""
    _, height, width = shape
    sizes = (1,) * (3 - values.ndim) + values.shape
    if values.ndim > 3 or sizes[-1] == 0 or any(n not in (1, m) for n, m in zip(sizes, shape, strict=True)):
        raise ValueError(
            f"its mask has the shape {values.shape}, but its k-space has {height} rows and {width} columns"
        )
    if values.dtype.kind not in "biuf":
        raise ValueError(f"its mask is {values.dtype}, not of numbers 0 and 1")
    # Some writers store 255 for 1, some what they computed.
    largest = float(values.max())
    sampled = values > largest / 2
    if not (np.abs(values / (255 if largest > 2 else 1) - sampled) <= ROUNDING).all():
        raise ValueError("its mask holds values other than 0 and 1 (or 255)")
    if not sampled.any():
        raise ValueError("its mask samples nothing")
    mask = np.broadcast_to(sampled, shape)
    return torch.from_numpy(np.array(mask[_as_slice(slices)]))


# ------------------------------------------------------------------ ISMRMRD header


def _numbers(node: ElementTree.Element | None, names: tuple[str, ...]) -> tuple[float, ...] | None:
    """Return the numbers that children of a node hold, or None where one is absent."""
    if node is None:
        return None
    texts = [(name, node.findtext(f"{{*}}{name}")) for name in names]
    if any(text is None for _, text in texts):
        return None
    values = []
    for name, text in texts:
        try:
            values.append(float(text or "nothing"))
        except ValueError:
            values.append(math.nan)
        if not 0 <= values[-1] < MOST_SAMPLES:
            tag = node.tag.rpartition("}")[2]
            raise ValueError(f"its ISMRMRD header has {text!r} for {name} of {tag}, not a number from 0 on")
    return tuple(values)


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
    stored = dataset(file, "ismrmrd_header")
    if stored is not None:
        root, header = _parse_header(stored[()])
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


def _fastmri_kspace(file: Any) -> Any:
    stored = dataset(file, "kspace")
    _check_kspace(stored.shape, stored.dtype, (3, 4), "(slices, coils, H, W) or (slices, H, W)")
    return stored


def _read_fastmri(
    file: Any, slices: int | slice | None
) -> tuple[NDArray[Any], Tensor | None, dict[str, Any]]:
    stored = _fastmri_kspace(file)
    count, (height, width) = stored.shape[0], stored.shape[-2:]
    chosen = _chosen(slices, count)
    kspace = stored[_as_slice(chosen)]
    if kspace.ndim == 3:
        kspace = kspace[:, None]
    sampled = dataset(file, "mask")
    mask = None if sampled is None else _mask(sampled[()], (count, height, width), chosen)
    metadata: dict[str, Any] = {"format": "fastMRI", "slices": tuple(chosen), "readout_axis": -2}
    metadata |= _fastmri_metadata(file, height, width)
    for name in ("reconstruction_rss", "reconstruction_esc"):
        reference = dataset(file, name)
        if reference is not None:
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
    data: Any, heads: NDArray[Any], wanted: NDArray[np.bool_]
) -> Iterator[tuple[int, NDArray[np.complex64]]]:
    """Yield the index of each wanted acquisition and its samples (C, N), reading a few at a time."""
    block = 256
    for start in range(0, len(heads), block):
        inside = np.flatnonzero(wanted[start : start + block])
        if not len(inside):
            continue
        first = start + int(inside[0])
        samples = data.fields("data")[first : start + int(inside[-1]) + 1]
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
    """Narrow the imaging acquisitions to the counters in `select`."""
    for counter in select:
        if counter not in COUNTERS:
            raise ValueError(f"it has no counter {counter!r} to select, only: {', '.join(COUNTERS)}")
    for counter in COUNTERS:
        if counter in select:
            values = np.unique(index[counter][imaging]).tolist()
            if select[counter] not in values:
                raise ValueError(
                    f"it has no {counter} {select[counter]}, only: {', '.join(map(str, values))}"
                )
            imaging = imaging & (index[counter] == select[counter])
    return imaging


class _Acquisitions(NamedTuple):
    """What header and heads of an ISMRMRD group say of its acquisitions.

    Attributes:
        root: Of the header.
        header: What of it goes into the metadata.
        heads: Of all acquisitions.
        imaging: Which of them are lines of an image.
        noise: Which of them are noise.
        left_out: Acquisitions not used, by reason.
    """

    root: ElementTree.Element
    header: dict[str, Any]
    heads: NDArray[Any]
    imaging: NDArray[np.bool_]
    noise: NDArray[np.bool_]
    left_out: dict[str, int]


def _acquisitions(group: Any, select: Mapping[str, int]) -> _Acquisitions:
    check_heaps(group.file)
    root, header = _parse_header(np.asarray(dataset(group, "xml")[()]).reshape(-1)[0])
    trajectory = root.findtext("{*}encoding/{*}trajectory")
    if trajectory not in (None, "cartesian"):
        raise ValueError(f"its trajectory is {trajectory!r}, not Cartesian")
    heads = dataset(group, "data").fields("head")[()]
    flags = heads["flags"]

    # Calibration lines that belong to the image are lines like others.
    mode = root.findtext("{*}encoding/{*}parallelImaging/{*}calibrationMode")
    noise = _flagged(flags, NOISE)
    imaging, left_out = ~noise, dict[str, int]()
    for flag, reason in NO_IMAGE.items():
        dropped = imaging & _flagged(flags, flag)
        if flag == CALIBRATION:
            dropped &= (mode not in ("embedded", "interleaved")) & ~_flagged(flags, CALIBRATION_AND_IMAGE)
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
    return _Acquisitions(root, header, heads, _select(heads["idx"], imaging, select), noise, left_out)


class _Slices(NamedTuple):
    """One image of each slice of an ISMRMRD group.

    Attributes:
        header: What of the header goes into the metadata, where it agrees with the lines.
        center: Number of the central phase encoding, where the header tells it.
        size: Rows and columns.
        heads: Of all acquisitions.
        imaging: Which of them are lines of the image.
        noise: Which of them are noise.
        slices: Numbers of the slices.
        coils: Number of coils.
        left_out: Acquisitions not used, by reason.
    """

    header: dict[str, Any]
    center: int | None
    size: tuple[int, int]
    heads: NDArray[Any]
    imaging: NDArray[np.bool_]
    noise: NDArray[np.bool_]
    slices: list[int]
    coils: int
    left_out: dict[str, int]


def _slices(group: Any, select: Mapping[str, int]) -> _Slices:
    root, header, heads, imaging, noise, left_out = _acquisitions(group, select)
    index = heads["idx"]
    for counter in DISTINCT:
        values = np.unique(index[counter][imaging]).tolist()
        if len(values) > 1:
            raise ValueError(f"it holds several of {counter}, select one of: {', '.join(map(str, values))}")
    if "encoded_matrix" not in header:
        raise ValueError("its ISMRMRD header has no encoded matrix size")
    if 0 in header["encoded_matrix"][:2]:
        raise ValueError(
            f"its ISMRMRD header has the encoded matrix {header['encoded_matrix']}, without samples"
        )
    if header["encoded_matrix"][2] > 1:
        raise ValueError(
            f"its encoding is three-dimensional ({header['encoded_matrix'][2]} partitions), slices are needed"
        )
    if len(np.unique(index["kspace_encode_step_2"][imaging])) > 1:
        raise ValueError("its lines have several partitions (kspace_encode_step_2), slices are needed")
    header |= _reconciled(header, heads[imaging])
    height, width, _ = header["encoded_matrix"]
    coils = np.unique(heads["active_channels"][imaging]).tolist()
    if len(coils) != 1:
        raise ValueError(f"its lines have different numbers of coils: {', '.join(map(str, coils))}")
    numbers = np.unique(index["slice"][imaging]).tolist()
    shape = (len(numbers), coils[0], height, width)
    if coils[0] == 0:
        raise ValueError("its lines have no coils")
    stored = Path(group.file.filename).stat().st_size
    check_size(f"its k-space of shape {shape}", 8 * math.prod(shape), stored, True)
    center = _phase_encoding(root)[0]
    return _Slices(header, center, (height, width), heads, imaging, noise, numbers, coils[0], left_out)


def _reconciled(header: dict[str, Any], heads: NDArray[Any]) -> dict[str, Any]:
    """Return the encoded matrix and field of view that the readouts have, where the header tells others.

    Some writers keep the oversampling out of the header, and some remove it from the lines alone.
    """
    samples, ends = heads["number_of_samples"].astype(np.int64), ("discard_pre", "discard_post")
    kept = samples - heads[ends[0]] - heads[ends[1]]
    if kept.min() < 1:
        raise ValueError("it has lines without samples")
    longest, (height, *others) = int(kept.max()), header["encoded_matrix"]
    field, oversampling = header.get("encoded_fov"), readout_oversampling(header)
    if longest > height:
        multiple, rest = divmod(longest, height)
        if rest:  # which lie outside
            return {}
        # A field of view that is larger than the image's by the same factor is that of the lines.
        scale = 1.0 if math.isclose(oversampling, multiple, rel_tol=TOLERANCE) else float(multiple)
    else:
        multiple = round(oversampling)
        whole = multiple > 1 and math.isclose(oversampling, multiple, rel_tol=TOLERANCE)
        if not (whole and multiple * longest == height and (kept == longest).all()):
            return {}
        middle = heads["center_sample"] - heads[ends[0]].astype(np.int64)
        # Half an echo is as long, but its centre is not in its middle.
        if not (np.isin(middle, _middles(longest)) | (heads["center_sample"] == 0)).all():
            return {}
        scale = 1 / multiple
    found = {"encoded_matrix": (longest, *others)}
    return found if field is None else found | {"encoded_fov": (field[0] * scale, *field[1:])}


def _middles(n: int) -> tuple[int, int]:
    """Return where the zero frequency of a complete readout may be: forwards, and backwards."""
    return n // 2, n - 1 - n // 2


def _first_row(head: Any, n: int, height: int) -> int:
    """Return the row of the first of `n` samples that are kept of a readout, in the order of the rows."""
    middle = int(head["center_sample"]) - int(head["discard_pre"])
    # A complete readout fills the rows, whichever way it runs; some writers leave its centre at 0.
    if n == height and (int(head["center_sample"]) == 0 or middle in _middles(n)):
        return 0
    return height // 2 - (n - 1 - middle if _flagged(head["flags"], REVERSE) else middle)


def _read_ismrmrd(
    group: Any, slices: int | slice | None, select: Mapping[str, int]
) -> tuple[NDArray[Any], Tensor, dict[str, Any]]:
    header, center, (height, width), heads, imaging, noise, numbers, coils, left_out = _slices(group, select)
    data, index = dataset(group, "data"), heads["idx"]
    chosen = _chosen(slices, len(numbers))
    position = {number: s for s, number in enumerate(numbers[_as_slice(chosen)])}
    imaging = imaging & np.isin(index["slice"], list(position))

    kspace = np.zeros((len(chosen), coils, height, width), dtype=np.complex64)
    count = np.zeros((len(chosen), height, width), dtype=np.int32)
    first_column = 0 if center is None else width // 2 - center
    for number, samples in _lines(data, heads, imaging):
        head = heads[number]
        samples = samples[:, int(head["discard_pre"]) : samples.shape[1] - int(head["discard_post"])]
        if _flagged(head["flags"], REVERSE):
            samples = samples[:, ::-1]
        n, column = samples.shape[1], int(head["idx"]["kspace_encode_step_1"]) + first_column
        top = _first_row(head, n, height)
        if not (top >= 0 and top + n <= height and 0 <= column < width):
            raise ValueError(
                f"acquisition {number} lies outside the encoded matrix of {height} by {width}: samples "
                f"{top}..{top + n - 1} of the readout, phase encoding {column}"
            )
        s = position[int(head["idx"]["slice"])]
        kspace[s, :, top : top + n, column] += samples
        count[s, top : top + n, column] += 1
    kspace /= np.maximum(count, 1)[:, None]

    metadata: dict[str, Any] = {"format": "ISMRMRD", "slices": tuple(chosen), "readout_axis": -2}
    metadata |= header | _voxel_size(header, height, width)
    metadata |= {"averages": int(count.max()), "left_out": left_out}
    metadata["dwell_time"] = float(heads["sample_time_us"][imaging][0])
    if noise.any():
        noises = [samples for _, samples in _lines(data, heads, noise)]
        if len({samples.shape[0] for samples in noises}) > 1:
            raise ValueError("its noise acquisitions have different numbers of coils")
        metadata["noise"] = torch.from_numpy(np.concatenate(noises, axis=1))
        metadata["noise_dwell_time"] = float(heads["sample_time_us"][noise][0])
    return kspace, torch.from_numpy(count > 0), metadata


def _ismrmrd_signal(group: Any, select: Mapping[str, int]) -> list[int]:
    those = _slices(group, select)
    data, index = dataset(group, "data"), those.heads["idx"]
    steps = index["kspace_encode_step_1"].astype(np.int64)
    center = those.size[1] // 2 if those.center is None else those.center
    found = []
    for s, number in enumerate(those.slices):
        lines = np.flatnonzero(those.imaging & (index["slice"] == number))
        # The central line alone is read of nearly all.
        lines = lines[np.argsort(np.abs(steps[lines] - center), kind="stable")]
        if any(np.any(data.fields("data")[line]) for line in lines.tolist()):
            found.append(s)
    return found


def _is_ismrmrd(group: Any) -> bool:
    import h5py

    if not isinstance(group, h5py.Group) or dataset(group, "xml") is None:
        return False
    data = dataset(group, "data")
    return data is not None and {"head", "data"} <= set(data.dtype.names or ())


def _ismrmrd_group(file: Any, select: Mapping[str, int]) -> Any:
    """Return the ISMRMRD group of a file, or None where it is one of fastMRI."""
    if dataset(file, "kspace") is not None:
        if select:
            raise ValueError(f"a fastMRI file has no counters, cannot select {', '.join(select)}")
        return None
    groups = [name for name in file if _is_ismrmrd(file.get(name))]
    if len(groups) > 1 and "dataset" not in groups:
        raise ValueError(f"it holds several ISMRMRD groups: {', '.join(groups)}")
    if not groups:
        raise ValueError(
            "a file without k-space: neither 'kspace' (fastMRI) nor a group with 'data' and 'xml' (ISMRMRD), "
            f"only: {', '.join(file) or 'nothing'}"
        )
    return file["dataset" if "dataset" in groups else groups[0]]


def _hdf5_header(path: Path, select: Mapping[str, int]) -> KSpaceHeader:
    with open_hdf5(path) as file:
        group = _ismrmrd_group(file, select)
        if group is not None:
            found = _slices(group, select)
            return KSpaceHeader("ISMRMRD", (len(found.slices), found.coils, *found.size), found.header)
        count, *coils, height, width = _fastmri_kspace(file).shape
        metadata = _fastmri_metadata(file, height, width)
        return KSpaceHeader("fastMRI", (count, *(coils or [1]), height, width), metadata)


def _read_hdf5(
    path: Path, slices: int | slice | None, select: Mapping[str, int]
) -> tuple[NDArray[Any], Tensor | None, dict[str, Any]]:
    with open_hdf5(path) as file:
        group = _ismrmrd_group(file, select)
        return _read_fastmri(file, slices) if group is None else _read_ismrmrd(group, slices, select)


# ------------------------------------------------------------------ NPY, NPZ, MATLAB


def _kspace_name(names: list[str], array: str | None) -> str:
    """Return the name of the array asked for, of that called kspace, or of the only one beside a mask."""
    if array is None and "kspace" in names:
        return "kspace"
    return npz_name([name for name in names if name != "mask"], array)


@contextmanager
def _arrays(path: Path, kind: str, array: str | None) -> Iterator[tuple[Any, NDArray[Any] | None]]:
    """Give the k-space, of which the slices that are used are read (of NPZ all), and the mask, where there is one."""
    if kind == "NPY":
        yield map_npy(path), None
        return
    with (open_matlab if kind == "MATLAB" else open_npz)(path) as (names, read):
        kspace = read(_kspace_name(names, array))
        yield kspace, read("mask")[:] if "mask" in names else None


def _numpy_header(path: Path, kind: str, array: str | None) -> KSpaceHeader:
    if kind == "NPZ":
        shape, dtype = npz_layout(path, lambda names: _kspace_name(names, array))
    else:
        with _arrays(path, kind, array) as (values, _):
            shape, dtype = values.shape, values.dtype
    _check_kspace(shape, dtype, (2, 3, 4), LAYOUT)
    slices, coils, height, width = (*(1,) * (4 - len(shape)), *shape)
    return KSpaceHeader(kind, (slices, coils, height, width), {})


def _read_numpy(
    path: Path, kind: str, array: str | None, slices: int | slice | None
) -> tuple[NDArray[Any], Tensor | None, dict[str, Any]]:
    with _arrays(path, kind, array) as (values, stored):
        _check_kspace(values.shape, values.dtype, (2, 3, 4), LAYOUT)
        shape: tuple[int, ...] = (*(1,) * (4 - len(values.shape)), *values.shape)
        chosen = _chosen(slices, shape[0])
        # Of one slice alone the first axis is another.
        first = _as_slice(chosen) if len(values.shape) == 4 else slice(None)
        kspace = np.array(values[first]).reshape(len(chosen), *shape[1:])
    mask = None if stored is None else _mask(stored, (shape[0], *shape[2:]), chosen)
    return kspace, mask, {"format": kind, "slices": tuple(chosen)}


# ------------------------------------------------------------------ files of all kinds


def kspace_selections(path: Path, select: Mapping[str, int]) -> list[dict[str, int]]:
    """Return what is to be selected besides `select` for each of the images that a file holds of its slices.

    They are those of all contrasts, phases and sets of an ISMRMRD file.
    """
    if _format(path) != "HDF5":
        return [{}]
    with open_hdf5(path) as file:
        group = _ismrmrd_group(file, select)
        if group is None:
            return [{}]
        _, _, heads, imaging, _, _ = _acquisitions(group, select)
        counters = np.stack([heads["idx"][name][imaging] for name in DISTINCT], axis=1)
    differ = [k for k in range(len(DISTINCT)) if len(np.unique(counters[:, k])) > 1]
    found = np.unique(counters[:, differ], axis=0).tolist() if differ else [[]]
    return [{DISTINCT[k]: n for k, n in zip(differ, one, strict=True)} for one in found]


def slices_with_signal(path: Path, array: str | None, select: Mapping[str, int]) -> list[int]:
    """Return the numbers of the slices that are not zero everywhere; of nearly all the central row alone is read."""
    kind = _format(path)
    if kind == "HDF5":
        with open_hdf5(path) as file:
            group = _ismrmrd_group(file, select)
            return _ismrmrd_signal(group, select) if group is not None else _signal(_fastmri_kspace(file))
    with _arrays(path, kind, array if kind in NAMED else None) as (values, _):
        return _signal(values if len(values.shape) == 4 else values[:][None])


def _signal(values: Any) -> list[int]:
    row, found = values.shape[-2] // 2, []
    for s in range(values.shape[0]):
        central = values[s : s + 1] if isinstance(values, Numbers) else values[s, ..., row, :]
        if central.any() or values[s : s + 1].any():
            found.append(s)
    return found


def read_kspace_header(
    path: Path, *, array: str | None = None, select: Mapping[str, int] | None = None
) -> KSpaceHeader:
    """Read what a file says of its k-space, not the k-space; arguments and errors are those of `read_kspace`."""
    with naming(path):
        kind = _format(path)
        if kind == "HDF5":
            return _hdf5_header(path, select or {})
        return _numpy_header(path, kind, array if kind in NAMED else None)


def read_kspace(
    path: PathLike,
    slices: int | slice | None = None,
    *,
    array: str | None = None,
    select: Mapping[str, int] | None = None,
) -> KSpaceFile:
    r"""Read multi-coil Cartesian k-space from a fastMRI, ISMRMRD, NPY, NPZ or MATLAB file.

    The kind of file is told from its content.

    - fastMRI (HDF5): ``kspace`` of shape ``(slices, coils, H, W)``, or ``(slices, H, W)`` of a single coil, with
      the readout along the rows; where there, ``mask``, the header and the reconstruction.
    - ISMRMRD (HDF5): the lines of the first encoding space are placed on the encoded matrix, the readout along
      the rows, by their phase encoding and the sample at the centre of k-space. Lines that are a whole multiple
      longer than the header's matrix, or shorter by its oversampling, make the matrix theirs. Lines measured
      repeatedly (averages, repetitions) are averaged; samples without a line are 0 and not in the mask. Slices are in
      the order of their numbers. Of an encoding in three dimensions or along another trajectory nothing is read.
    - NPY, NPZ, MATLAB (all versions): a complex array ``(H, W)``, ``(coils, H, W)`` or ``(slices, coils, H, W)``,
      axes in the order that NumPy or MATLAB shows; in an NPZ or MATLAB file it is called ``kspace`` or is the only
      one besides ``mask``.

    A stored mask may have the shape ``(W,)`` or ``(1, W)`` (lines along the columns), ``(H, 1)``, ``(H, W)`` or
    ``(slices, H, W)``, and hold 0 and 1 up to rounding, or 0 and 255. A file that points to other files, or stores less
    than it claims, is refused.

    Args:
        path: The file.
        slices: One slice, or a range such as ``slice(10, 14)``; the others are not loaded (except from NPZ).
            All of them where None. A single slice keeps its dimension.
        array: Which array of an NPZ or MATLAB file.
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
        if array is not None and kind not in NAMED:
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
