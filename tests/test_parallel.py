"""Measurements spread over two processes against one that has them all, and what happens where a process fails.

Run as a program this file is such a process: it runs all scenarios in turn, each in a process group of its own.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from oder_fast.data import led_ring
from oder_fast.deqred import DEQRED
from oder_fast.fixed_point import Anderson, Implicit, JacobianFree, Nesterov, Picard, Unrolled
from oder_fast.operators import (
    CartesianMRI,
    DiffractionTomography,
    MeasurementParallel,
    ParallelBeamCT,
    split_blocks,
)
from oder_fast.operators.ct import CTLeastSquares
from oder_fast.red import GradientStep, ProximalStep

WORLD = 2
# Of a collective call: a hang fails.
# That ranks wait for each other: a loaded machine may start one long before the other.
TIMEOUT = timedelta(minutes=5)
# Longer than any test: what ends before has not waited for it.
NEVER = timedelta(hours=10)
SIZE, VIEWS, TAU = 16, 13, 0.1
LOST = "lost contact with another of the 2 ranks: look in their output for the one that ended or hangs"
SCENARIOS = {}


def scenario(function):
    SCENARIOS[function.__name__] = function
    return function


class Blur(nn.Module):
    """A symmetric blur with a learned gain; its eigenvalues lie in [0, gain]."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))
        kernel = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("kernel", kernel[:, None] * kernel)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.kernel.expand(x.shape[1], 1, 3, 3)
        return self.gain * nn.functional.conv2d(x, kernel, padding=1, groups=x.shape[1])


def images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


