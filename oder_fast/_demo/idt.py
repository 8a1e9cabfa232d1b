"""Noisy images of cells under light from many sides, reconstructed slice by slice by Tikhonov, RED and ODER."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..data import add_gaussian_noise, beam_propagation, cell_like, led_ring, psnr
from ..denoisers import DnCNN
from ..operators import DiffractionTomography
from . import common

# Lengths in micrometres: a dry objective over cells in water. Pixels just resolve it, slices twice as thick as its
# axial resolution at most.
OPTICS: dict[str, Any] = {
    "pixel_size": 0.14,
    "wavelength": 0.515,
    "numerical_aperture": 0.9,
    "medium_index": 1.33,
}
MEDIUM: float = OPTICS["medium_index"]
SPACING = 2.0
# Weak enough for the first Born approximation: the largest of the refractive index above the medium, and of the
# absorption.
INDEX_CONTRAST, ABSORPTION = 0.01, 2e-3
# Contrasts are solved for in this unit: to the linear model and to a denoiser without biases it makes no difference,
# to Adam, whose smallest gradient is absolute, it does.
UNIT = 2 * MEDIUM * INDEX_CONTRAST
# Shares of |A|^2.
WEIGHTS = (1e-5, 1e-4, 3e-4, 1e-3, 1e-2)
START = 1e-3
# The share of |A|^2 that the prior's weight is at 10 dB; it follows the amplitude of the noise.
TAU = 0.004
# Of total variation, a quarter as many as usual: they are dear, and more of them give 0.1 dB more.
DUAL_ITERATIONS = 50
TRAINING_VOLUMES = 100
LARGEST_TRAINING_SIZE = 128


@dataclass(frozen=True)
class Settings(common.Settings):
    """What the user chose; see the command's help."""

    size: int
    slices: int
    illuminations: int
    beam_propagation: bool
    train: bool


class AboveBackground(DnCNN):
    """Denoise what differs from each slice's background, the mean of the fifth of its values around the median.

    The median's own derivative would jump from pixel to pixel.

    The measurements do not hold the mean of a slice's real part: this prior makes the background 0, that of the
    medium, wherever the mean starts.
    """

    def network(self, image: Tensor) -> Tensor:
        """Return the denoised image."""
        values = image.flatten(2).sort(2).values
        middle, half = values.shape[2] // 2, max(1, values.shape[2] // 10)
        background = values[:, :, middle - half : middle + half].mean(2)
        return super().network(image - background[:, :, None, None])


class Microscope(DiffractionTomography):
    """An operator whose direct reconstructions have the medium's index where nothing is."""

    def initial(self, y: Tensor) -> Tensor:
        """Start from Tikhonov's."""
        return self.direct(y, START)

    def direct(self, y: Tensor, share: float) -> Tensor:
        """Reconstruct by Tikhonov, the median of each slice's real part 0, with a share of the squared norm."""
        return self.above_background(self.tikhonov(y, share * self.norm_squared()))

    def above_background(self, contrast: Tensor) -> Tensor:
        """Return contrasts ``(..., Z, H, W)`` less the median of each slice's real part."""
        return contrast - contrast.real.flatten(-2).median(-1).values[..., None, None]

    def above_medium(self, value: Tensor) -> Tensor:
        """Return the refractive index above the medium's, of contrasts in their unit."""
        return self.refractive_index(UNIT * value).real - self.medium_index


