"""Reconstruct many files by a checkpoint: in batches, and again from where a run was broken off."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from ..data import atomic, collate, psnr, ssim, write_image
from ..data.datasets import Scale
from ..data.dicom import NoImageError
from ..data.files import first_bad
from ..data.writers import HOLD_VOLUMES
from ..denoisers.call import as_channels
from ..training import configuration as settings
from ..training.configuration import ConfigurationError, explain
from ..training.draws import seed_of
from ..training.model import autocast, load_model, make_model, solve
from ..training.processes import pick_device
from ..training.scans import Measured
from .jobs import (
    Choices,
    Format,
    Found,
    InputError,
    Item,
    Job,
    Part,
    Solved,
    escaped,
    find_files,
    is_picture,
    name_outputs,
    reason_of,
)
from .ledger import MEASURES, Ledger, digest_of
from .pipeline import Pipeline, Task
from .reader import Reader

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
FAILED = "failed.txt"

MOST = 1024
"""Images solved together, threads."""


@dataclass(frozen=True)
class Report:
    """What became of the files.

    Attributes:
        done: Names of files that were reconstructed, below the folders given.
        skipped: Of those that an earlier run had finished.
        failed: Of those that could not be, with the reasons.
        not_converged: Of those of `done` with an image that is not within the tolerance.
        notes: What is to be known of files that were done now: how many of their images had no signal, what was left
            out of them.
        quality: With `simulate` the mean ``psnr``, ``ssim``, ``psnr_start`` and ``ssim_start`` over all files.
    """

    done: list[str]
    skipped: list[str]
    failed: dict[str, str]
    not_converged: list[str]
    notes: dict[str, str]
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
    select: Mapping[str, int] | None = None,
    maps: str | Path | None = None,
    normalize: bool = False,
    tolerance: float | None = None,
    max_iterations: int | None = None,
    minibatch: int | None = None,
    batch: int = 4,
    device: str = "auto",
    denoiser: nn.Module | str | None = None,
    threads: int | None = None,
    workers: int = 2,
    overwrite: bool = False,
    progress: bool = True,
) -> Report:
    r"""Reconstruct files by a checkpoint of `Trainer`.

    What is measured is told by the checkpoint's operator: sinograms ``(V, D)`` or ``(B, V, D)`` in NPY, NPZ, TIFF,
    HDF5 or MATLAB; scans as `read_projections` takes them (DataExchange), each row of the detector an image, with
    the angles of the file and the axis that is found, in place of the run's geometry; k-space as `read_kspace`
    takes it, each slice an image, with the mask of the file or else what is not 0, and coil maps by ESPIRiT;
    intensities ``(L, H, W)`` or ``(B, L, H, W)``, over those without the object, minus 1, or a folder of an image
    for each LED (`read_led_stack`), by row and column in the order of illuminations. With `simulate` the files hold
    images, which are measured as the checkpoint's operator says and compared with what comes out; or all of k-space
    (HDF5, or ``kspace`` in NPZ), which is then undersampled.

    The denoiser knows images of the values it was trained on. So images are scaled as the run's were, and data that
    were measured such that the start (filtered back-projection; the coils' images combined) has the largest
    magnitude 1, or by the run's window; results are scaled back. A readout that is oversampled is cut to the field of
    view that the file's header tells. A real image gets a smooth random phase in MRI; what is written of it is the
    magnitude.

    Each result is written whole or not at all, and then noted in ``reconstructed.jsonl``; a run that was broken off
    goes on when it is called again, and does again what was damaged since. A file that fails is noted in
    ``failed.txt``, a line with its name and the reason; the others are done. Slices without signal become zeros, and
    the report's notes count them. In ``failed.txt`` and ``quality.csv`` names are
    written with the escapes of Python where they hold more than printed characters: ``\n``, ``\\``, ``\udce9`` for the
    byte E9. An image's noise and mask depend on its file's name and its number there, not on other files; minibatches
    are drawn alike for each batch. So what else is reconstructed, and `batch`, make no difference beyond the solver's
    tolerance.

    Args:
        checkpoint: As ``best.pt`` in the folder of the run.
        inputs: Files, or folders, whose tree is mirrored; hidden files and those of other kinds are left out.
        output: Folder to write to.
        format: Of what is written; by default NPY for complex images, else TIFF. Slices of one file become one volume,
            or in DICOM and PNG numbered files. From DICOM to DICOM the header is carried over.
        part: Of complex images, to be written.
        simulate: Measure images.
        image_size: Rows and columns that sinograms or intensities are of; by default those of the images that the run
            was validated with, of DataExchange scans the number of bins.
        scale: In place of the run's: ``"slice"``, ``"none"`` or the window ``(low, high)``.
        array: Which array of NPZ, HDF5 and MATLAB files.
        select: Counters of the acquisitions of ISMRMRD files, as ``{"contrast": 1}``, in place of the run's (see
            `read_kspace`). Of several contrasts, phases or sets each is reconstructed where none is selected.
        maps: File of coil maps, ``(C, H, W)`` or ``(S, C, H, W)``, in place of ESPIRiT's.
        normalize: Divide intensities by their background, and subtract 1 (`normalize_background`).
        tolerance: Of the solver, in place of the run's.
        max_iterations: The same.
        minibatch: Blocks a step, in place of the run's; 0 for all.
        batch: Images of equal shape that are solved for together.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``...
        denoiser: Where the denoiser is not of this package: its class ``"module:Name"``, or a module; see `load_model`.
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
        >>> import numpy as np
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
        if value is not None and not 1 <= value <= MOST:
            raise InputError(f"{name}: must be at least 1 and at most {MOST}, got {value}")
    given = [inputs] if isinstance(inputs, str | os.PathLike) else list(inputs)
    if "" in (output, *given):
        raise InputError("inputs, output: must be names of files and folders, got ''")
    run = _Run(
        Path(checkpoint),
        Choices(format, part, simulate, image_size, scale, array, select, maps, normalize),
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


class _Run(Task):
    """A checkpoint and how it is used."""

    def __init__(
        self,
        checkpoint: Path,
        choices: Choices,
        solver: Mapping[str, float | None],
        device: str,
        denoiser: nn.Module | str | None,
    ) -> None:
        self.device = pick_device(device)
        self.model, self.scan, configuration, state = load_model(checkpoint, denoiser)
        self.configuration, self.choices = configuration, choices
        self._override(solver)
        shape = tuple(state["image_shape"])
        self.image_shape: tuple[int, ...] = (*shape[:-2], *(choices.image_size or shape[-2:]))
        self.digest = digest_of(checkpoint)
        self.reader = Reader(self.scan, configuration, choices, self.image_shape)

    def _override(self, solver: Mapping[str, float | None]) -> None:
        section = self.configuration.red
        update = {name: value for name, value in solver.items() if value is not None}
        if update.get("minibatch_size") == 0:
            update["minibatch_size"] = None  # type: ignore[assignment]
        try:
            section = settings.RED.model_validate(section.model_dump() | update)
        except ValidationError as error:
            raise ConfigurationError(f"red: {explain(error)}") from error
        denoiser = self.model.denoiser
        assert isinstance(denoiser, nn.Module)
        model = make_model(denoiser, section, self.scan.nonnegative).to(self.device).eval()
        model.load_state_dict(self.model.state_dict())
        self.model = model

    def settings(self) -> dict[str, Any]:
        """Return what results depend on besides the checkpoint."""
        chosen = asdict(self.choices)
        if self.choices.maps is not None:
            chosen["maps"] = digest_of(Path(self.choices.maps))
        chosen |= {
            "scale": self.reader.scale,
            "image_size": self.image_shape[-2:],
            "array": self.reader.array,
            "select": self.reader.select or None,
        }
        solver = {
            "tolerance": self.model.solver.tolerance,
            "max_iterations": self.model.solver.max_iterations,
            "minibatch": self.model.step.minibatch_size,
        }
        plain: dict[str, Any] = json.loads(json.dumps(chosen | solver))
        return plain

    # -------------------------------------------------------------- before anything long starts

    def reconstruct(
        self, inputs: list[Path], output: Path, batch: int, workers: int, overwrite: bool, progress: bool
    ) -> Report:
        """Do it all."""
        found = find_files(inputs, output, self.scan.is_intensity and not self.choices.simulate)
        jobs, failed = self._plan(found)
        name_outputs(jobs)
        taken: dict[str, Job] = {}
        fitting = []
        for job in jobs:
            try:
                self._check_output(job, output, taken)
            except OSError as error:
                # Such as a name that is longer than a file system takes.
                _note(failed, job.name, job.path, reason_of(error, job.path))
            else:
                fitting.append(job)
        jobs = fitting
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
                    self._list_failed(output, left, failed)
                    ledger.write_quality(names)
                raise
            self._list_failed(output, left, failed)
            if not failed:
                (output / FAILED).unlink(missing_ok=True)
            quality = ledger.write_quality(names)
        done = [job for job in left if job.failed is None]
        unsettled = [job.name for job in done if not job.converged]
        notes = {
            job.name: ", ".join(f"{count} {what}" for what, count in job.notes.items())
            for job in done
            if job.notes
        }
        return Report([j.name for j in done], [j.name for j in skipped], failed, unsettled, notes, quality)

    def _list_failed(self, output: Path, jobs: list[Job], failed: dict[str, str]) -> None:
        """Add the jobs that failed, and write the list: name and reason, each `escaped`, a line for each file."""
        for job in jobs:
            if job.failed is not None:
                _note(failed, job.name, job.path, job.failed)
        if failed:
            lines = [f"{escaped(name)}\t{escaped(reason)}\n" for name, reason in failed.items()]
            with atomic(output / FAILED) as temporary:
                temporary.write_text("".join(lines), encoding="utf-8")

    def _plan(self, found: list[Found]) -> tuple[list[Job], dict[str, str]]:
        """Look at the headers of all files; return the jobs, those of equal shape side by side, and what fails."""
        jobs, failed = list[Job](), dict[str, str]()
        fits: dict[tuple[int, ...], str | None] = {}
        for path, name, named in found:
            try:
                those = self.reader.inspect(path, name)
                for shape in {job.image_shape for job in those}:
                    if shape not in fits:
                        fits[shape] = self._try(shape)
                    if fits[shape] is not None:
                        raise ValueError(f"{path}: {fits[shape]}")
            except Exception as error:
                # Such as the index of a DICOM medium.
                if named or not isinstance(error.__cause__, NoImageError):
                    _note(failed, name, path, reason_of(error, path))
                continue
            jobs += those
        if not jobs:
            listed = "".join(
                f"\n  {escaped(name)}: {escaped(reason)}" for name, reason in [*failed.items()][:10]
            )
            more = f"\n  and {len(failed) - 10} more" if len(failed) > 10 else ""
            raise InputError(f"none of {len(found)} files can be reconstructed:{listed}{more}")
        return sorted(jobs, key=lambda job: job.shape), failed

    def _try(self, shape: tuple[int, ...]) -> str | None:
        """Return why images of this shape cannot be reconstructed, or None."""
        try:
            self.scan.check(shape, self.scan.is_complex)
            operator = self.scan.operator(shape)
            size = self.model.step.minibatch_size
            if size is not None and size > operator.n_blocks and not self.scan.is_kspace:
                return f"minibatch: must be at most the {operator.n_blocks} blocks, got {size}"
            kind = torch.complex64 if self.scan.is_complex else torch.float32
            channels = as_channels(torch.zeros(1, *shape, dtype=kind, device=self.device))
            with torch.no_grad(), autocast(self.configuration.training, self.device):
                denoised = self.model.denoiser(channels)
        except (ValueError, TypeError, RuntimeError) as error:
            return f"images of shape {shape} do not fit the model: {str(error).splitlines()[0]}"
        if denoised.shape != channels.shape:
            return f"the denoiser returns {tuple(denoised.shape[1:])} for images of shape {shape}"
        return None

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

    # -------------------------------------------------------------- reading, solving, writing

    def read(self, job: Job, chunk: slice | None) -> list[Item]:
        """Read some images of a file, or all of them (in threads)."""
        return self.reader.read(job, chunk)

    def solve(self, items: Sequence[Item]) -> list[Solved]:
        """Reconstruct images of equal shape; the results in the unit of their files."""
        full = [item for item in items if not item.is_empty]
        solved = iter(self._solve(full) if full else [])
        return [self._nothing(item) if item.is_empty else next(solved) for item in items]

    def _nothing(self, item: Item) -> Solved:
        """Return what becomes of an image or data that are 0 everywhere."""
        item.job.note(f"of {item.job.count} images without signal, which became {item.low:g}", 1)
        shape = item.job.image_shape if item.sample is None else tuple(item.sample.image.shape)
        image = torch.full(shape, item.low, dtype=torch.complex64 if item.job.complex else torch.float32)
        return Solved(image, True, [math.nan] * len(MEASURES) if self.choices.simulate else None, 0)

    def _solve(self, items: Sequence[Item]) -> list[Solved]:
        measured, low, span = self._measure(items)
        # Drawn afresh for each batch: an image sees the same minibatches whatever else is in it.
        minibatches = torch.Generator().manual_seed(seed_of(self.configuration.seed, "reconstruction"))
        with torch.no_grad():
            with autocast(self.configuration.training, self.device):
                solution = solve(self.model, measured, minibatches)
            start = measured.operator.initial(measured.data) if self.choices.simulate else None
        images = solution.value.cpu()
        if first_bad(images) is not None:
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
            calls = int(solution.iterations[k])
            results.append(Solved(image, bool(solution.converged[k]), quality, calls))
        return results

    def _measure(self, items: Sequence[Item]) -> tuple[Measured, list[float], list[float]]:
        """Return the data in the unit of the model, and value and span of the files' that it sees as 0 and as 1."""
        span = [item.span for item in items]
        samples = [item.sample for item in items if item.sample is not None]
        if samples:
            generators = [torch.Generator().manual_seed(item.seed) for item in items]
            with torch.no_grad():
                measured = self.scan.measure(collate(samples).to(self.device), generators)
            return measured, [item.low for item in items], span
        data, maps, masks = (
            [value.to(self.device) for value in values if value is not None]
            for values in zip(*((item.data, item.maps, item.mask) for item in items), strict=True)
        )
        operator, scale = items[0].job.operator, self.reader.scale
        if operator is None:
            operator = self.scan.operator_of(self.image_shape, maps, masks)
        elif self.choices.scale is None and scale != "none":
            # The run's window is in its unit, and the scan in one over the width of its bins.
            scale = "slice"
        measured = Measured(operator.to(self.device), torch.stack(data))
        measured, low, unit = self.scan.scaled(measured, scale)
        return measured, low, [s * u for s, u in zip(span, unit, strict=True)]

    def _compare(self, truth: Tensor, image: Tensor, start: Tensor) -> list[float]:
        truth, image, start = (self.scan.show(values) for values in (truth, image, start))
        if truth.min() == truth.max():
            return [math.nan] * len(MEASURES)
        values = []
        for one in (image, start):
            # The window of structural similarity is 7 pixels wide.
            similar = ssim(one, truth) if min(truth.shape[-2:]) >= 7 else math.nan
            values += [psnr(one, truth), similar]
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
        is_image = self.choices.simulate and not job.is_kspace and self.scan.axes == 2
        return job.path if is_image and is_picture(job.path) else None


def _part(part: Part, image: Tensor) -> Tensor:
    if image.is_complex():
        return PARTS[part](image)
    # The magnitude of a real image would lose its sign, and it has no other part.
    return (
        image if part in ("magnitude", "real") else PARTS[part](torch.complex(image, torch.zeros_like(image)))
    )


def _note(failed: dict[str, str], name: str, path: Path, reason: str) -> None:
    # Files of two folders may have one name.
    failed[str(path) if name in failed else name] = reason