def relative(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


def whole_ct(views: int = VIEWS) -> ParallelBeamCT:
    return ParallelBeamCT(SIZE, views)


def part_of_ct(rank: int, views: int = VIEWS) -> tuple[MeasurementParallel, Tensor]:
    mine = split_blocks(views, rank, WORLD)
    return MeasurementParallel(ParallelBeamCT(SIZE, whole_ct(views).angles[mine])), mine


def problem(kind: str, rank: int, dtype: torch.dtype = torch.float32):
    """Return (the operator of all measurements, this rank's, its blocks, images, tau)."""
    if kind == "ct":
        return whole_ct(), *part_of_ct(rank), images(2, SIZE, SIZE, dtype=dtype), TAU
    if kind == "mri":
        n = 5
        maps = torch.randn(n, SIZE, 12, dtype=torch.complex64, generator=torch.Generator().manual_seed(1))
        mask = torch.arange(12) % 3 != 1
        mine = split_blocks(n, rank, WORLD)
        x = images(2, SIZE, 12, dtype=dtype)
        parallel = MeasurementParallel(CartesianMRI(maps[mine], mask))
        return CartesianMRI(maps, mask), parallel, mine, torch.complex(x, x.flip(1)), TAU
    leds = led_ring(6, 0.3)
    mine = split_blocks(len(leds), rank, WORLD)

    def idt(leds: Tensor) -> DiffractionTomography:
        optics = dict(pixel_size=0.4, wavelength=0.6, numerical_aperture=0.4, medium_index=1.33)
        return DiffractionTomography((SIZE, SIZE), [-4.0, 0.0, 4.0], leds, **optics)

    x = 0.01 * images(2, 3, SIZE, SIZE, dtype=dtype)
    return idt(leds), MeasurementParallel(idt(leds[mine])), mine, torch.complex(x, x.flip(2)), TAU


def everywhere(value: Tensor) -> list[Tensor]:
    """Return the tensors of all ranks."""
    values: list = [None] * WORLD
    dist.all_gather_object(values, value.detach())
    return values


def assert_same_bits(value: Tensor) -> None:
    first, *others = everywhere(value)
    assert all(torch.equal(first, other) for other in others)


# ------------------------------------------------------------------ what both processes run


def check_operator(kind: str, rank: int) -> None:
    whole, parallel, mine, x, _ = problem(kind, rank)
    y = whole(x)
    y = y + 0.1 * y.abs().mean() * torch.rand(y.shape, generator=torch.Generator().manual_seed(2))
    y = y * (whole(x) != 0) if kind == "mri" else y
    z = x.flip(0)
    assert parallel.n_blocks == len(split_blocks(whole.n_blocks, WORLD - 1, WORLD))
    assert parallel.image_shape == whole.image_shape
    assert parallel.data_shape == (len(mine), *whole.data_shape[1:])
    assert relative(parallel(z), whole(z)[:, mine]) < 1e-5
    assert relative(parallel.adjoint(y[:, mine]), whole.adjoint(y)) < 1e-5
    here, there = parallel.least_squares(y[:, mine]), whole.least_squares(y)
    weight = torch.tensor(0.1 * whole.norm_squared())
    tolerance = torch.full((len(z),), 1e-6)
    for got, expected in (
        (here.gradient(z), there.gradient(z)),
        (here.normal(z), there.normal(z)),
        (here.solve(z, weight, z, tolerance), there.solve(z, weight, z, tolerance)),
    ):
        # Of diffraction tomography the inner solves stop at their largest number of steps.
        assert relative(got, expected) < (0.1 if kind == "idt" else 1e-4)
        assert_same_bits(got)
    start = parallel.initial(y[:, mine])
    assert_same_bits(start)
    if kind == "idt":
        # Conjugate gradients have not quite arrived.
        assert relative(start, whole.initial(y)) < 0.1
    else:
        assert relative(start, whole.initial(y)) < 1e-5
    assert_same_bits(torch.tensor(parallel.norm_squared()))
    v = torch.randn(1, *whole.image_shape, dtype=x.dtype, generator=torch.Generator().manual_seed(3))
    for _ in range(1000):
        v = there.normal(v / v.norm())
    assert 0.999 < parallel.norm_squared() / float(v.norm()) < 1.05

    # Backward: the vector-Jacobian products in the image and in the data, and those of those.
    def derivatives(operator, data: Tensor) -> list[Tensor]:
        point, data = z.clone().requires_grad_(), data.clone().requires_grad_()
        gradient = operator.least_squares(data).gradient(point * point)
        first = torch.autograd.grad((gradient * gradient.conj()).real.sum(), (point, data), create_graph=True)
        second = torch.autograd.grad((first[0] * first[0].conj()).real.sum(), (point, data))
        return [*first, *second]

    for k, (got, expected) in enumerate(
        zip(derivatives(parallel, y[:, mine]), derivatives(whole, y), strict=True)
    ):
        assert relative(got, expected[:, mine] if k % 2 else expected) < 1e-4
        if k % 2 == 0:
            assert_same_bits(got)


@scenario
def operator_ct(rank):
    check_operator("ct", rank)


@scenario
def operator_mri(rank):
    check_operator("mri", rank)


@scenario
def operator_idt(rank):
    check_operator("idt", rank)


def check_model(kind: str, rank: int, **settings) -> None:
    """Compare a solve and its gradients, by the same iterations, to those of one process."""
    whole, parallel, mine, x, tau = problem(kind, rank)
    y = whole(x)

    def solve(operator, data: Tensor) -> tuple[Tensor, ...]:
        data = data.clone().requires_grad_()
        # The norm of all ranks is an estimate from above, and tau is in its units.
        norm = operator.norm_squared()
        tau_parameter = nn.Parameter(torch.tensor(tau * whole.norm_squared() / norm))
        model = DEQRED(
            Blur(0.9),
            tau=tau_parameter,
            on_failure="ignore",
            **{"solver": Anderson(50, 1e-5), "differentiation": Implicit(Anderson(50, 1e-4, memory=8))}
            | settings,
        )
        # Of diffraction tomography the starts differ: conjugate gradients, and the solution in closed form.
        value = model(data, operator, 0.9 * x if kind == "idt" else None)
        (value - x).abs().square().sum().backward()
        return value, model.denoiser.gain.grad, tau_parameter.grad / norm, data.grad

    got = solve(parallel, y[:, mine])
    *expected, data_gradient = solve(whole, y)
    for one, other in zip(got, [*expected, data_gradient[:, mine]], strict=True):
        assert relative(one, other) < 3e-3
    assert relative(got[0], expected[0]) < 1e-4
    for one in got[:3]:
        assert_same_bits(one)


@scenario
def model_ct(rank):
    check_model("ct", rank)
    # The norm of all ranks is an estimate: steps of a given number of iterations are a little different.
    check_model("ct", rank, differentiation=JacobianFree(), nonnegative=True)
    check_model("ct", rank, solver=Picard(100, 1e-5), differentiation=Unrolled())
    check_model("ct", rank, step=GradientStep(), solver=Anderson(500, 1e-4))


@scenario
def model_mri(rank):
    check_model("mri", rank)


@scenario
def model_idt(rank):
    check_model("idt", rank)


@scenario
def minibatches(rank):
    whole, parallel, mine, x, _ = problem("ct", rank)
    y = whole(x)[:, mine] - 1
    state = torch.get_rng_state()
    draws = [parallel.draw_blocks(2) for _ in range(500)]
    # Ranks with as many blocks draw apart, and torch's own generator stays alike on all.
    even, _ = part_of_ct(rank, 12)
    assert not torch.equal(*everywhere(torch.stack([even.draw_blocks(2) for _ in range(10)])))
    assert torch.equal(state, torch.get_rng_state())
    data_fidelity = parallel.least_squares(y)
    full = data_fidelity.gradient(x)
    estimates = torch.stack([data_fidelity.gradient(x, blocks) for blocks in draws])
    assert_same_bits(estimates)
    deviation = estimates.std(0).norm() / len(draws) ** 0.5
    assert 0 < (estimates.mean(0) - full).norm() < 2 * deviation < 0.1 * full.norm()
    # The expected smoothness bounds the second moment of a minibatch's normal operator.
    whole, parallel, mine, z, _ = problem("mri", rank)
    data_fidelity = parallel.least_squares(whole(z)[:, mine])
    bound = parallel.minibatch_norm_squared(1)
    assert bound > parallel.norm_squared()
    v = torch.randn(1, *z.shape[1:], dtype=z.dtype, generator=torch.Generator().manual_seed(1))
    for _ in range(10):
        many = [data_fidelity.normal(v, parallel.draw_blocks(1)) for _ in range(20)]
        moment = torch.stack(many).abs().square().sum() / len(many)
        assert moment < 1.2 * bound * (v.conj() * data_fidelity.normal(v)).real.sum()
        v = many[0] / many[0].norm()


@scenario
def minibatches_find_the_same_fixed_point(rank):
    for kind in ("ct", "mri", "idt"):
        whole, parallel, mine, x, tau = problem(kind, rank)
        y = whole(x)
        gradients = []
        for operator, data, size in ((whole, y, None), (parallel, y[:, mine], 2)):
            solver = Anderson(500, 1e-4) if size is None else Nesterov(3000, 3e-4)
            step = GradientStep(None, size)
            model = DEQRED(
                Blur(0.9),
                tau=2 * tau * whole.norm_squared() / operator.norm_squared(),
                step=step,
                solver=solver,
                differentiation=Implicit(solver),
            )
            value = model(data, operator)
            value.abs().square().sum().backward()
            gradients.append((value, model.denoiser.gain.grad))
        for one, other in zip(*gradients, strict=True):
            assert relative(one, other) < 5e-3, kind
        assert_same_bits(value)
        assert_same_bits(model.denoiser.gain.grad)


@scenario
def coils_of_a_rank_may_see_nothing(rank):
    """Zero maps on one rank, and maps that see nothing of one image; on all ranks they are refused."""
    maps = torch.randn(4, SIZE, 12, dtype=torch.complex64, generator=torch.Generator().manual_seed(1))
    mine = split_blocks(4, rank, WORLD)
    mask = torch.arange(12) % 3 != 1
    x = torch.complex(images(2, SIZE, 12), images(2, SIZE, 12).flip(2))
    maps[split_blocks(4, 1, WORLD)] = 0
    whole = CartesianMRI(maps, mask)
    parallel = MeasurementParallel(CartesianMRI(maps[mine], mask))
    y = whole(x)
    model = DEQRED(
        Blur(0.9), tau=TAU * whole.norm_squared() / parallel.norm_squared(), solver=Anderson(500, 1e-4)
    )
    expected = DEQRED(Blur(0.9), tau=TAU, solver=model.solver)(y, whole)
    few = DEQRED(Blur(0.9), tau=model.tau, step=GradientStep(None, 1), solver=Nesterov(3000, 1e-3))
    for one in (model, few):
        found = one(y[:, mine], parallel)
        assert relative(found, expected) < 5e-3
        assert_same_bits(found)
    with pytest.raises(ValueError, match="the coils of all ranks see nothing of image 1"):
        model(torch.stack([y[0, mine], torch.zeros_like(y[1, mine])]), parallel)
    with pytest.raises(ValueError, match="the coil maps of all ranks are zero everywhere"):
        MeasurementParallel(CartesianMRI(torch.zeros_like(maps[mine]), mask))
    assert_same_bits(model(y[:, mine], parallel))


@scenario
def images_that_converge_earlier_leave_on_all_ranks(rank):
    maps = torch.randn(3, 4, SIZE, SIZE, dtype=torch.complex64, generator=torch.Generator().manual_seed(1))
    mine = split_blocks(4, rank, WORLD)
    mask = torch.arange(SIZE) % 2 == 0
    whole = CartesianMRI(maps, mask)
    parallel = MeasurementParallel(CartesianMRI(maps[:, mine], mask))
    x = torch.complex(images(3, SIZE, SIZE), images(3, SIZE, SIZE).flip(2))
    y = whole(x)
    reference = DEQRED(Blur(0.9), tau=TAU, solver=Anderson(500, 1e-4))(y, whole).detach()
    start = torch.stack([reference[0], torch.zeros_like(reference[1]), 0.99 * reference[2]])
    for step in (ProximalStep(), GradientStep(None, 1)):
        solver = Nesterov(1000, 1e-3) if isinstance(step, GradientStep) else Anderson(500, 1e-3)
        with torch.no_grad():
            weight = TAU * whole.norm_squared() / parallel.norm_squared()
            solution = DEQRED(Blur(0.9), tau=weight, step=step, solver=solver)(
                y[:, mine], parallel, start, return_solution=True
            )
        assert len(set(solution.iterations.tolist())) > 1
        assert_same_bits(solution.iterations)
        assert_same_bits(solution.value)
        assert relative(solution.value, reference) < 5e-3


class Rounded(Blur):
    """A denoiser whose rounding differs from rank to rank."""

    def __init__(self, rank: int) -> None:
        super().__init__(0.9)
        self.generator = torch.Generator().manual_seed(rank)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + 3e-6 * torch.randn(x.shape, generator=self.generator))


