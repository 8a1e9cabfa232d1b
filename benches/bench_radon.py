"""CT: our faces against ASTRA's CPU projector and against grid_sample in plain PyTorch.

Floors on one core, for H = W = 512, D = 729, V = 180 (67e6 interpolations forward): an interpolation of a vector
of rays takes two permutes, two multiply-adds, two loads and about six more vector operations; memory is 1 MB of
image and 0.5 MB of sinogram, in the cache. So instruction issue binds, at about 3 cycles for 16 (AVX-512) rays.
"""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

import oder_fast
from oder_fast import ParallelBeamCT
from oder_fast.testing import (
    ELLIPSES,
    angles_over,
    ellipse_image,
    ellipse_sinogram,
    in_turn,
    relative_error,
)

N, BINS, VIEWS = 512, 729, 180


def astra_operator(n, n_bins, angles):
    """ASTRA's Joseph projector on the CPU, its geometry ours: same angles, unit bins, rows downward; or None."""
    try:
        import astra
    except ImportError:  # pip install 'oder-fast[bench]' brings it
        return None
    volume = astra.create_vol_geom(n, n)
    projector = astra.create_projector(
        "linear", astra.create_proj_geom("parallel", 1.0, n_bins, angles.numpy()), volume
    )
    return astra.OpTomo(projector)


class GridSampleRadon:
    """A Radon transform by rotated bilinear sampling, its adjoint by backpropagation."""

    def __init__(self, n, n_bins, angles):
        axis = torch.arange(n_bins, dtype=torch.float32) - (n_bins - 1) / 2
        along, s = torch.meshgrid(axis, axis, indexing="ij")
        grids = []
        for theta in angles.tolist():
            c, d = math.cos(theta), math.sin(theta)
            x, y = s * c - along * d, s * d + along * c
            grids.append(torch.stack([x, -y], -1) * (2 / (n - 1)))
        self.grids = torch.stack(grids)

    def __call__(self, x, views):
        grids = self.grids[views]
        samples = torch.nn.functional.grid_sample(
            x[None].expand(len(views), -1, -1, -1), grids, align_corners=True
        )
        return samples[:, 0].sum(1)

    def gradient(self, x, y, views, n_views):
        """One graph serves projection and back-projection: the best that can be done with it."""
        x = x.detach().requires_grad_()
        projected = self(x, views)
        residual = projected.detach() - y[views]
        return torch.autograd.grad(projected, x, residual)[0] * (n_views / len(views))

    def adjoint_of_forward(self, x, y, views, n_views):
        """A_adjoint(A(x) - y) with a back-projection of its own graph, as deepinv's Tomography runs it."""
        with torch.no_grad():
            residual = self(x, views) - y[views]
        zero = torch.zeros_like(x, requires_grad=True)
        return torch.autograd.grad(self(zero, views), zero, residual)[0] * (n_views / len(views))


@pytest.mark.parametrize("batch", [1, 8])
def test_radon_forward(report, face, one_thread, generator, batch):
    x = torch.rand(batch, N, N, generator=generator)
    angles = angles_over(VIEWS)
    few = torch.arange(0, VIEWS, 20)

    def ours():
        return oder_fast.radon_forward(x, angles, BINS, backend=face.backend)

    expected = oder_fast.radon_forward(x.double(), angles[few], BINS, backend="reference")
    error = relative_error(ours()[:, few], expected)
    assert error < 1e-6
    report.benchmark.pedantic(ours, rounds=5, warmup_rounds=1)
    candidates = {"ours": ours}
    astra = astra_operator(N, BINS, angles)
    if batch == 1 and astra is not None:
        image = x[0].numpy()
        assert relative_error(ours()[0], torch.from_numpy(astra.FP(image))) < 2e-4
        candidates["ASTRA linear"] = lambda: astra.FP(image)
    times = in_turn(candidates)
    seconds = times.pop("ours") / batch
    report.add(
        "radon_forward",
        face.name,
        f"{batch} x {N}x{N}, {BINS} bins, {VIEWS} views, per image",
        seconds,
        rate=f"{N * BINS * VIEWS / seconds / 1e9:.1f}e9 interpolations/s",
        peers={name: t / batch for name, t in times.items()},
        error=error,
    )


