"""deepinv's algorithms on our operators as its physics, against the same on its own physics, in one run.

The algorithms, their settings and the denoiser are the same: what differs is the physics. The denoiser is a 3 x 3 mean, so
that the time is that of the physics; a network adds its own to both. Results are compared first: of MRI, whose numbers are
the same, to rounding; of CT, where deepinv samples rays in another way, to what that makes of the data.
"""

from __future__ import annotations

import statistics
import time

import pytest
import torch

from oder_fast import CartesianMRI, ParallelBeamCT
from oder_fast.data import birdcage_maps, random_ellipses, random_lines
from peers import distance, tomography

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")

ROUNDS = 3
SIZE, VIEWS = 256, 60
COILS, LINES = 8, 192
NOISE = 0.005


class Mean(torch.nn.Module):
    """A denoiser of deepinv that costs next to nothing and contracts."""

    def forward(self, x, sigma):
        return 0.95 * torch.nn.functional.avg_pool2d(x, 3, 1, 1)


def ct(deepinv, **accuracy):
    """Ours, deepinv's as quick as it gets (see `peers.tomography`), data of both with the same noise, and the order of axes."""
    from oder_fast.deepinv import OperatorPhysics

    ours = OperatorPhysics(ParallelBeamCT(SIZE, VIEWS), **accuracy)
    theirs = tomography(deepinv, SIZE, VIEWS, **accuracy)
    truth = random_ellipses(1, SIZE, torch.Generator().manual_seed(0))[:, None]
    clean, other = ours.A(truth), theirs.A(truth)
    noise = NOISE * clean.abs().max() * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    assert distance(other.mT, clean) < 0.02
    return truth, ((ours, clean + noise), (theirs, other + noise.mT)), 0.06


def mri(deepinv, **accuracy):
    from oder_fast.deepinv import OperatorPhysics

    generator = torch.Generator().manual_seed(0)
    maps, mask = birdcage_maps(COILS, (LINES, LINES)), random_lines(LINES, 4, 0.08, generator)
    ours = OperatorPhysics(CartesianMRI(maps, mask), **accuracy)
    theirs = deepinv.physics.MultiCoilMRI(
        mask=mask.float().expand(LINES, LINES), coil_maps=maps, img_size=(2, LINES, LINES), **accuracy
    )
    truth = torch.cat((random_ellipses(1, LINES, generator)[:, None], torch.zeros(1, 1, LINES, LINES)), 1)
    y = theirs.A(truth)
    y = y + NOISE * (y != 0) * torch.randn(y.shape, generator=generator)
    assert distance(ours.A(truth), theirs.A(truth)) < 1e-5
    return truth, ((ours, y), (theirs, y)), 5e-4


SCANS = {
    f"CT {SIZE}x{SIZE}, {VIEWS} views": (ct, "Tomography"),
    f"MRI {LINES}x{LINES}, {COILS} coils, R = 4": (mri, "MultiCoilMRI"),
}


def algorithm(deepinv, name, norm, iterations):
    """FISTA with an l1 prior, proximal gradient descent with a denoiser, and HQS with one, as RED's proximal form."""
    optim = deepinv.optim

    def start(y, physics):
        image = physics.A_adjoint(y) / norm
        return (image, image) if name == "FISTA" else image

    common = {
        "data_fidelity": optim.L2(),
        "max_iter": iterations,
        "early_stop": False,
        "custom_init": start,
    }
    if name == "FISTA":
        return optim.FISTA(prior=optim.L1Prior(), lambda_reg=1e-3 * norm, stepsize=0.99 / norm, **common)
    prior = optim.PnP(denoiser=Mean())
    if name == "PnP":
        return optim.PGD(prior=prior, sigma_denoiser=0.1, stepsize=0.99 / norm, **common)
    return optim.HQS(prior=prior, sigma_denoiser=0.1, stepsize=100 / norm, g_first=True, **common)


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize(("name", "iterations"), [("FISTA", 20), ("PnP", 20), ("HQS", 4)])
def test_algorithms(report, one_thread, deepinv, scan, name, iterations):
    if deepinv is None:
        pytest.skip("deepinv is not installed: see CONTRIBUTING.md")
    make, peer = SCANS[scan]
    # Of HQS: both stop their inner solves at this residual relative to the right-hand side.
    truth, candidates, apart = make(deepinv, tol=1e-6, max_iter=180)
    norm = float(candidates[0][0].compute_sqnorm(truth))
    model = algorithm(deepinv, name, norm, iterations)
    calls = [lambda physics=physics, y=y: model(y, physics) for physics, y in candidates]
    with torch.no_grad():
        ours, theirs = (call() for call in calls)
        difference = distance(ours, theirs)
        assert difference < apart
        report.benchmark.pedantic(calls[0])
        seconds = [[], []]
        for _ in range(ROUNDS):
            for call, taken in zip(calls, seconds, strict=True):
                begin = time.perf_counter()
                call()
                taken.append(time.perf_counter() - begin)
    mine, other = map(statistics.median, seconds)
    report.add(
        f"deepinv's {name}",
        "cpu",
        scan,
        mine,
        peers={f"deepinv {peer}": other},
        note=f"{iterations} iterations; the two results are {difference:.1e} apart",
    )
