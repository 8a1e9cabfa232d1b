"""Reconstruct many files by a checkpoint: in batches, and again from where a run was broken off."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from ...data import (
    Batch,
    ImageFolder,
    Sample,
    atomic,
    collate,
    espirit_maps,
    normalize_background,
    psnr,
    read_array,
    read_kspace,
    remove_oversampling,
    ssim,
    write_image,
)
from ...data.files import is_hdf5, map_npy, naming, npz_layout, npz_name
from ...data.images import NoImageError, format_of
from ...data.kspace import read_kspace_header
from ...data.nifti import NIFTI_SUFFIXES
from ...data.writers import HOLD_VOLUMES
from ...deqred import as_channels
from ...operators import CartesianMRI
from .. import configuration as settings
from ..configuration import ConfigurationError, explain
from ..model import load_model
from ..processes import pick_device
from ..scans import IDTScan, Measured, MRIScan
from ..trainer import seed_of
from .jobs import Found, InputError, Item, Job, Solved, find_files, is_picture, name_outputs, reason_of
from .ledger import MEASURES, Ledger, digest_of
from .pipeline import Pipeline, Task

Format = Literal["dicom", "tiff", "png", "npy", "npz", "nifti"]
Part = Literal["magnitude", "phase", "real", "imaginary"]
Scale = Literal["slice", "none"] | tuple[float, float]

SUFFIXES: Mapping[str, str] = {
    "dicom": ".dcm",
    "tiff": ".tif",
    "png": ".png",
    "npy": ".npy",
    "npz": ".npz",
    "nifti": ".nii.gz",
}
HOLD_COMPLEX = ("npy", "npz", "nifti")
"""Formats of complex images as they are."""

PARTS = {
    "magnitude": torch.abs,
    "phase": torch.angle,
    "real": torch.real,
    "imaginary": torch.imag,
}
FULL = 0.95
"""Share of its samples that are not 0 from which on a line of k-space counts as measured: some may be 0 by chance."""

FAILED = "failed.txt"


@dataclass(frozen=True)
class Report:
    """What became of the files.

    Attributes:
        done: Names of files that were reconstructed, below the folders given.
        skipped: Of those that an earlier run had finished.
        failed: Of those that could not be, with the reasons.
        not_converged: Of those of `done` with an image whose residual stayed above the tolerance.
        quality: With `simulate` the mean ``psnr``, ``ssim``, ``psnr_start`` and ``ssim_start`` over all files.
    """

    done: list[str]
    skipped: list[str]
    failed: dict[str, str]
    not_converged: list[str]
    quality: dict[str, float]


def reconstruct_files(
    checkpoint: str | Path,
    inputs: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    format: Format | None = None,
    part: Part | None = None,
    simulate: bool = False,
    image_size: tuple[int, int] | None = None,
    scale: Scale | None = None,
    array: str | None = None,
    maps: str | Path | None = None,
    normalize: bool = False,
    tolerance: float | None = None,
    max_iterations: int | None = None,
    minibatch: int | None = None,
    batch: int = 4,
    device: str = "auto",
    denoiser: nn.Module | None = None,
    threads: int | None = None,
    workers: int = 2,
    overwrite: bool = False,
    progress: bool = True,
) -> Report:
    r"""Reconstruct files by a checkpoint of `Trainer`.

    What is measured is told by the checkpoint's operator: sinograms ``(V, D)`` or ``(B, V, D)`` in NPY, NPZ, TIFF or
    HDF5; k-space as `read_kspace` takes it, each slice an image, with the mask of the file or else what is not 0, and
    coil maps by ESPIRiT; intensities ``(L, H, W)`` or ``(B, L, H, W)``, over those without the object, minus 1. With
    `simulate` the files hold images, which are measured as the checkpoint's operator says and compared with what
    comes out; or all of k-space (HDF5, or ``kspace`` in NPZ), which is then undersampled.

    The denoiser knows images of the values it was trained on. So images are scaled as the run's were, and data that
    were measured such that the start (filtered back-projection; the coils' images combined) has the largest
    magnitude 1, or by the run's window; results are scaled back. A readout that is oversampled is cut to the field of
    view that the file's header tells. A real image gets a smooth random phase in MRI; what is written of it is the
    magnitude.

    Each result is written whole or not at all, and then noted in ``reconstructed.jsonl``; a run that was broken off
    goes on when it is called again. A file that fails is noted in ``failed.txt``, the others are done. An image's
    noise and mask depend on its file's name and its number there, not on other files; minibatches are drawn alike for
    each batch. So what else is reconstructed, and `batch`, make no difference beyond the solver's tolerance.

    Args:
        checkpoint: As ``best.pt`` in the folder of the run.
        inputs: Files, or folders, whose tree is mirrored; hidden files and those of other kinds are left out.
        output: Folder to write to.
        format: Of what is written; by default NPY for complex images, else TIFF. Slices of one file become one volume,
            or in DICOM and PNG numbered files. From DICOM to DICOM the header is carried over.
        part: Of complex images, to be written.
        simulate: Measure images.
        image_size: Rows and columns that sinograms or intensities are of; by default those of the images that the run
            was validated with.
        scale: In place of the run's: ``"slice"``, ``"none"`` or the window ``(low, high)``.
        array: Which array of NPZ and HDF5 files.
        maps: File of coil maps, ``(C, H, W)`` or ``(S, C, H, W)``, in place of ESPIRiT's.
        normalize: Divide intensities by their background, and subtract 1 (`normalize_background`).
        tolerance: Of the solver, in place of the run's.
        max_iterations: The same.
        minibatch: Blocks a step, in place of the run's; 0 for all.
        batch: Images of equal shape that are solved for together.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``...
        denoiser: Where `Trainer` was given a module: one of the same architecture; see `load_model`.
        threads: Of the CPU; None for torch's default.
        workers: Threads that read ahead.
        overwrite: Do again what is done, and replace what another checkpoint or other settings made.
        progress: Whether to show a live line.

    Returns:
        What became of the files.

    Raises:
        CheckpointError: For a damaged checkpoint.
        ConfigurationError: For one of another architecture, or settings of the solver that do not go together.
        InputError: For files that are missing, or none that can be reconstructed; for a folder that holds what
            another checkpoint or other settings made; a format that cannot hold the images.
        OSError: Where the output folder cannot be written.
        RunError: Where nothing more can be written, as to a full disk; what was written stays.

    Example:
        >>> import tempfile
        >>> from oder_fast.training import Trainer, read_configuration
        >>> folder = Path(tempfile.mkdtemp())
        >>> configuration = read_configuration({
        ...     "operator": {"kind": "ct", "angles": 8}, "output": str(folder / "run"),
        ...     "data": {"phantoms": {"kind": "ellipses", "n": 2, "size": 16}, "workers": 0},
        ...     "denoiser": {"kind": "dncnn", "options": {"depth": 3, "width": 4}},
        ...     "pretraining": {"steps": 2}, "training": {"steps": 1}})
        >>> outcome = Trainer(configuration, progress=False).fit()
        >>> np.save(folder / "scan.npy", np.ones((8, 23), np.float32))
        >>> report = reconstruct_files(outcome.last, folder / "scan.npy", folder / "images", progress=False)
        >>> report.done, (folder / "images" / "scan.tif").exists()
        (['scan.npy'], True)
    """
    for name, value in (("batch", batch), ("workers", workers), ("threads", threads)):
        if value is not None and value < 1:
            raise InputError(f"{name}: must be at least 1, got {value}")
    given = [inputs] if isinstance(inputs, str | os.PathLike) else list(inputs)
    run = _Run(
        Path(checkpoint),
        _Choices(format, part, simulate, image_size, scale, array, maps, normalize),
        {"tolerance": tolerance, "max_iterations": max_iterations, "minibatch_size": minibatch},
        device,
        denoiser,
    )
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        return run.reconstruct(
            [Path(path) for path in given], Path(output), batch, workers, overwrite, progress
        )
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class _Choices:
    """Settings that change what is written, besides those of the solver; see `reconstruct_files`."""

    format: Format | None
    part: Part | None
    simulate: bool
    image_size: tuple[int, int] | None
    scale: Scale | None
    array: str | None
    maps: str | Path | None
    normalize: bool

    def __post_init__(self) -> None:
        for name, kind in (("format", Format), ("part", Part)):
            value = getattr(self, name)
            if value is not None and value not in get_args(kind):
                raise InputError(f"{name}: must be one of {', '.join(get_args(kind))}, got {value!r}")
        if self.image_size is not None and (len(self.image_size) != 2 or min(self.image_size) < 1):
            raise InputError(f"image_size: must be rows and columns, at least 1, got {self.image_size}")
        if isinstance(self.scale, str) or self.scale is None:
            if self.scale not in (None, "slice", "none"):
                raise InputError(f"scale: must be slice, none or a window, got {self.scale!r}")
        elif not -math.inf < self.scale[0] < self.scale[1] < math.inf:
            raise InputError(f"scale: a window must be (low, high) with low < high, got {self.scale}")


class _Run(Task):
    """A checkpoint and how it is used."""

    def __init__(
        self,
        checkpoint: Path,
        choices: _Choices,
        solver: Mapping[str, float | None],
        device: str,
        denoiser: nn.Module | None,
    ) -> None:
        self.device = pick_device(device)
        self.model, self.scan, configuration, state = load_model(checkpoint, denoiser)
        self.model.to(self.device)
        self.configuration, self.choices = configuration, choices
        self.halvings = int(state.get("position", {}).get("halvings", 0))
        self._override(solver)
        shape = tuple(state["image_shape"])
        self.image_shape: tuple[int, ...] = (*shape[:-2], *(choices.image_size or shape[-2:]))
        self.digest = digest_of(checkpoint)
        self.mri, self.idt = isinstance(self.scan, MRIScan), isinstance(self.scan, IDTScan)
        scale: Scale = configuration.data.scale if choices.scale is None else choices.scale
        self.scale: Scale = "none" if self.idt else scale
        self.array = choices.array or configuration.data.array
        self.maps = self._read_maps()
        for name, value, wanted in (
            ("normalize", choices.normalize, self.idt and not choices.simulate),
            ("maps", choices.maps, self.mri),
            ("image_size", choices.image_size, not self.mri and not choices.simulate),
        ):
            if value and not wanted:
                kind = {"normalize": "intensities", "maps": "k-space", "image_size": "sinograms"}[name]
                raise InputError(f"{name}: is for {kind} that were measured")

    def _override(self, solver: Mapping[str, float | None]) -> None:
        section = self.model.section
        update = {name: value for name, value in solver.items() if value is not None}
        if update.get("minibatch_size") == 0:
            update["minibatch_size"] = None  # type: ignore[assignment]
        try:
            section = settings.RED.model_validate(section.model_dump() | update)
        except ValidationError as error:
            raise ConfigurationError(f"red: {explain(error)}") from error
        if section.solver == "anderson" and section.minibatch_size is not None:
            raise ConfigurationError("minibatch: the run's solver, anderson, takes no minibatches")
        self.model.section = section

    def _read_maps(self) -> Tensor | None:
        if self.choices.maps is None:
            return None
        maps = read_array(self.choices.maps)
        if maps.ndim not in (3, 4) or not maps.is_complex():
            raise InputError(
                f"{self.choices.maps}: coil maps must be complex, (C, H, W) or (S, C, H, W), got {maps.dtype} of shape "
                f"{tuple(maps.shape)}"
            )
        if not bool((_norms(maps) > 0).all()):
            raise InputError(f"{self.choices.maps}: its coil maps are zero everywhere")
        return maps

    def _maps_norm(self, k: int) -> float:
        """Return the norm of the coil maps given for a slice, which the model sees at norm 1."""
        if self.maps is None:
            return 1.0
        return float(_norms(self.maps[k] if self.maps.ndim == 4 else self.maps))

    def settings(self) -> dict[str, Any]:
        """Return what results depend on besides the checkpoint."""
        chosen = asdict(self.choices)
        if self.choices.maps is not None:
            chosen["maps"] = digest_of(Path(self.choices.maps))
        red = self.model.section
        chosen |= {"scale": self.scale, "image_size": self.image_shape[-2:], "array": self.array}
        solver = {
            "tolerance": red.tolerance,
            "max_iterations": red.max_iterations,
            "minibatch": red.minibatch_size,
        }
        plain: dict[str, Any] = json.loads(json.dumps(chosen | solver))
        return plain

    # -------------------------------------------------------------- before anything long starts

    def reconstruct(
        self, inputs: list[Path], output: Path, batch: int, workers: int, overwrite: bool, progress: bool
    ) -> Report:
        """Do it all."""
        found = find_files(inputs, output)
        jobs, failed = self._plan(found)
        name_outputs(jobs)
        taken: dict[str, Job] = {}
        for job in jobs:
            self._check_output(job, output, taken)
        output.mkdir(parents=True, exist_ok=True)
        if failed and progress:
            print(
                f"oder-fast: {len(failed)} of {len(found)} files cannot be reconstructed; the end tells why",
                file=sys.stderr,
            )
        with Ledger(output, self.digest, self.settings(), overwrite) as ledger:
            skipped, left = list[Job](), list[Job]()
            for job in jobs:
                (skipped if ledger.is_finished(job) else left).append(job)
            work = Pipeline(self, ledger, output, batch, workers, progress)
            names = [job.name for job in jobs]
            try:
                work.run(left)
            except BaseException:
                # What stopped the run may stop these, too.
                with suppress(OSError):
                    ledger.write_quality(names)
                raise
            failed |= {job.name: job.failed for job in left if job.failed is not None}
            _write_failed(output / FAILED, failed)
            quality = ledger.write_quality(names)
        done = [job for job in left if job.failed is None]
        unsettled = [job.name for job in done if not job.converged]
        return Report([j.name for j in done], [j.name for j in skipped], failed, unsettled, quality)

    def _plan(self, found: list[Found]) -> tuple[list[Job], dict[str, str]]:
        """Look at the headers of all files; return the jobs, those of equal shape side by side, and what fails."""
        jobs, failed = [], {}
        fits: dict[tuple[int, ...], str | None] = {}
        for path, name, named in found:
            try:
                job = self._inspect(path, name)
                shape = job.image_shape
                if shape not in fits:
                    fits[shape] = self._try(shape)
                if fits[shape] is not None:
                    raise ValueError(f"{path}: {fits[shape]}")
            except Exception as error:
                # Such as the index of a DICOM medium.
                if named or not isinstance(error.__cause__, NoImageError):
                    failed[name] = reason_of(error, path)
                continue
            jobs.append(job)
        if not jobs:
            listed = "".join(f"\n  {name}: {reason}" for name, reason in [*failed.items()][:10])
            more = f"\n  and {len(failed) - 10} more" if len(failed) > 10 else ""
            raise InputError(f"none of {len(found)} files can be reconstructed:{listed}{more}")
        return sorted(jobs, key=lambda job: job.shape), failed

    def _try(self, shape: tuple[int, ...]) -> str | None:
        """Return why images of this shape cannot be reconstructed, or None."""
        try:
            self.scan.check(shape, self.scan.is_complex)
            operator = self.scan.operator(shape)
            size = self.model.section.minibatch_size
            if size is not None and size > operator.n_blocks and not self.mri:
                return f"minibatch: must be at most the {operator.n_blocks} blocks, got {size}"
            kind = torch.complex64 if self.scan.is_complex else torch.float32
            channels = as_channels(torch.zeros(1, *shape, dtype=kind, device=self.device))
            with torch.no_grad(), self._autocast():
                denoised = self.model.denoiser(channels)
        except (ValueError, TypeError, RuntimeError) as error:
            return f"images of shape {shape} do not fit the model: {str(error).splitlines()[0]}"
        if denoised.shape != channels.shape:
            return f"the denoiser returns {tuple(denoised.shape[1:])} for images of shape {shape}"
        return None

    def _inspect(self, path: Path, name: str) -> Job:
        """Look at a file's header."""
        if self.choices.simulate and not self._is_kspace(path):
            return self._inspect_image(path, name)
        hint = "it holds images; give --simulate (simulate=True) to measure and reconstruct them"
        if is_picture(path):
            raise ValueError(f"{path}: {hint}")
        if self.mri:
            return self._inspect_kspace(path, name)
        shape, is_complex = self._layout(path)
        wanted = self._data_shape(path)
        axes = "(V, D)" if not self.idt else "(L, H, W)"
        if is_complex or shape[-len(wanted) :] != wanted or len(shape) - len(wanted) not in (0, 1):
            image = self.image_shape[-2:]
            looks = f" (or {hint})" if shape[-2:] == image and not self.idt else ""
            raise ValueError(
                f"{path}: measurements must be {axes} = {wanted} or several of them, for images of {image[0]} by "
                f"{image[1]}, got {'complex ' if is_complex else ''}{shape}; the run's "
                f"geometry is fixed, so train with this scan's, or give another image size (--image-size){looks}"
            )
        count = shape[0] if len(shape) > len(wanted) else 1
        return Job(path, name, count, wanted, self.image_shape, self.scan.is_complex, False)

    def _is_kspace(self, path: Path) -> bool:
        """Tell whether a file to be measured holds all of k-space, which is then undersampled, and not images."""
        if not self.mri or is_hdf5(path):
            return self.mri
        if path.suffix.lower() != ".npz" or self.array not in (None, "kspace"):
            return False
        with naming(path), np.load(path, allow_pickle=False) as archive:
            return "kspace" in archive.files

    def _data_shape(self, path: Path) -> tuple[int, ...]:
        try:
            shape: tuple[int, ...] = self.scan.operator(self.image_shape).data_shape
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return shape

    def _inspect_kspace(self, path: Path, name: str) -> Job:
        with naming(path):
            kind, (slices, coils, height, width), metadata = read_kspace_header(path, array=self._array(path))
            if self.maps is not None and self.maps.shape[-3] != coils:
                raise ValueError(
                    f"it has {coils} coils, and {self.choices.maps} maps of {self.maps.shape[-3]}"
                )
        image = (round(height / _oversampling(metadata)), width)
        return Job(path, name, slices, (coils, height, width), image, True, kind != "NPZ", True)

    def _inspect_image(self, path: Path, name: str) -> Job:
        if self.maps is not None:
            raise ValueError(f"{path}: it holds images, and coil maps are for k-space")
        images = self._images(path)
        shape = images.shapes[0]
        if len(images) > 1 and self.choices.format == "dicom" and format_of(path) == "DICOM":
            raise ValueError(
                f"{path}: of a DICOM file of several frames no header can be carried over; take nifti or tiff"
            )
        is_complex = self.idt or self._holds_complex(path)
        if is_complex and not self.scan.is_complex:
            raise ValueError(f"{path}: its images are complex, and this model's are real")
        return Job(path, name, len(images), shape, shape, is_complex, True)

    def _images(self, path: Path) -> ImageFolder:
        return ImageFolder([path], scale="none", array=self._array(path), volumes=self.idt)

    def _holds_complex(self, path: Path) -> bool:
        if path.name.lower().endswith(NIFTI_SUFFIXES):
            import nibabel

            with naming(path):
                return bool(np.dtype(nibabel.load(path).get_data_dtype()).kind == "c")
        return format_of(path) not in ("DICOM", "PNG") and self._layout(path)[1]

    def _array(self, path: Path) -> str | None:
        """Return the name of the array to be read, of files that have names."""
        named = path.suffix.lower() == ".npz" or (not self.mri and is_hdf5(path))
        return self.array.strip("/") if named and self.array is not None else None

    def _layout(self, path: Path) -> tuple[tuple[int, ...], bool]:
        with naming(path):
            return _stored(path, self._array(path))

    def _check_output(self, job: Job, output: Path, taken: dict[str, Job]) -> None:
        kind, part = self._format(job), self.choices.part
        if job.complex and part is None and kind not in HOLD_COMPLEX:
            raise InputError(
                f"format: {kind} cannot hold the complex images of {job.name}; say which part (--part magnitude), or "
                f"take {', '.join(HOLD_COMPLEX)}"
            )
        if not job.complex and part is not None and part != "magnitude":
            raise InputError(f"part: the images of {job.name} are real, they have no {part} part")
        for name in self._outputs(job):
            path = output / name
            if path.exists() and path.samefile(job.path):
                raise InputError(
                    f"{output}: would overwrite the input {job.path}; choose another output folder"
                )
            other = taken.setdefault(name, job)
            if other is not job:
                raise InputError(
                    f"{other.path} and {job.path} would be written to the same name, {name}; reconstruct them to two "
                    "folders"
                )

    def _outputs(self, job: Job) -> list[str]:
        """Return the names of what is written of a file: one volume, or numbered files."""
        suffix = SUFFIXES[self._format(job)]
        *depth, _, _ = job.image_shape
        count = job.count * math.prod(depth)
        if suffix in HOLD_VOLUMES:
            count = job.count if depth else 1
        if count == 1:
            return [f"{job.base}{suffix}"]
        digits = max(4, len(str(count - 1)))
        return [f"{job.base}-{k:0{digits}d}{suffix}" for k in range(count)]

    def _format(self, job: Job) -> Format:
        return self.choices.format or ("npy" if job.complex and self.choices.part is None else "tiff")

    # -------------------------------------------------------------- reading (in threads)

    def read(self, job: Job, chunk: slice | None) -> list[Item]:
        """Read some images of a file, or all of them."""
        if self.mri and job.is_kspace:
            return self._read_kspace(job, chunk)
        if self.choices.simulate:
            return self._read_images(job, chunk)
        values = read_array(job.path, self._array(job.path))
        data = values.reshape(-1, *job.shape)
        if self.choices.normalize:
            with naming(job.path):
                data = normalize_background(data)
        return [Item(job, k, data=one) for k, one in enumerate(data)]

    def _read_images(self, job: Job, chunk: slice | None) -> list[Item]:
        assert chunk is not None
        images, items = self._images(job.path), []
        for k in range(chunk.start, chunk.stop):
            sample = images[k]
            image, low, span = _scaled(sample.image, self.scale)
            seed = seed_of(self.configuration.seed, "reconstruction", job.name, k)
            generator = torch.Generator().manual_seed(seed_of(seed, "phase"))
            sample = self.scan.prepare(sample._replace(image=image), generator)
            if self.idt:
                span *= self.configuration.operator.contrast_unit  # type: ignore[union-attr]
            items.append(Item(job, k, sample=sample, low=low, span=span, seed=seed))
        return items

    def _read_kspace(self, job: Job, chunk: slice | None) -> list[Item]:
        kspace, masks, metadata = read_kspace(job.path, chunk, array=self._array(job.path))
        first = 0 if chunk is None else chunk.start
        job.voxel_size = metadata.get("voxel_size")
        items = []
        for k, y in enumerate(kspace, first):
            mask = _sampled(y) if masks is None else masks[k - first]
            if not bool(mask.any()):
                # An empty slice at an end of the volume.
                nothing = torch.zeros(len(y), job.image_shape[-2], y.shape[-1], dtype=y.dtype)
                items.append(Item(job, k, data=nothing, maps=nothing, mask=mask[: nothing.shape[-2]]))
                continue
            y, factor = y * mask, _oversampling(metadata)
            if factor > 1:
                if not bool((mask == mask[:1]).all()):
                    raise ValueError(
                        f"{job.path}: slice {k}: its readout is oversampled and not sampled fully: it cannot be cut to "
                        "the field of view"
                    )
                y = remove_oversampling(y, -2, factor)
                mask = mask[: y.shape[-2]]
            maps = self._maps_of(job, k, y, mask)
            if self.choices.simulate:
                item = self._reference(job, k, y, maps, mask)
            else:
                item = Item(job, k, data=y, maps=maps, mask=mask)
            items.append(item._replace(span=item.span / self._maps_norm(k)))
        return items

    def _reference(self, job: Job, k: int, y: Tensor, maps: Tensor, mask: Tensor) -> Item:
        """Return an image and all its k-space, to be undersampled."""
        lines = mask.any(0).nonzero()[:, 0]
        # Files leave out lines at the ends.
        missing = int((~mask[:, int(lines[0]) : int(lines[-1]) + 1]).sum())
        if missing:
            raise ValueError(
                f"{job.path}: slice {k}: {missing} of its samples are missing: it cannot be measured anew; without "
                "--simulate it is reconstructed as it is"
            )
        everything = CartesianMRI(maps, torch.ones(y.shape[-1], dtype=torch.bool))
        image = everything.adjoint(y[None])[0]
        largest = float(image.abs().max()) or 1.0
        sample = Sample(f"{job.name}[{k}]", image / largest, y / largest, maps)
        seed = seed_of(self.configuration.seed, "reconstruction", job.name, k)
        return Item(job, k, sample=sample, span=largest, seed=seed)

    def _maps_of(self, job: Job, k: int, y: Tensor, mask: Tensor) -> Tensor:
        if self.maps is not None:
            if self.maps.ndim == 4 and k >= len(self.maps):
                raise ValueError(
                    f"{job.path}: slice {k} has no coil maps, {self.choices.maps} is of {len(self.maps)} slices"
                )
            maps = self.maps[k] if self.maps.ndim == 4 else self.maps
            if maps.shape != y.shape:
                raise ValueError(
                    f"{job.path}: coil maps must have the shape of its k-space, {tuple(y.shape)}, got "
                    f"{tuple(maps.shape)} in {self.choices.maps}"
                )
            return maps / self._maps_norm(k)
        if len(y) == 1:
            return torch.ones_like(y)
        try:
            return espirit_maps(y, mask)
        except ValueError as error:
            raise ValueError(f"{job.path}: slice {k}: {error}; or give coil maps (--maps)") from error

    # -------------------------------------------------------------- solving

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.configuration.training.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def solve(self, items: Sequence[Item]) -> list[Solved]:
        """Reconstruct images of equal shape; the results in the unit of their files."""
        full = [item for item in items if not item.is_empty]
        solved = iter(self._solve(full) if full else [])
        return [self._nothing(item) if item.is_empty else next(solved) for item in items]

    def _nothing(self, item: Item) -> Solved:
        """Return what becomes of an image or data that are 0 everywhere."""
        shape = item.job.image_shape if item.sample is None else tuple(item.sample.image.shape)
        image = torch.full(shape, item.low, dtype=torch.complex64 if item.job.complex else torch.float32)
        return Solved(image, True, [math.nan] * len(MEASURES) if self.choices.simulate else None)

    def _solve(self, items: Sequence[Item]) -> list[Solved]:
        measured, low, span = self._measure(items)
        # Drawn afresh for each batch: an image sees the same minibatches whatever else is in it.
        minibatches = torch.Generator().manual_seed(seed_of(self.configuration.seed, "reconstruction"))
        with torch.no_grad():
            with self._autocast():
                solution = self.model(measured.operator, measured.data, minibatches, self.halvings)
            start = measured.operator.initial(measured.data) if self.choices.simulate else None
        images = solution.value.cpu()
        if not bool(torch.isfinite(torch.view_as_real(images) if images.is_complex() else images).all()):
            raise RuntimeError("the reconstruction is not finite")
        results = []
        for k, item in enumerate(items):
            quality = None
            if start is not None and item.sample is not None:
                quality = self._compare(item.sample.image, images[k], start[k].cpu())
            image = images[k]
            # Of a real image's phase nothing is known.
            image = image.abs() if image.is_complex() and not item.job.complex else image
            image = image * span[k] + low[k] if low[k] else image * span[k]
            results.append(Solved(image, bool(solution.converged[k]), quality))
        return results

    def _measure(self, items: Sequence[Item]) -> tuple[Measured, list[float], list[float]]:
        """Return the data in the unit of the model, and value and span of the files' that it sees as 0 and as 1."""
        low, span = [item.low for item in items], [item.span for item in items]
        samples = [item.sample for item in items if item.sample is not None]
        if samples:
            generators = [torch.Generator().manual_seed(item.seed) for item in items]
            batch = collate(samples)
            kspace, maps = (None if t is None else t.to(self.device) for t in (batch.kspace, batch.maps))
            batch = Batch(batch.names, batch.image.to(self.device), kspace, maps)
            with torch.no_grad():
                return self.scan.measure(batch, generators), low, span
        data = torch.stack([item.data for item in items if item.data is not None]).to(self.device)
        operator: Any
        if self.mri:
            coil_maps = torch.stack([item.maps for item in items if item.maps is not None])
            masks = torch.stack([item.mask for item in items if item.mask is not None])
            operator = CartesianMRI(coil_maps.to(self.device), masks.to(self.device))
        else:
            operator = self.scan.operator(self.image_shape).to(self.device)
        if self.idt:
            unit: float = self.configuration.operator.contrast_unit  # type: ignore[union-attr]
            return Measured(operator, data), low, [unit] * len(items)
        if isinstance(self.scale, tuple) and not self.mri:
            bottom, top = self.scale
            if bottom:
                data = data - bottom * operator(torch.ones(1, *self.image_shape, device=self.device))
            return (
                Measured(operator, data / (top - bottom)),
                [bottom] * len(items),
                [top - bottom] * len(items),
            )
        if self.scale != "none":
            with torch.no_grad():
                largest = operator.initial(data).abs().flatten(1).amax(1)
            largest = torch.where(largest > 0, largest, 1)
            data = data / largest.reshape(-1, *(1,) * (data.ndim - 1))
            span = [s * n for s, n in zip(span, largest.tolist(), strict=True)]
        return Measured(operator, data), low, span

    def _compare(self, truth: Tensor, image: Tensor, start: Tensor) -> list[float]:
        truth, image, start = (self.scan.show(values) for values in (truth, image, start))
        span = float(truth.max() - truth.min())
        if span == 0:
            return [math.nan] * len(MEASURES)
        values = []
        for one in (image, start):
            slices = zip(one.reshape(-1, *one.shape[-2:]), truth.reshape(-1, *truth.shape[-2:]), strict=True)
            # The window of structural similarity is 7 pixels wide.
            similar = [ssim(a, b, span) for a, b in slices] if min(truth.shape[-2:]) >= 7 else [math.nan]
            values += [psnr(one, truth), sum(similar) / len(similar)]
        return values

    def write(self, job: Job, output: Path) -> list[str]:
        """Write what was reconstructed of a file; return the names of what was written."""
        kind = self._format(job)
        suffix = SUFFIXES[kind]
        images = [job.images[k] for k in range(job.count)]
        if self.choices.part is not None:
            images = [_part(self.choices.part, image) for image in images]
        if len(images) > 1 and images[0].ndim == 2 and suffix in HOLD_VOLUMES:
            images = [torch.stack(images)]
        elif images[0].ndim == 3 and suffix not in HOLD_VOLUMES:
            images = [one for volume in images for one in volume]
        names = self._outputs(job)
        like = self._like(job)
        window = None
        if kind == "png" and len(images) > 1:
            low, high = min(float(i.min()) for i in images), max(float(i.max()) for i in images)
            window = (low, high) if low < high else None
        (output / job.base).parent.mkdir(parents=True, exist_ok=True)
        for name, image in zip(names, images, strict=True):
            # A run that was broken off and goes on adds to the series that it began.
            write_image(
                output / name, image, like, voxel_size=job.voxel_size, window=window, run=self._series(output)
            )
        return names

    def _series(self, output: Path) -> str:
        return json.dumps([self.digest, self.settings(), str(output.resolve())], sort_keys=True)

    def _like(self, job: Job) -> Path | None:
        """Return the file whose header is carried over; of k-space the voxel size was read along."""
        is_image = self.choices.simulate and not job.is_kspace and not self.idt
        return job.path if is_image and is_picture(job.path) else None


def _norms(maps: Tensor) -> Tensor:
    """Return the largest norm over the coils of maps ``(..., C, H, W)``."""
    norms: Tensor = maps.abs().square().sum(-3).flatten(-2).amax(-1).sqrt()
    return norms


def _part(part: Part, image: Tensor) -> Tensor:
    if image.is_complex():
        return PARTS[part](image)
    # The magnitude of a real image would lose its sign, and it has no other part.
    return (
        image if part in ("magnitude", "real") else PARTS[part](torch.complex(image, torch.zeros_like(image)))
    )


def _stored(path: Path, array: str | None) -> tuple[tuple[int, ...], bool]:
    """Return the shape of the array that `read_array` reads, and whether it is complex, without reading it."""
    if is_hdf5(path):
        import h5py

        with h5py.File(path, "r") as file:
            names: list[str] = []
            file.visititems(lambda name, node: names.append(name) if isinstance(node, h5py.Dataset) else None)
            dataset = file[npz_name(names, array)]
            shape = tuple(dataset.shape)
            is_complex = dataset.dtype.kind == "c" or dataset.dtype.names == ("real", "imag")
            return (shape[::-1] if "MATLAB_class" in dataset.attrs else shape), is_complex
    kind = format_of(path)
    if kind == "NPY":
        values = map_npy(path)
        return values.shape, values.dtype.kind == "c"
    if kind == "NPZ":
        shape, dtype = npz_layout(path, lambda names: npz_name(names, array))
        return shape, dtype.kind == "c"
    if kind == "TIFF":
        import tifffile

        with tifffile.TiffFile(path) as tiff:
            return tuple(tiff.series[0].shape), np.dtype(tiff.series[0].dtype).kind == "c"
    raise ValueError(f"a {kind} file, which holds images and no measurements")


def _scaled(image: Tensor, scale: Scale) -> tuple[Tensor, float, float]:
    """Return an image as `ImageFolder` scales it, and the values that became 0 and 1, as that and their difference."""
    if scale == "none":
        return image, 0.0, 1.0
    if image.is_complex():
        largest = float(image.abs().amax()) or 1.0
        return image / largest, 0.0, largest
    low, high = torch.aminmax(image) if isinstance(scale, str) else scale
    low, high = float(low), float(high)
    span = high - low or 1.0
    return ((image - low) / span).clamp(0, 1), low, span


def _sampled(kspace: Tensor) -> Tensor:
    """Return which samples ``(H, W)`` of k-space ``(C, H, W)`` were measured: what is not 0, lines as a whole."""
    points = (kspace != 0).any(0)
    for axis in (0, 1):
        lines = points.any(axis, keepdim=True).expand_as(points)
        if bool(lines.any()) and float(points[lines].float().mean()) >= FULL:
            return lines
    return points


def _oversampling(metadata: Mapping[str, Any]) -> float:
    """Return how much longer the field of view is along the readout than that of the image."""
    encoded, wanted = (metadata.get(f"{space}_fov") for space in ("encoded", "recon"))
    return encoded[0] / wanted[0] if encoded and wanted and encoded[0] > wanted[0] > 0 else 1.0


def _write_failed(path: Path, failed: Mapping[str, str]) -> None:
    if not failed:
        path.unlink(missing_ok=True)
        return
    with atomic(path) as temporary:
        temporary.write_text("".join(f"{name}\t{reason}\n" for name, reason in failed.items()))