@pytest.mark.parametrize("batch", [1, 8])
def test_radon_adjoint(report, face, one_thread, generator, batch):
    y = torch.rand(batch, VIEWS, BINS, generator=generator)
    angles = angles_over(VIEWS)

    def ours():
        return oder_fast.radon_adjoint(y, angles, (N, N), backend=face.backend)

    error = relative_error(
        ours()[:1], oder_fast.radon_adjoint(y[:1].double(), angles, (N, N), backend="reference")
    )
    assert error < 1e-6
    report.benchmark.pedantic(ours, rounds=5, warmup_rounds=1)
    candidates = {"ours": ours}
    astra = astra_operator(N, BINS, angles)
    if batch == 1 and astra is not None:
        sinogram = y[0].numpy()
        assert relative_error(ours()[0], torch.from_numpy(astra.BP(sinogram))) < 2e-4
        candidates["ASTRA linear"] = lambda: astra.BP(sinogram)
    times = in_turn(candidates)
    seconds = times.pop("ours") / batch
    report.add(
        "radon_adjoint",
        face.name,
        f"{batch} x {N}x{N}, {BINS} bins, {VIEWS} views, per image",
        seconds,
        rate=f"{N * N * VIEWS / seconds / 1e9:.1f}e9 pixel-views/s",
        peers={name: t / batch for name, t in times.items()},
        error=error,
    )


def test_radon_gradient_of_a_minibatch(report, face, one_thread, generator):
    n_views = 90
    x = torch.rand(1, N, N, generator=generator)
    angles = angles_over(n_views)
    y = torch.rand(1, n_views, BINS, generator=generator)
    views = torch.randperm(n_views, generator=generator)[:30]
    plain = GridSampleRadon(N, BINS, angles)

    def ours():
        return oder_fast.radon_gradient(x, y, angles, views, backend=face.backend)

    error = relative_error(
        ours(), oder_fast.radon_gradient(x.double(), y.double(), angles, views, backend="reference")
    )
    assert error < 1e-6
    # Another discretisation of the same integrals: close on a smooth image, equal nowhere.
    smooth = torch.nn.functional.avg_pool2d(x[None], 31, 1, 15)[0]
    other = plain.gradient(smooth, y[0] * 0, views, n_views)
    same = oder_fast.radon_gradient(smooth, None, angles, views, n_bins=BINS)
    assert relative_error(same, other) < 0.02
    report.benchmark.pedantic(ours, rounds=5, warmup_rounds=1)
    times = in_turn(
        {
            "ours": ours,
            "grid_sample, A^T(A x - y)": lambda: plain.adjoint_of_forward(x, y[0], views, n_views),
            "grid_sample, one graph": lambda: plain.gradient(x, y[0], views, n_views),
        },
        seconds=6,
    )
    denoised = torch.rand_like(x)
    fused = in_turn(
        {
            "fused": lambda: oder_fast.radon_red_update(
                x, y, angles, views, denoised, 1e-5, 1.0, backend=face.backend
            ),
            "apart": lambda: oder_fast.red_update(x, ours(), denoised, 1e-5, 1.0, backend=face.backend),
        }
    )
    seconds = times.pop("ours")
    shape = f"1 x {N}x{N}, {BINS} bins, 30 of {n_views} views"
    report.add("radon_gradient", face.name, shape, seconds, peers=times, error=error)
    report.add(
        "radon_red_update", face.name, shape, fused["fused"], peers={"gradient, then update": fused["apart"]}
    )


def test_two_threads(report, generator):
    if torch.get_num_threads() < 2:
        pytest.skip("one core")
    x = torch.rand(1, N, N, generator=generator)
    angles = angles_over(VIEWS)
    y = oder_fast.radon_forward(x, angles, BINS)
    calls = {
        "radon_forward": lambda: oder_fast.radon_forward(x, angles, BINS),
        "radon_adjoint": lambda: oder_fast.radon_adjoint(y, angles, (N, N)),
        "radon_gradient": lambda: oder_fast.radon_gradient(x, y, angles),
    }
    report.benchmark.pedantic(calls["radon_gradient"], rounds=3, warmup_rounds=1)

    def with_threads(n, call):
        def run():
            torch.set_num_threads(n)
            call()

        return run

    before = torch.get_num_threads()
    for name, call in calls.items():
        times = in_turn({"two": with_threads(2, call), "one": with_threads(1, call)})
        report.add(
            name,
            "cpu, 2 threads",
            f"1 x {N}x{N}, {VIEWS} views",
            times["two"],
            peers={"one thread": times["one"]},
        )
    torch.set_num_threads(before)