@scenario
def ranks_whose_rounding_differs_decide_alike(rank):
    whole, parallel, mine, x, tau = problem("ct", rank)
    y = whole(x)[:, mine]
    for solver in (Nesterov(30, 1e-6), Anderson(30, 1e-6), Picard(30, 1e-6)):
        model = DEQRED(Rounded(rank), tau=tau, solver=solver, on_failure="ignore")
        solution = model(y, parallel, return_solution=True)
        solution.value.square().sum().backward()
        assert_same_bits(solution.iterations)
        assert_same_bits(solution.residuals.nan_to_num())
        assert_same_bits(solution.adjoint[0].iterations)
        values = everywhere(solution.value)
        assert relative(*values) < 1e-4


@scenario
def what_differs_is_refused_on_all_ranks(rank):
    parallel, mine = part_of_ct(rank)
    y = whole_ct()(images(2, SIZE, SIZE))[:, mine]
    solver = Picard(2)

    def model(gain: float = 1.0, **settings) -> DEQRED:
        settings = {"tau": TAU, "solver": solver, "on_failure": "ignore"} | settings
        made = DEQRED(Blur(gain), **settings)
        return lambda y, x0=None: made(y, parallel, x0)

    bad = y.clone()
    bad[0, 2, 3] = torch.nan
    own = pytest.raises(ValueError, match=r"y must be finite, got nan at index \(0, 2, 3\)")
    other = pytest.raises(
        RuntimeError, match=r"rank 1 gave up: ValueError: DEQRED: y must be finite, got nan"
    )
    with own if rank == 1 else other:
        model()(bad if rank == 1 else y)
    with pytest.raises(TypeError if rank == 0 else RuntimeError, match=r"y must be a torch\.Tensor"):
        model()("not a tensor" if rank == 0 else y)
    x0 = torch.full((2, SIZE, SIZE), torch.inf if rank == 1 else 0.0)
    with pytest.raises((ValueError, RuntimeError), match="x0 must be finite"):
        model()(y, x0)
    with pytest.raises(ValueError, match="x0 must be the same on all ranks"):
        model()(y, torch.full((2, SIZE, SIZE), float(rank)))
    with pytest.raises(ValueError, match="x0 must be the same on all ranks, got None on rank 0"):
        model()(y, None if rank == 0 else torch.zeros(2, SIZE, SIZE))
    with pytest.raises(ValueError, match="the denoiser's weights must be the same on all ranks"):
        model(1.0 - 1e-7 * rank)(y)
    with pytest.raises(
        ValueError, match="the number of images must be the same on all ranks, got 2 on rank 0"
    ):
        model()(y[: 2 - rank])
    with pytest.raises(ValueError, match=r"y\.requires_grad must be the same"):
        model()(y.requires_grad_(rank == 0))
    y.requires_grad_(False)
    with pytest.raises(ValueError, match=r"tau must be the same on all ranks, got 1.0 on rank 0 and 2.0 on"):
        model(tau=1.0 + rank)(y)
    with pytest.raises(ValueError, match="image_shape must be the same on all ranks"):
        MeasurementParallel(ParallelBeamCT(SIZE + rank, 5))
    mri = CartesianMRI(torch.ones(2, SIZE, SIZE, dtype=torch.complex64), torch.ones(SIZE, dtype=torch.bool))
    with pytest.raises(ValueError, match="the kind of operator must be the same on all ranks"):
        MeasurementParallel(ParallelBeamCT(SIZE, 5) if rank == 0 else mri)
    with pytest.raises(ValueError, match="at most 6, the blocks of MeasurementParallel, got 7"):
        model(step=GradientStep(None, 7), solver=Picard(2))(y)
    # The ranks are still in step.
    assert_same_bits(model()(y))