def run(settings: Settings) -> None:
    """Do it all; write the three files at the end.

    Raises:
        BadInputError: Before anything long starts.
        DivergenceError: Where a fixed point cannot be found.
    """
    minibatch = settings.minibatch or max(1, settings.illuminations // 8)
    common.check_minibatch(minibatch, settings.illuminations, "illuminations")
    with common.working(settings):
        common.report(settings.output, _compute(settings, minibatch))


def _plan(slices: int) -> common.TrainingPlan:
    # The network sees all slices at once, which helps where the data do not tell them apart; it predicts the image,
    # simpler here than the noise of twice as many channels as slices.
    return common.TrainingPlan(
        network={"depth": 4, "width": 48, "in_channels": 2 * slices, "predicts": "image", "bias": False},
        sigma=(0.0, 0.1),
        learning_rates=(1.5e-3, 1e-4),
        kind=AboveBackground,
        batches=(2, 1),
    )


def _rings(number: int) -> list[tuple[int, float, float]]:
    """Spread illuminations evenly over the aperture: of each ring how many, its share of the radius, and its turn."""
    rings = max(1, round(math.sqrt(number / 3)))
    found, left = [], number
    for k in range(rings, 0, -1):
        n = round(2 * left / (k + 1))
        left -= n
        if n:
            # Turned against each other, or rings would repeat each other's directions.
            found.append((n, k / rings, 0.5 * k))
    return found


def _illuminations(number: int) -> Tensor:
    radius = OPTICS["numerical_aperture"]
    return torch.cat([led_ring(n, radius * share, start=turn) for n, share, turn in _rings(number)])


def _depths(settings: Settings) -> list[float]:
    middle = (settings.slices - 1) / 2
    return [SPACING * (k - middle) for k in range(settings.slices)]


def _microscope(settings: Settings, gram: Any) -> Microscope:
    return Microscope(
        settings.size,
        _depths(settings),
        _illuminations(settings.illuminations),
        thickness=SPACING,
        gram=gram,
        **OPTICS,
    )


def _phantoms(settings: Settings, n: int, size: int, generator: torch.Generator) -> Tensor:
    """Draw contrasts (n, Z, size, size), in their unit."""
    drawn = cell_like(
        n,
        (settings.slices, size, size),
        generator,
        medium_index=MEDIUM,
        index_contrast=INDEX_CONTRAST,
        absorption=ABSORPTION,
    )
    return drawn / UNIT


def _measure(settings: Settings, idt: Microscope, truth: Tensor) -> tuple[Tensor, float]:
    """Return noisy intensities (L, H, W) in the unit of contrasts, and the model's relative error without noise."""
    linear = idt(truth[None])
    if settings.beam_propagation:
        exact = beam_propagation(
            UNIT * truth[None], idt.illuminations, depths=idt.depths, thickness=SPACING, **OPTICS
        )
        measured = exact / UNIT
    else:
        measured = linear
    error = float((linear - measured).norm() / measured.norm())
    return add_gaussian_noise(measured, settings.snr, settings.generator(0))[0], error


def _tau(settings: Settings) -> float:
    return TAU * 10 ** ((10 - settings.snr) / 20)


def _turned(volumes: Tensor, g: torch.Generator) -> Tensor:
    """Draw one of the volumes, in one of 16 orientations."""
    k = int(torch.randint(len(volumes), (), generator=g))
    turns, across, along = torch.randint(4, (3,), generator=g).tolist()
    volume = torch.rot90(volumes[k], turns, (1, 2))
    volume = volume.flip(2) if across % 2 else volume
    return volume.flip(0) if along % 2 else volume


def _train(settings: Settings) -> DnCNN:
    """Train on other phantoms, whole ones: parts have another background."""
    size = min(settings.size, LARGEST_TRAINING_SIZE)
    volumes = UNIT * _phantoms(settings, TRAINING_VOLUMES, size, settings.generator(6))
    rings = [[n, OPTICS["numerical_aperture"] * share] for n, share, _ in _rings(settings.illuminations)]
    operator = {
        "kind": "idt",
        "depths": _depths(settings),
        "rings": rings,
        "thickness": SPACING,
        "contrast_unit": UNIT,
        "snr": settings.snr,
        **OPTICS,
    }
    return common.train(
        settings, _plan(settings.slices), operator, lambda g: _turned(volumes, g), _tau(settings)
    )


def _prior(settings: Settings, idt: Microscope, y: Tensor) -> common.Prior:
    if not settings.train:
        return common.shipped("idt", idt, y, nonnegative=False)
    common.say("The denoiser learns from other such phantoms, measured by the linear model.")
    return common.Prior(_train(settings), _tau(settings), _plan(settings.slices).network)


def _compute(settings: Settings, minibatch: int) -> common.Result:
    number = settings.illuminations
    truth = _phantoms(settings, 1, settings.size, settings.generator(4))[0]
    idt = _microscope(settings, gram=False)
    intensities, error = _measure(settings, idt, truth)
    setting = (
        f"{settings.size} x {settings.size} pixels, {settings.slices} slices, {number} illuminations, "
        f"{settings.snr:g} dB"
    )
    how = "beam propagation" if settings.beam_propagation else "the linear model"
    common.say(
        f"Truth: a cell-like phantom, measured by {how}. Scan: {setting}; {minibatch} illuminations a step in ODER."
    )
    shown, y = idt.above_medium(truth), intensities[None]
    prior = _prior(settings, idt, y)
    common.say("Reconstructing")
    rows = []
    for share in WEIGHTS:
        reconstruct = partial(lambda share: idt.direct(y, share)[0], share)
        rows.append(common.direct_row(f"Tikhonov, {share:g}", reconstruct, shown, idt.above_medium))
    names = (f"RED, all {number} illuminations a step", f"ODER, {minibatch} of {number} illuminations a step")
    models = common.build_models(settings, prior, minibatch=minibatch, nonnegative=False, check_every=5)
    slices_shown = partial(_above_background, idt)
    rows.append(common.smooth_row(idt, y, shown, slices_shown, dual_iterations=DUAL_ITERATIONS))
    rows += common.solved_rows(names, models, idt, y, shown, idt.above_medium)
    remarks = [*_compare(rows, truth), *_time_gradients(settings, idt, y, minibatch)]
    if settings.beam_propagation:
        remarks.append(
            f"The linear model errs by {100 * error:.1f} % of what beam propagation says, without noise."
        )
    return _result(setting, rows, truth, shown, intensities, prior, remarks)


def _above_background(idt: Microscope, value: Tensor) -> Tensor:
    return idt.above_medium(idt.above_background(value))


def _compare(rows: list[common.Row], truth: Tensor) -> list[str]:
    *direct, smooth, red, oder = rows
    best = max(direct, key=lambda row: row.psnr)
    absorbing = [psnr(row.value.imag, truth.imag) for row in (best, red)]
    return [
        f"{common.beside(red, (best, smooth, oder))}; over the whole volume of the refractive index. Tikhonov's "
        "weight is in units of |A|^2, and the background of each slice set to the medium's, as of total variation.",
        f"The absorption is at {absorbing[1]:.2f} dB, that of Tikhonov at {absorbing[0]:.2f} dB.",
    ]


def _time_gradients(settings: Settings, idt: Microscope, y: Tensor, minibatch: int) -> list[str]:
    """Say what a minibatch saves, and what Gram matrices would."""
    x, number = idt.initial(y), idt.n_blocks
    everything = _microscope(settings, gram="auto")

    def seconds(operator: Microscope, blocks: Tensor | None) -> float:
        taken, data_fidelity = [], operator.least_squares(y)
        for _ in range(50):
            start = time.perf_counter()
            data_fidelity.gradient(x, blocks)
            taken.append(time.perf_counter() - start)
        return min(taken)

    few, one = (idt.draw_blocks(size, settings.generator(7)) for size in (minibatch, 1))
    full, part, single = (seconds(idt, blocks) for blocks in (None, few, one))
    text = (
        f"A gradient of the data fidelity takes {1e3 * part:.2f} ms with {minibatch} illuminations, "
        f"{1e3 * full:.2f} ms with all {number}"
    )
    if not everything.gram:
        return [f"{text}; Gram matrices do not pay: {everything.gram_reason}."]
    gram = seconds(everything, None)
    each = max((full - single) / max(number - 1, 1), 1e-9)
    as_many = min(max(round(1 + (gram - single) / each), 1), number)
    return [
        f"{text}, and {1e3 * gram:.2f} ms with all through Gram matrices (gram=True), about as much as a minibatch of "
        f"{as_many}."
    ]


def _result(
    setting: str,
    rows: list[common.Row],
    truth: Tensor,
    shown: Tensor,
    intensities: Tensor,
    prior: common.Prior,
    remarks: list[str],
) -> common.Result:
    *direct, smooth, red, oder = rows
    best = max(direct, key=lambda row: row.psnr)
    slices = len(truth)
    row = int(shown.square().sum((0, 2)).argmax())
    # The slice nearest the plane in focus; pixels of cuts along the light are as high as slices are far apart.
    views = (
        common.View(f"slice {slices // 2 + 1} of {slices}", lambda volume: volume[slices // 2]),
        common.View(f"x-z cut, row {row}", lambda volume: volume[:, row], SPACING / OPTICS["pixel_size"]),
    )

    def draw_data(axis: Any) -> None:
        axis.imshow(UNIT * intensities[0].numpy(), cmap="gray", interpolation="nearest")
        axis.set(title="Measured intensity - 1, illumination 1", xticks=[], yticks=[])

    return common.Result(
        title=f"Intensity diffraction tomography: {setting}",
        unit="refractive index - medium's",
        truth=shown,
        rows=rows,
        draw_data=draw_data,
        remarks=remarks,
        arrays={
            "truth": UNIT * truth,
            "intensities": UNIT * intensities,
            "tikhonov": UNIT * best.value,
            "total_variation": UNIT * smooth.value,
            "red": UNIT * red.value,
            "oder": UNIT * oder.value,
        },
        prior=prior,
        views=views,
    )