def test_accuracy_on_ellipses(report):
    """The sinogram of ellipses against its analytic Radon transform, beside ASTRA's."""
    angles = angles_over(VIEWS)
    astra = astra_operator(N, BINS, angles)
    if astra is None:
        pytest.skip("the yardstick is ASTRA: pip install 'oder-fast[bench]'")
    large = tuple((v, 2 * x, 2 * y, 2 * a, 2 * b, tilt) for v, x, y, a, b, tilt in ELLIPSES)
    image = ellipse_image(large, N).float()
    exact = ellipse_sinogram(large, angles, torch.arange(BINS) - (BINS - 1) / 2)

    def call():
        return oder_fast.radon_forward(image[None], angles, BINS)[0]

    report.benchmark.pedantic(call, rounds=2)
    ours, theirs = call(), torch.from_numpy(astra.FP(image.numpy()))
    error, their_error = relative_error(ours, exact), relative_error(theirs, exact)
    assert error <= their_error
    report.add(
        "radon_forward", "cpu", f"ellipses {N}x{N}, {VIEWS} views", in_turn({"ours": call}, 0.2)["ours"],
        note=f"relative L2 to the analytic transform {error:.5e}, ASTRA linear {their_error:.5e}; "
        f"to each other {relative_error(ours, theirs):.1e}",
    )  # fmt: skip
    # ASTRA steps along its rays in float32, and its positions drift with the size of the image.
    small = angles_over(60, start=0.01)
    astra = astra_operator(128, 183, small)
    image = ellipse_image(tuple((v, *(k / 2 for k in p), t) for v, *p, t in ELLIPSES), 128).float()
    difference = relative_error(
        oder_fast.radon_forward(image[None], small, 183)[0], torch.from_numpy(astra.FP(image.numpy()))
    )
    assert difference < 1e-5
    report.add(
        "radon_forward",
        "cpu",
        "ellipses 128x128, 60 views",
        None,
        note=f"relative L2 to ASTRA linear {difference:.1e}",
    )


MEMORY = """
import sys, torch, oder_fast
from oder_fast.testing import angles_over
torch.set_num_threads(1)
n, bins, n_views, size = 512, 4001, 1200, 600
angles = angles_over(n_views)
x, y = torch.rand(1, n, n), torch.rand(1, n_views, bins)
views = torch.arange(size)
oder_fast.radon_gradient(x, y, angles, views[:1])
def peak():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) * 1024
open("/proc/self/clear_refs", "w").write("5")
before = peak()
result = oder_fast.radon_gradient(x, y, angles, views)
print(peak() - before - result.numel() * 4, size * bins * 4)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self")
def test_peak_memory_of_a_gradient(report):
    run = subprocess.run([sys.executable, "-c", MEMORY], check=True, capture_output=True, text=True)
    extra, sinogram = map(int, run.stdout.split())
    report.benchmark.pedantic(lambda: None)
    assert extra < 1.1 * sinogram + 2**21
    report.add(
        "radon_gradient", "cpu", "600 of 1200 views, 4001 bins", None,
        note=f"peak memory beyond inputs and output {extra / 2**20:.2f} MiB, minibatch's sinogram {sinogram / 2**20:.2f} MiB",
    )  # fmt: skip


def test_fixed_point_step(report, generator):
    """What an iteration costs beyond the operator: the Python of the layers."""
    ct = ParallelBeamCT(16, angles=6)
    x, y = torch.rand(1, 16, 16), torch.rand(1, *ct.data_shape)
    denoised, angles = torch.rand_like(x), ct.angles
    views = ct.draw_blocks(2, generator)

    def call():
        return ct.red_update(x, y, views, denoised, 1e-3, 1.0)

    report.benchmark.pedantic(call, rounds=20, iterations=20, warmup_rounds=1)
    times = in_turn({"op": call, "forward": lambda: oder_fast.radon_forward(x, angles, ct.n_bins)}, 0.5)
    report.add(
        "radon_red_update", "cpu", "1 x 16x16, 2 of 6 views", times["op"], note="mostly the cost of a call"
    )
