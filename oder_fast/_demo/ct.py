"""Few noisy views of one slice, reconstructed by FBP, RED and ODER."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..data import add_gaussian_noise, psnr
from ..denoisers import DnCNN
from ..operators import ParallelBeamCT
from . import common

FILTERS = ("ramp", "shepp-logan", "cosine", "hann")
PLAN = common.TrainingPlan(
    network={"depth": 6, "width": 32, "bias": False}, sigma=(0.0, 0.03), learning_rates=(2e-3, 5e-4)
)
# Weight of the prior at 50 dB for each view (the normal operator grows with their number); it follows the
# amplitude of the noise.
TAU_PER_VIEW = 1.0


@dataclass(frozen=True)
class Settings(common.Settings):
    """What the user chose; see the command's help."""

    views: int
    train: bool


def run(settings: Settings) -> None:
    """Do it all; write the three files at the end.

    Raises:
        BadInputError: Before anything long starts.
        DivergenceError: Where a fixed point cannot be found.
    """
    minibatch = settings.minibatch or max(1, settings.views // 3)
    common.check_minibatch(minibatch, settings.views, "views")
    truth, name = _read_truth(settings)
    with common.working(settings):
        common.report(settings.output, _compute(settings, truth, name, minibatch))


def _read_truth(settings: Settings) -> tuple[Tensor, str]:
    """Return the image scaled to [0, 1], and what to call it."""
    if settings.input is None:
        from pydicom import examples

        path, name = examples.get_path("ct"), "the CT slice pydicom.examples.ct"
    else:
        path, name = settings.input, str(settings.input)
    return common.scaled(common.read_slice(path, settings.array), path), name


def _tau(settings: Settings, ct: ParallelBeamCT) -> float:
    return TAU_PER_VIEW * ct.n_blocks / ct.norm_squared() * 10 ** ((50 - settings.snr) / 20)


def _prior(settings: Settings, truth: Tensor, ct: ParallelBeamCT, sinogram: Tensor) -> common.Prior:
    if not settings.train:
        return common.shipped("ct", ct, sinogram, nonnegative=True)
    common.say(
        "The denoiser learns from random ellipses, photographs (scikit-image) and an MR slice (pydicom)."
    )
    return common.Prior(_train(settings, truth), _tau(settings, ct), PLAN.network)


def _train(settings: Settings, truth: Tensor) -> DnCNN:
    """Train on small images seen from proportionally fewer views: the streaks are those of the scan."""
    images = common.training_images(truth)
    views = max(1, round(settings.views * common.PATCH / max(truth.shape)))
    return common.train(
        settings,
        PLAN,
        {"kind": "ct", "angles": views, "snr": settings.snr},
        lambda g: common.draw_image(images, g),
        _tau(settings, ParallelBeamCT(common.PATCH, views)),
    )


def _compute(settings: Settings, truth: Tensor, name: str, minibatch: int) -> common.Result:
    height, width = truth.shape
    views = settings.views
    ct = ParallelBeamCT((height, width), views)
    sinogram = add_gaussian_noise(ct(truth[None]), settings.snr, settings.generator(0))
    setting = f"{height} x {width} pixels, {views} views, {settings.snr:g} dB"
    common.say(f"Truth: {name}. Scan: {setting}; {minibatch} views a step in ODER.")
    prior = _prior(settings, truth, ct, sinogram)
    common.say("Reconstructing")

    def fbp(name: Any) -> Tensor:
        return ct.fbp(sinogram, filter=name)[0].clamp(min=0)

    rows = [common.direct_row(f"FBP, {name}", partial(fbp, name), truth) for name in FILTERS]
    names = (f"RED, all {views} views a step", f"ODER, {minibatch} of {views} views a step")
    rows.append(common.smooth_row(ct, sinogram, truth, nonnegative=True))
    models = common.build_models(settings, prior, minibatch=minibatch, nonnegative=True)
    rows += common.solved_rows(names, models, ct, sinogram, truth)
    return _result(setting, rows, truth, sinogram[0], prior)


def _result(
    setting: str, rows: list[common.Row], truth: Tensor, sinogram: Tensor, prior: common.Prior
) -> common.Result:
    best = max(rows[: len(FILTERS)], key=lambda row: row.psnr)
    smooth, red, oder = rows[len(FILTERS) :]
    inside = common.beside(red, (best, smooth), lambda row: _psnr_inside(row, truth))
    remarks = [
        f"{common.beside(red, (best, smooth, oder))}.",
        f"Within the largest circle, away from the edges of the frame, {inside}.",
    ]

    def draw_data(axis: Any) -> None:
        axis.imshow(sinogram.numpy(), cmap="gray", aspect="auto", interpolation="nearest")
        axis.set(title="Measured sinogram", xlabel="detector bin", ylabel="view")

    return common.Result(
        title=f"Sparse-view CT: {setting}",
        unit="attenuation / largest",
        truth=truth,
        rows=rows,
        draw_data=draw_data,
        remarks=remarks,
        arrays={
            "truth": truth,
            "sinogram": sinogram,
            "fbp": best.value,
            "total_variation": smooth.value,
            "red": red.value,
            "oder": oder.value,
        },
        prior=prior,
    )


def _psnr_inside(row: common.Row, truth: Tensor) -> float:
    """Return the PSNR within the largest circle: FBP errs most where the frame cuts through the body."""
    height, width = truth.shape
    i, j = torch.arange(height)[:, None] - (height - 1) / 2, torch.arange(width) - (width - 1) / 2
    inside = i**2 + j**2 <= (min(height, width) / 2) ** 2
    return psnr(row.image[inside], truth[inside], 1.0)