@scenario
def distributed_data_parallel(rank):
    whole, parallel, mine, x, tau = problem("ct", rank)
    y = whole(x)
    # Weights that start apart.
    model = DEQRED(Blur(0.9 if rank == 0 else 0.1), tau=tau, on_failure="ignore")
    value = DistributedDataParallel(model)(y[:, mine], parallel)
    (value - x).square().sum().backward()
    single = DEQRED(Blur(0.9), tau=tau, on_failure="ignore")
    (single(y, whole) - x).square().sum().backward()
    assert relative(value, single(y, whole)) < 1e-2
    assert relative(model.denoiser.gain.grad, single.denoiser.gain.grad) < 3e-2


@scenario
def copies_and_groups(rank):
    parallel, mine = part_of_ct(rank)
    y = whole_ct()(images(1, SIZE, SIZE))[:, mine]
    other = copy.deepcopy(parallel)
    assert_same_bits(other.adjoint(y))
    assert other.group is parallel.group
    double = copy.deepcopy(parallel).double()
    assert double.adjoint(y.double()).dtype == torch.float64
    # Rank 1 first, then rank 0: the first of a group need not be process 0.
    alone = [dist.new_group([r]) for r in range(WORLD)][rank]
    single = MeasurementParallel(whole_ct(), alone)
    assert (single.rank, single.world_size) == (0, 1)
    x = images(1, SIZE, SIZE)
    assert torch.equal(single.adjoint(single(x)), whole_ct().adjoint(whole_ct()(x)))
    assert torch.equal(single.agree(x), x)
    again = copy.deepcopy(single)
    assert again.group is alone
    assert again.local_operator is not single.local_operator
    # The local operator's, but for the norm, which is estimated from above.
    local = single.local_operator.minibatch_norm_squared(3)
    assert local <= single.minibatch_norm_squared(3) * (1 + 1e-6) <= 1.1 * local
    other = [dist.new_group([r]) for r in range(WORLD)][1 - rank]
    with pytest.raises(RuntimeError, match="not in the group"):
        MeasurementParallel(whole_ct(), other)


