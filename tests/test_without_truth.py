"""Losses beside the truth: measurements left out, an unbiased estimate of the error, and a map that contracts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from oder_fast import DEQRED, Anderson, Implicit, ParallelBeamCT
from oder_fast.data import Phantoms, psnr
from oder_fast.data.samples import Sample, collate
from oder_fast.operators.base import seen
from oder_fast.training import (
    ConfigurationError,
    Trainer,
    load_checkpoint,
    load_model,
    losses,
    read_configuration,
)
from oder_fast.training.losses import contraction_loss, splitting_loss, sure_loss

TIGHT = Anderson(200, 1e-11)


def g(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch):
    """Drawing the report's curves takes longer than these runs."""
    monkeypatch.setattr("oder_fast.training.report._curves", lambda *_: b"")


class Shrink(nn.Module):
    """A smooth denoiser of two weights."""

    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([0.3, 0.2], dtype=torch.float64))

    def forward(self, x):
        neighbours = (x.roll(1, -1) + x.roll(1, -2)) / 2
        return self.weights[0] * torch.tanh(x) + self.weights[1] * neighbours


def problem():
    scan = ParallelBeamCT(8, 6)
    y = scan(torch.rand(2, 8, 8, dtype=torch.float64, generator=g()))
    return scan, y


def splitting(model, scan, y):
    kept, left_out = scan.split(y, 0.3, g())
    return splitting_loss(model(kept.y, kept.operator), left_out)


def sure(model, scan, y):
    probe = torch.randn(y.shape, dtype=y.dtype, generator=g())
    count = torch.full((len(y),), float(y[0].numel()), dtype=y.dtype)
    measured, beside = scan(model(y, scan)), scan(model(y + 0.2 * probe, scan))
    return sure_loss(measured, beside, y, probe, 0.2, 0.3, count)


@pytest.mark.parametrize("loss", [splitting, sure])
def test_gradients_against_finite_differences(loss):
    scan, y = problem()
    model = DEQRED(
        Shrink(), tau=0.1, solver=TIGHT, differentiation=Implicit(TIGHT), normalize=False, on_failure="ignore"
    )
    loss(model, scan, y).backward()
    weights = model.denoiser.weights
    found = weights.grad.clone()
    for k in range(2):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weights[k] += sign * 1e-4
                values.append(float(loss(model, scan, y)))
                weights[k] -= sign * 1e-4
        assert float(found[k]) == pytest.approx((values[0] - values[1]) / 2e-4, rel=1e-4)


def test_the_estimate_of_a_linear_map_against_a_dense_matrix():
    scan, y = problem()
    matrix = scan(torch.eye(64, dtype=torch.float64).reshape(64, 8, 8)).reshape(64, -1).T
    weight = 0.1 * scan.norm_squared()
    hat = matrix @ torch.linalg.solve(matrix.T @ matrix + weight * torch.eye(64), matrix.T)
    probe = torch.randn(y.shape, dtype=y.dtype, generator=g())
    model = DEQRED(lambda x: 0 * x, tau=0.1, solver=TIGHT, on_failure="ignore")
    with torch.no_grad():
        found = sure(model, scan, y)
    flat, b = y.flatten(1), probe.flatten(1)
    risk = (flat @ hat.T - flat).square().sum(1) + 0.09 * (2 * ((b @ hat.T) * b).sum(1) - flat.shape[1])
    # A power iteration ends a little below the norm.
    assert float(found) == pytest.approx(float((risk / flat.square().sum(1)).mean()), rel=1e-3)


# ------------------------------------------------------------------ maps that contract


class Symmetric(nn.Module):
    """A linear denoiser, symmetric, that expands some directions."""

    def __init__(self):
        super().__init__()
        self.strength = nn.Parameter(torch.tensor([1.2, 0.3], dtype=torch.float64))

    def forward(self, x):
        neighbours = (x.roll(1, -1) + x.roll(-1, -1)) / 2
        return self.strength[0] * x + self.strength[1] * neighbours


