"""Few lines of the k-space of one slice, reconstructed by zero filling, RED and ODER."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data import (
    birdcage_maps,
    brain_like,
    espirit_maps,
    gaussian_lines,
    read_nifti,
    smooth_phase,
)
from ..denoisers import DnCNN
from ..operators import CartesianMRI
from . import common

SAMPLE = "s1045.ima.gz"
COILS = 8
# Lines sampled fully in the centre: 8 % of all at R = 4, 4 % at R = 8.
CENTER_TIMES_ACCELERATION = 0.32
PLAN = common.TrainingPlan(
    network={"depth": 5, "width": 32, "in_channels": 2, "bias": False},
    sigma=(0.0, 0.04),
    learning_rates=(2e-3, 4e-4),
)
# Weight of the prior at 30 dB, where |A| is 1; it follows the amplitude of the noise.
TAU = 0.01
# A coil sees a part of the image only: its minibatches need the full gradient more often than those of views.
CHECK_EVERY = 3


@dataclass(frozen=True)
class Settings(common.Settings):
    """What the user chose; see the command's help."""

    slice: int | None
    phantom: bool
    size: int
    acceleration: float
    estimate_maps: bool
    train: bool


@dataclass(frozen=True)
class Slice:
    """What is to be imaged.

    Attributes:
        image: Complex, magnitudes in [0, 1].
        stored: The magnitude as read, of full size, by which it would be known among the training images.
        name: What to call it.
    """

    image: Tensor
    stored: Tensor
    name: str


def run(settings: Settings) -> None:
    """Do it all; write the three files at the end.

    Raises:
        BadInputError: Before anything long starts.
        DivergenceError: Where a fixed point cannot be found.
    """
    minibatch = settings.minibatch or 1
    common.check_minibatch(minibatch, COILS, "coils")
    truth = _read_truth(settings)
    mask = _mask(truth.image.shape[1], settings.acceleration, settings.generator(3))
    kspace, sigma = _measure(settings, truth.image, mask)
    maps = _maps(settings, kspace, mask)
    with common.working(settings):
        result = _compute(settings, truth, kspace, mask, maps, minibatch, sigma)
        common.report(settings.output, result)


def _read_truth(settings: Settings) -> Slice:
    if settings.phantom:
        if settings.input is not None:
            raise common.BadInputError("--phantom and --input exclude each other")
        image = brain_like(1, settings.size, settings.generator(4))[0]
        return Slice(image / image.abs().max(), image.abs(), "a brain-like phantom")
    path = Path(SAMPLE) if settings.input is None else settings.input
    is_nifti = settings.input is not None and path.name.endswith((".nii", ".nii.gz"))
    if settings.slice is not None and not is_nifti:
        raise common.BadInputError(f"--slice is for NIfTI volumes, {path} is none")
    name = str(path)
    if settings.input is None:
        image, name = _sample(), f"a sagittal MR slice of a head, {SAMPLE} of matplotlib"
    elif is_nifti:
        image = _read_nifti(path, settings.slice)
    else:
        image = common.read_slice(path, settings.array)
    stored = common.scaled(image, path)
    image = common.scaled(_reduced(stored, settings.size), path)
    if not image.is_complex():
        phase = smooth_phase(1, (image.shape[0], image.shape[1]), settings.generator(4))[0]
        image = torch.polar(image, phase)
    return Slice(image, stored.abs(), name)


def _sample() -> Tensor:
    from matplotlib.cbook import get_sample_data

    sample: Any = get_sample_data(SAMPLE)
    with sample as file:
        return torch.from_numpy(np.frombuffer(file.read(), "<u2").reshape(256, 256).astype(np.float32))


def _read_nifti(path: Path, number: int | None) -> Tensor:
    """Return an image, or one slice of a volume: the middle one by default."""
    with common.reading(path):
        image, _ = read_nifti(path)
    if image.ndim == 2:
        if number is not None:
            raise common.BadInputError(f"--slice is for NIfTI volumes, {path} holds one image")
        return image
    if number is None:
        number = len(image) // 2
    if number >= len(image):
        raise common.BadInputError(f"--slice must be below the number of slices, {len(image)}, got {number}")
    return image[number]


def _reduced(image: Tensor, size: int) -> Tensor:
    """Average over areas where a side is longer than `size`."""
    longest = max(image.shape)
    if longest <= size:
        return image
    shape = [max(1, round(n * size / longest)) for n in image.shape]
    parts = torch.view_as_real(image).movedim(-1, 0) if image.is_complex() else image[None]
    parts = torch.nn.functional.interpolate(parts[None], shape, mode="area")[0]
    return torch.complex(parts[0], parts[1]) if image.is_complex() else parts[0]


def _mask(width: int, acceleration: float, generator: torch.Generator) -> Tensor:
    """Draw lines, denser towards the fully sampled centre; as many as the acceleration says."""
    lines = max(1, round(width / acceleration))
    center = min(CENTER_TIMES_ACCELERATION / acceleration, lines / width)
    return gaussian_lines(width, width / lines, center, generator)