class Killed(ParallelBeamCT):
    """An operator whose process is killed at its 20th gradient."""

    def least_squares(self, y):
        return KilledLeastSquares(self, y)


class KilledLeastSquares(CTLeastSquares):
    def _gradient(self, x, blocks):
        if self.calls == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._gradient(x, blocks)


def killed(rank):
    mine = split_blocks(VIEWS, rank, WORLD)
    kind = Killed if rank == 1 else ParallelBeamCT
    kind.__name__ = "ParallelBeamCT"
    parallel = MeasurementParallel(kind(SIZE, whole_ct().angles[mine]))
    y = whole_ct()(images(1, SIZE, SIZE))[:, mine]
    model = DEQRED(Blur(), tau=TAU, step=GradientStep(0.01), solver=Picard(1000, 1e-12))
    print("solving", flush=True)
    model(y, parallel)


def main(rank: int, folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if names == ["killed"]:
        start_group(rank, folder / "killed", NEVER)
        killed(rank)
        return
    results = {}
    for name in names:
        begin = time.perf_counter()
        start_group(rank, folder / name)
        try:
            torch.manual_seed(0)
            SCENARIOS[name](rank)
            results[name] = "passed"
        except BaseException:
            results[name] = traceback.format_exc()
        finally:
            dist.destroy_process_group()
        print(name, f"{time.perf_counter() - begin:.2f} s", flush=True)
        (folder / f"{rank}.json").write_text(json.dumps(results))


def start_group(rank: int, store: Path, timeout: timedelta = TIMEOUT) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD, timeout=timeout
    )