@pytest.mark.parametrize("constrained", [False, True])
def test_the_penalty_is_that_of_the_spectral_radius(constrained, monkeypatch):
    scan, y = problem()
    point = torch.rand(2, 8, 8, dtype=torch.float64, generator=g(1))
    point[:, 3:5, 2:7] = 0
    free = (point > 0).to(point.dtype) if constrained else None
    denoiser, tau = Symmetric(), 0.05 * scan.norm_squared()
    probe = torch.randn(point.shape, dtype=point.dtype, generator=g(2))

    def penalty():
        fidelity = scan.least_squares(y)
        return contraction_loss(lambda x: denoiser(x[:, None])[:, 0], fidelity, point, tau, 0.9, probe, free)

    units = torch.eye(64, dtype=torch.float64).reshape(64, 8, 8)
    matrix = scan(units).flatten(1).T
    with torch.no_grad():
        jacobian = denoiser(units[:, None]).flatten(1).T
    radii = []
    for image in range(2):
        seen = torch.ones(64, dtype=torch.bool) if free is None else free[image].flatten() > 0
        system = (matrix.T @ matrix + tau * torch.eye(64))[seen][:, seen]
        step = torch.linalg.solve(system, tau * jacobian[seen][:, seen])
        radii.append(torch.linalg.eigvals(step).abs().max())
    wanted = (torch.stack(radii) - 0.9).square().mean()
    assert min(radii) > 1
    with monkeypatch.context() as patched:
        patched.setattr(losses, "POWER_ITERATIONS", 200)
        patched.setattr(losses, "POWER_ACCURACY", 1e-8)
        assert float(penalty().detach()) == pytest.approx(float(wanted), rel=1e-3)
    # Downhill the map contracts as it should.
    descent = torch.optim.SGD(denoiser.parameters(), 0.2)
    for _ in range(20):
        descent.zero_grad()
        penalty().backward()
        descent.step()
    assert float(penalty().detach()) < 1e-3 * float(wanted)


# ------------------------------------------------------------------ runs

SMALL = {
    "operator": {"kind": "ct", "angles": 12, "snr": 30},
    "data": {"phantoms": {"kind": "ellipses", "n": 8, "size": 16}, "workers": 0},
    "denoiser": {"kind": "dncnn", "options": {"depth": 3, "width": 8}},
    "red": {"tau": 0.05, "max_iterations": 6, "adjoint_iterations": 6},
    "pretraining": {"steps": 0},
    "training": {"steps": 2, "batch_size": 2, "loss": {"splitting": 1}},
    "validation": {"samples": 1, "images": 0},
    "threads": 1,
}


def run(folder, *overrides, **options):
    configuration = read_configuration(SMALL, [f"output={str(folder)!r}", *overrides])
    trainer = Trainer(configuration, progress=False, **options)
    return trainer.fit()


IDT = (
    "{kind: idt, depths: [-2, 0, 2], rings: [[6, 0.3]], pixel_size: 0.4, wavelength: 0.6, "
    "numerical_aperture: 0.4, medium_index: 1.33}"
)


@pytest.mark.parametrize(
    ("operator", "phantoms"),
    [
        ("{kind: ct, angles: 12}", "ellipses"),
        ("{kind: mri, coils: 2, acceleration: 2}", "brain"),
        (IDT, "cells"),
    ],
    ids=["ct", "mri", "idt"],
)
@pytest.mark.parametrize(
    "loss", ["splitting: 1", "sure: 1", "splitting: 1, sure: 0.5, mse: 0.1", "splitting: 1, contraction: 1"]
)
def test_every_operator_trains(tmp_path, operator, phantoms, loss):
    overrides = [f"operator={operator}", f"data.phantoms.kind={phantoms}", f"training.loss={{{loss}}}"]
    overrides += ["training.noise=0.05"] * ("sure" in loss)
    outcome = run(tmp_path, *overrides)
    assert outcome.reason == "finished"
    assert math.isfinite(outcome.psnr)


class Measured(Dataset):
    """Sinograms without truth."""

    def __init__(self, first=1.0):
        self.first = first
        self.scan = ParallelBeamCT(16, 12)
        self.phantoms = Phantoms("ellipses", 4, 16)

    def __len__(self):
        return len(self.phantoms)

    def __getitem__(self, k):
        y = self.scan(self.phantoms[k].image[None])[0]
        return Sample(f"scan {k}", self.first * torch.ones(16, 16), measured=y)