def _measure(settings: Settings, image: Tensor, mask: Tensor) -> tuple[Tensor, float]:
    """Return noisy k-space (COILS, H, W), and the standard deviation of a sample's noise."""
    height, width = image.shape
    everything = CartesianMRI(birdcage_maps(COILS, (height, width)), torch.ones(width, dtype=torch.bool))
    kspace = everything(image[None])[0]
    sigma = float(kspace.abs().square().mean().sqrt()) * 10 ** (-settings.snr / 20)
    return _noisy(kspace, sigma, settings.generator(0)) * mask, sigma


def _noisy(kspace: Tensor, sigma: float, generator: torch.Generator | None) -> Tensor:
    return kspace + sigma * torch.randn(kspace.shape, dtype=kspace.dtype, generator=generator)


def _maps(settings: Settings, kspace: Tensor, mask: Tensor) -> Tensor:
    """Return the coil sensitivity maps that the reconstructions use."""
    if not settings.estimate_maps:
        return birdcage_maps(COILS, (kspace.shape[1], kspace.shape[2]))
    try:
        return espirit_maps(kspace, mask)
    except ValueError as error:
        raise common.BadInputError(
            f"--estimate-maps: {error}; lower --acceleration or raise --size"
        ) from error


def _tau(settings: Settings) -> float:
    return TAU * 10 ** ((30 - settings.snr) / 20)


def _prior(settings: Settings, truth: Slice, mri: CartesianMRI, kspace: Tensor) -> common.Prior:
    if not settings.train:
        return common.shipped("mri", mri, kspace[None], nonnegative=False)
    common.say(
        "The denoiser learns from random ellipses, photographs (scikit-image) and, where it is not the slice itself, "
        "an MR slice (pydicom), with random smooth phases."
    )
    return common.Prior(_train(settings, truth), _tau(settings), PLAN.network)


def _train(settings: Settings, truth: Slice) -> DnCNN:
    """Train on small images with smooth phases, measured by the same coils with as much noise."""
    images = common.training_images(truth.stored)
    operator = {
        "kind": "mri",
        "coils": COILS,
        "mask": "gaussian_lines",
        "acceleration": settings.acceleration,
        "center_fraction": CENTER_TIMES_ACCELERATION / settings.acceleration,
        "snr": settings.snr,
    }
    return common.train(settings, PLAN, operator, lambda g: common.draw_image(images, g), _tau(settings))


def _compute(
    settings: Settings, truth: Slice, kspace: Tensor, mask: Tensor, maps: Tensor, minibatch: int, sigma: float
) -> common.Result:
    height, width = truth.image.shape
    lines = int(mask.sum())
    setting = (
        f"{height} x {width} pixels, {COILS} coils, {lines} of {width} lines (R = {width / lines:.3g}), "
        f"{settings.snr:g} dB"
    )
    known = "estimated by ESPIRiT" if settings.estimate_maps else "known"
    common.say(f"Truth: {truth.name}. Scan: {setting}; {minibatch} coils a step in ODER; coil maps {known}.")
    mri, shown = CartesianMRI(maps, mask), truth.image.abs()
    prior = _prior(settings, truth, mri, kspace)
    common.say("Reconstructing")
    rows = [common.direct_row("Zero-filled", lambda: mri.adjoint(kspace[None])[0], shown)]
    names = (f"RED, all {COILS} coils a step", f"ODER, {minibatch} of {COILS} coils a step")
    models = common.build_models(
        settings,
        prior,
        minibatch=minibatch,
        nonnegative=False,
        check_every=CHECK_EVERY,
    )
    rows.append(common.smooth_row(mri, kspace[None], shown))
    rows += common.solved_rows(names, models, mri, kspace[None], shown)
    zero_filled, smooth, red, oder = rows

    def draw_data(axis: Any) -> None:
        # A logarithm of what the noise leaves to be seen.
        magnitude = torch.log10(kspace[0].abs().clamp_min(sigma / 10))
        axis.imshow(magnitude.numpy(), cmap="gray", aspect="auto", interpolation="nearest")
        axis.set(title="Measured k-space, coil 1 (log)", xlabel="phase encoding", ylabel="readout")

    return common.Result(
        title=f"Parallel MRI: {setting}",
        unit="magnitude / largest",
        truth=shown,
        rows=rows,
        draw_data=draw_data,
        remarks=[
            f"{common.beside(red, (zero_filled, smooth, oder))}; in the magnitude, at {lines} of {width} lines "
            f"(R = {width / lines:.3g})."
        ],
        arrays={
            "truth": truth.image,
            "kspace": kspace,
            "mask": mask,
            "coil_maps": maps,
            "zero_filled": zero_filled.value,
            "total_variation": smooth.value,
            "red": red.value,
            "oder": oder.value,
        },
        prior=prior,
    )
