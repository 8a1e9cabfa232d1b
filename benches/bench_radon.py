"""CT: our backends against ASTRA's CPU projector and against grid_sample in plain PyTorch.

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
from cases import (
    ELLIPSES,
    TOLERANCE,
    angles_over,
    ellipse_image,
    ellipse_sinogram,
    in_turn,
    relative_error,
)

import oder_fast
from gpu import Work, add_row, needs_gpu, rotated, time_in_turn
from oder_fast import ParallelBeamCT
from oder_fast.ops import Detector
from oder_fast.reference import radon as reference

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
        axis = torch.arange(n_bins, dtype=torch.float32, device=angles.device) - (n_bins - 1) / 2
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
def test_radon_forward(report, build, one_thread, generator, batch):
    x = torch.rand(batch, N, N, generator=generator)
    angles = angles_over(VIEWS)
    few = torch.arange(0, VIEWS, 20)

    def ours():
        return oder_fast.ops.radon_forward(x, angles, Detector(BINS), backend=build.backend)

    expected = oder_fast.ops.radon_forward(x.double(), angles[few], Detector(BINS), backend="reference")
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
        build.name,
        f"{batch} x {N}x{N}, {BINS} bins, {VIEWS} views, per image",
        seconds,
        rate=f"{N * BINS * VIEWS / seconds / 1e9:.1f}e9 interpolations/s",
        peers={name: t / batch for name, t in times.items()},
        error=error,
    )


@pytest.mark.parametrize("batch", [1, 8])
def test_radon_adjoint(report, build, one_thread, generator, batch):
    y = torch.rand(batch, VIEWS, BINS, generator=generator)
    angles = angles_over(VIEWS)

    def ours():
        return oder_fast.ops.radon_adjoint(y, angles, Detector(BINS), (N, N), backend=build.backend)

    error = relative_error(
        ours()[:1],
        oder_fast.ops.radon_adjoint(y[:1].double(), angles, Detector(BINS), (N, N), backend="reference"),
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
        build.name,
        f"{batch} x {N}x{N}, {BINS} bins, {VIEWS} views, per image",
        seconds,
        rate=f"{N * N * VIEWS / seconds / 1e9:.1f}e9 pixel-views/s",
        peers={name: t / batch for name, t in times.items()},
        error=error,
    )


def test_radon_gradient_of_a_minibatch(report, build, one_thread, generator):
    n_views = 90
    x = torch.rand(1, N, N, generator=generator)
    angles = angles_over(n_views)
    y = torch.rand(1, n_views, BINS, generator=generator)
    views = torch.randperm(n_views, generator=generator)[:30]
    plain = GridSampleRadon(N, BINS, angles)

    def ours():
        return oder_fast.ops.radon_gradient(x, y, angles, Detector(BINS), views, backend=build.backend)

    error = relative_error(
        ours(),
        oder_fast.ops.radon_gradient(
            x.double(), y.double(), angles, Detector(BINS), views, backend="reference"
        ),
    )
    assert error < 1e-6
    # Another discretisation of the same integrals: close on a smooth image, equal nowhere.
    smooth = torch.nn.functional.avg_pool2d(x[None], 31, 1, 15)[0]
    other = plain.gradient(smooth, y[0] * 0, views, n_views)
    same = oder_fast.ops.radon_gradient(smooth, None, angles, Detector(BINS), views)
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
    seconds = times.pop("ours")
    shape = f"1 x {N}x{N}, {BINS} bins, 30 of {n_views} views"
    report.add("radon_gradient", build.name, shape, seconds, peers=times, error=error)


def test_two_threads(report, generator):
    if torch.get_num_threads() < 2:
        pytest.skip("one core")
    x = torch.rand(1, N, N, generator=generator)
    angles = angles_over(VIEWS)
    y = oder_fast.ops.radon_forward(x, angles, Detector(BINS))
    calls = {
        "radon_forward": lambda: oder_fast.ops.radon_forward(x, angles, Detector(BINS)),
        "radon_adjoint": lambda: oder_fast.ops.radon_adjoint(y, angles, Detector(BINS), (N, N)),
        "radon_gradient": lambda: oder_fast.ops.radon_gradient(x, y, angles, Detector(BINS)),
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
        return oder_fast.ops.radon_forward(image[None], angles, Detector(BINS))[0]

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
        oder_fast.ops.radon_forward(image[None], small, Detector(183))[0],
        torch.from_numpy(astra.FP(image.numpy())),
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
import math, sys, torch, oder_fast
torch.set_num_threads(1)
n, bins, n_views, size = 512, 4001, 1200, 600
angles = torch.arange(n_views) * (math.pi / n_views)
x, y = torch.rand(1, n, n), torch.rand(1, n_views, bins)
views = torch.arange(size)
oder_fast.ops.radon_gradient(x, y, angles, oder_fast.ops.Detector(bins), views[:1])
def peak():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) * 1024
open("/proc/self/clear_refs", "w").write("5")
before = peak()
result = oder_fast.ops.radon_gradient(x, y, angles, oder_fast.ops.Detector(bins), views)
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


def test_small_gradient(report, generator):
    """What a call costs: the Python of the layers."""
    ct = ParallelBeamCT(16, angles=6)
    x, views = torch.rand(1, 16, 16), ct.draw_blocks(2, generator)
    data_fidelity = ct.least_squares(torch.rand(1, *ct.data_shape))

    def call():
        return data_fidelity.gradient(x, views)

    report.benchmark.pedantic(call, rounds=20, iterations=20, warmup_rounds=1)
    seconds = in_turn({"gradient": call}, 0.5)["gradient"]
    report.add("radon_gradient", "cpu", "1 x 16x16, 2 of 6 views", seconds, note="mostly the cost of a call")


# ------------------------------------------------------------------ on a GPU

# Batch, edge of the image, bins, views, views of a minibatch: the paper's, and a large scan.
SCANS = ((1, 512, 725, 90, 30), (8, 1024, 1449, 360, 120))
# Instructions of the inner loops in the sm_90 code of nvcc 13.0, per ray and line and per pixel and view, of one image
# and of two that share positions and weights.
PROJECT = {1: 11.1, 2: 8.0}
GATHER = {1: 11.25, 2: 6.6}


def crossings(size: int, angles: torch.Tensor) -> float:
    """Count where the rays of some views at unit spacing cross a line: max(|cos|, |sin|) of the pixels."""
    return size * size * float(torch.maximum(angles.cos().abs(), angles.sin().abs()).sum())


def forward_work(batch: int, size: int, n_bins: int, angles: torch.Tensor) -> list[Work]:
    """radon_project_kernel and radon_combine_kernel.

    Bytes: image and sinogram once, 1.3 MB at 512 x 512, 725 bins, 90 views: nothing. Where a ray crosses a line, two
    pixels come from shared memory (8 bytes), weights and sums are 6 operations. Rays that pass beside the image cost
    nothing, so that there are 0.90 crossings for each pixel and view (not bins times lines, half as many again).

    | at | crossings | memory | arithmetic | shared memory | instructions | floor on an H200 |
    |---|---|---|---|---|---|---|
    | 1 x 512 x 512, 90 views | 21e6 | 0.3 us | 1.9 us | 5.1 us | 7.0 us | 7.0 us |
    | 8 x 1024 x 1024, 360 views | 2.7e9 | 11.7 us | 244 us | 650 us | 650 us | 650 us |

    Instructions bind, with two images a block shared memory alike. Hence positions in fixed point, whose high word is the address and whose low word
    becomes the weight in one shift; lines read by aligned asynchronous copies; as many rays a warp as meet in no bank; two
    images a block, which share positions and weights: 8 instructions a crossing for 11. Ray sums of up to 16 groups of strips
    fill the GPU with one image and stay in the L2 cache.
    """
    n = batch * crossings(size, angles)
    moved = 4.0 * batch * (size * size + len(angles) * n_bins)
    return [Work(moved, 6 * n, 8 * n, PROJECT[min(batch, 2)] * n)]


def adjoint_work(batch: int, size: int, n_bins: int, angles: torch.Tensor) -> list[Work]:
    """radon_gather_kernel.

    Every pixel takes two bins of each view (8 bytes of shared memory), weights and sums are 9 operations.

    | at | pixels x views | memory | arithmetic | shared memory | instructions | floor on an H200 |
    |---|---|---|---|---|---|---|
    | 1 x 512 x 512, 90 views | 24e6 | 0.3 us | 3.2 us | 5.6 us | 7.9 us | 7.9 us |
    | 8 x 1024 x 1024, 360 views | 3.0e9 | 11.7 us | 406 us | 722 us | 596 us | 722 us |

    Of one image instructions bind, of two a block shared memory. Hence fixed point again, the clamp of the weight in the
    saturation of a multiply-add, tiles of 32 x 32 pixels that need 50 bins of a view, 128 views in shared memory at a time,
    4 pixels of a column a thread, two images a block. Steps between pixels in 32 bits, weights' constants in the table of
    views, and no question about the kind of a view inside the loop leave 45 instructions a view and 4 pixels.
    """
    n = float(batch) * size * size * len(angles)
    moved = 4.0 * batch * (size * size + len(angles) * n_bins)
    return [Work(moved, 9 * n, 8 * n, GATHER[min(batch, 2)] * n)]


def gradient_work(batch: int, size: int, n_bins: int, used: torch.Tensor) -> list[Work]:
    """Projection, residual and back-projection of a minibatch: the residual passes through the L2 cache.

    30 of 90 views of 512 x 512: 5.0 us on an H200 (2.4 and 2.6); 120 of 360 views of 8 x 1024 x 1024: 457 us.
    """
    return forward_work(batch, size, n_bins, used) + adjoint_work(batch, size, n_bins, used)


def name_of(scan) -> str:
    batch, size, n_bins, n_views, _ = scan
    return f"{batch} x {size}x{size}, {n_bins} bins, {n_views} views"


def both_backends(call):
    """From a call with a backend to candidates."""
    return {backend: lambda k, backend=backend: call(k, backend) for backend in ("cuda", "triton")}


def check(candidates, expected) -> float:
    """Compare every candidate with the reference in float64; return the error of the CUDA backend."""
    errors = {name: relative_error(call(0), expected) for name, call in candidates.items()}
    assert max(errors.values()) < TOLERANCE[torch.float32], errors
    return errors["cuda"]


@needs_gpu
@pytest.mark.parametrize("scan", SCANS, ids=name_of)
def test_gpu_forward(report, generator, scan):
    batch, size, n_bins, n_views, _ = scan
    angles = angles_over(n_views)
    on_gpu, work = angles.cuda(), forward_work(batch, size, n_bins, angles)
    x = torch.rand(batch, size, size, generator=generator).cuda()
    xs = rotated(x, work[0].bytes)
    ours = both_backends(
        lambda k, backend: oder_fast.ops.radon_forward(xs[k], on_gpu, Detector(n_bins), backend=backend)
    )
    error = check(ours, reference.radon_forward(x.double(), angles, Detector(n_bins)))
    report.benchmark.pedantic(lambda: None)
    candidates = ours | {
        "call by call": ours["cuda"],
        "torch, view by view": lambda k: reference.radon_forward(xs[k], angles, Detector(n_bins)),
    }
    if scan == SCANS[0]:
        plain, every = GridSampleRadon(size, n_bins, on_gpu), torch.arange(n_views, device="cuda")
        candidates["grid_sample"] = lambda k: plain(xs[k], every)
    times = time_in_turn(candidates, len(xs), eager=candidates.keys() - ours)
    add_row(report, "radon_forward", name_of(scan), times, work, error)


@needs_gpu
@pytest.mark.parametrize("scan", SCANS, ids=name_of)
def test_gpu_adjoint(report, generator, scan):
    batch, size, n_bins, n_views, _ = scan
    angles = angles_over(n_views)
    on_gpu, work = angles.cuda(), adjoint_work(batch, size, n_bins, angles)
    y = torch.rand(batch, n_views, n_bins, generator=generator).cuda()
    ys = rotated(y, work[0].bytes)
    ours = both_backends(
        lambda k, backend: oder_fast.ops.radon_adjoint(
            ys[k], on_gpu, Detector(n_bins), (size, size), backend=backend
        )
    )
    error = check(ours, reference.radon_adjoint(y.double(), angles, Detector(n_bins), (size, size)))
    report.benchmark.pedantic(lambda: None)
    candidates = ours | {
        "call by call": ours["cuda"],
        "torch, view by view": lambda k: reference.radon_adjoint(
            ys[k], angles, Detector(n_bins), (size, size)
        ),
    }
    times = time_in_turn(candidates, len(ys), eager=candidates.keys() - ours)
    add_row(report, "radon_adjoint", name_of(scan), times, work, error)


@needs_gpu
@pytest.mark.parametrize("scan", SCANS, ids=name_of)
def test_gpu_gradient(report, generator, scan):
    batch, size, n_bins, n_views, n_used = scan
    angles = angles_over(n_views)
    views = torch.randperm(n_views, generator=generator)[:n_used]
    used, on_gpu, chosen = angles[views], angles.cuda(), views.cuda()
    work = gradient_work(batch, size, n_bins, used)
    x = torch.rand(batch, size, size, generator=generator).cuda()
    y = torch.rand(batch, n_views, n_bins, generator=generator).cuda()
    sets = rotated((x, y), work[0].bytes)
    ours = both_backends(
        lambda k, backend: oder_fast.ops.radon_gradient(
            *sets[k], on_gpu, Detector(n_bins), chosen, backend=backend
        )
    )

    def view_by_view(x, y):
        residual = reference.radon_forward(x, used, Detector(n_bins)) - y.index_select(1, chosen)
        return reference.radon_adjoint(residual, used, Detector(n_bins), (size, size)) * (n_views / n_used)

    error = check(ours, view_by_view(x.double(), y.double()))
    report.benchmark.pedantic(lambda: None)
    candidates = ours | {
        "call by call": ours["cuda"],
        "torch, view by view": lambda k: view_by_view(*sets[k]),
    }
    if scan == SCANS[0]:
        plain = GridSampleRadon(size, n_bins, on_gpu)
        candidates["grid_sample, one graph"] = lambda k: plain.gradient(
            sets[k][0], sets[k][1][0], chosen, n_views
        )
    times = time_in_turn(candidates, len(sets), eager=candidates.keys() - ours)
    shape = name_of(scan).replace("bins, ", f"bins, {n_used} of ")
    add_row(report, "radon_gradient", shape, times, work, error)