def test_measurements_without_truth(tmp_path, capsys):
    outcome = run(tmp_path / "a", train_set=Measured(), validation_set=Measured())
    assert math.isfinite(outcome.psnr)
    # What stands in for the truth is not looked at.
    other = run(tmp_path / "b", train_set=Measured(0.5), validation_set=Measured(0.5))
    assert other.psnr == outcome.psnr
    one, two = (load_checkpoint(o.last)["model"] for o in (outcome, other))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_measurements_are_batched():
    batch = collate([Measured()[0], Measured()[1]])
    assert batch.measured.shape == (2, 12, 23)
    assert batch.to(torch.device("cpu")).measured is not None
    with pytest.raises(ValueError, match="only one has measurements"):
        collate([Measured()[0], Sample("b", torch.ones(16, 16))])


def test_measurements_that_are_not_finite(tmp_path):
    broken = Measured()
    broken.phantoms = [Sample("a", torch.full((16, 16), math.nan))]
    with pytest.raises(ConfigurationError, match="its measurements must be finite, got nan at"):
        run(tmp_path, train_set=broken, validation_set=broken)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.loss={sure: 1}"], "sure needs the noise"),
        (["training.noise=0.1"], "sure needs the noise, and nothing else does"),
        (["training.share=1.0"], "training.share"),
        (["training.loss={contraction: 1}"], "contraction is a penalty; it goes with another loss"),
        (["pretraining.loss=splitting"], "pretraining.loss.splitting: input should be 'mse', 'l1' or 'ssim'"),
        (["operator.angles=1"], "training.share: ParallelBeamCT: nothing can be left out of 1 views"),
    ],
)
def test_settings_that_do_not_go_together(tmp_path, overrides, message):
    with pytest.raises(ConfigurationError, match=message):
        run(tmp_path, *overrides)


def test_a_loss_that_needs_the_truth_where_there_is_none(tmp_path):
    with pytest.raises(ConfigurationError, match="mse needs the truth, and scan"):
        run(tmp_path, "training.loss=mse", train_set=Measured(), validation_set=Measured())


def test_what_a_mask_leaves_out_is_not_seen():
    scan = ParallelBeamCT(4, 2, 31)
    there = seen(scan, torch.zeros(1, 4, 4))
    assert there.shape == (1, 2, 31)
    assert 0 < float(there.sum()) < 20


@pytest.mark.exhaustive
@pytest.mark.parametrize("loss", ["{splitting: 1}", "{sure: 1}"])
def test_training_without_truth_comes_nearer_the_truth(tmp_path, loss):
    truths, scan = Phantoms("ellipses", 44, 24), ParallelBeamCT(24, 30)
    clean = scan(torch.stack([truths[k].image for k in range(40, 44)]))
    noise = 10 ** (-15 / 20) * clean.square().mean((1, 2), keepdim=True).sqrt()
    y = clean + noise * torch.randn(clean.shape, generator=g())
    overrides = [
        "data={phantoms: {kind: ellipses, n: 40, size: 24}, augment: false, workers: 0}",
        "operator={kind: ct, angles: 30, snr: 15}", "denoiser.options={depth: 4, width: 16}",
        "red={tau: 0.1, max_iterations: 15, adjoint_iterations: 15}",
        "pretraining={steps: 60, batch_size: 4, learning_rate: 1e-3, ema: 0.9, sigma: [0, 0.1]}",
        "training.learning_rate=1e-3", "training.ema=0.9", f"training.loss={loss}",
    ]  # fmt: skip
    overrides += [f"training.noise={float(noise.mean())}"] * ("sure" in loss)

    def quality(folder, steps):
        model, *_ = load_model(run(tmp_path / folder, *overrides, f"training.steps={steps}").last)
        model.on_failure = "ignore"
        with torch.no_grad():
            images = model(y, scan)
        return sum(psnr(images[k], truths[40 + k].image) for k in range(4)) / 4

    # Of the network that learned from noise alone 15.3 dB, with the truth 20.1.
    assert quality("after", 40) > quality("before", 0) + 3