# ------------------------------------------------------------------ the tests


def processes(folder: Path, *names: str) -> list[subprocess.Popen]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    return [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder), *names],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        )
        for rank in range(WORLD)
    ]  # fmt: skip


def finish(started: list[subprocess.Popen], timeout: float) -> list[str]:
    """Wait for processes; return what they printed."""
    deadline = time.monotonic() + timeout
    try:
        return [p.communicate(timeout=max(deadline - time.monotonic(), 0.1))[0] for p in started]
    finally:
        for p in started:
            p.kill()
            p.wait()


@pytest.fixture(scope="module")
def report(request, tmp_path_factory) -> list[dict[str, str]]:
    """Return what became of each scenario that is asked for on each rank."""
    folder = tmp_path_factory.mktemp("ranks")
    tests = [item for item in request.session.items if item.name.startswith("test_two_ranks[")]
    printed = finish(processes(folder, *(test.callspec.params["name"] for test in tests)), timeout=1200)
    files = [folder / f"{rank}.json" for rank in range(WORLD)]
    assert all(file.exists() for file in files), "\n".join(printed)
    return [json.loads(file.read_text()) for file in files]


FIRST = ("operator_ct", "model_mri")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in FIRST else pytest.mark.exhaustive) for name in SCENARIOS],
)
def test_two_ranks(name, report):
    for rank, results in enumerate(report):
        assert results.get(name) == "passed", f"rank {rank}: {results.get(name, 'did not run')}"


@pytest.mark.exhaustive
def test_a_rank_that_is_killed_ends_the_others_with_the_reason(tmp_path):
    started = processes(tmp_path, "killed")
    assert any(line.startswith("solving") for line in started[1].stdout)
    # Ranks would wait for hours: that the other ends at all is since it knows.
    printed = finish(started, timeout=600)
    assert started[1].returncode == -signal.SIGKILL
    # Gloo may abort the interpreter as it ends.
    assert started[0].returncode in (1, -signal.SIGABRT)
    cause, _, message = printed[0].rpartition("direct cause of the following exception")
    assert "Error: " in cause
    assert f"RuntimeError: MeasurementParallel: rank 0 {LOST}, and start all anew\n" in message


def test_blocks_are_split_without_a_rest():
    for n, world in ((7, 3), (4, 4), (90, 1)):
        parts = [split_blocks(n, rank, world) for rank in range(world)]
        assert torch.equal(torch.cat(parts).sort().values, torch.arange(n))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    with pytest.raises(ValueError, match="each of 3 ranks needs a block, got 2"):
        split_blocks(2, 0, 3)
    with pytest.raises(ValueError, match="rank must be 0 to world_size - 1, got 3 of 3"):
        split_blocks(9, 3, 3)
    with pytest.raises(TypeError, match="rank must be an int, got float"):
        split_blocks(9, 1.0, 3)


def test_a_process_group_is_asked_for():
    with pytest.raises(RuntimeError, match="needs a process group: start with torchrun"):
        MeasurementParallel(whole_ct())


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
