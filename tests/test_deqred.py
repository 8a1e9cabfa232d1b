"""DEQRED: the map it iterates, what it calls how often, and how it lives in the rest of torch."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
import pickle
import types
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations

from oder_fast.data import birdcage_maps, led_ring
from oder_fast.denoisers import DnCNN, TotalVariation, UNet
from oder_fast.denoisers.call import as_channels, from_channels
from oder_fast.deqred import DEQRED
from oder_fast.fixed_point import (
    Anderson,
    Average,
    DivergenceError,
    Implicit,
    JacobianFree,
    Nesterov,
    NotConvergedError,
    NotConvergedWarning,
    Picard,
    Unrolled,
)
from oder_fast.operators import CartesianMRI, DiffractionTomography, ParallelBeamCT
from oder_fast.operators.ct import CTLeastSquares
from oder_fast.published import oder
from oder_fast.red import GradientStep, ProximalStep

SIZE, VIEWS = 16, 12

pytestmark = pytest.mark.usefixtures("one_thread")


class Blur(nn.Module):
    """A symmetric blur with a learned gain; its eigenvalues lie in [0, gain]."""

    def __init__(self, gain: float = 1.0, channels: int = 1) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))
        kernel = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("kernel", (kernel[:, None] * kernel).expand(channels, 1, 3, 3).clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * nn.functional.conv2d(x, self.kernel, padding=1, groups=x.shape[1])


class CountingCT(ParallelBeamCT):
    """An operator that records the number of blocks of each call of the normal operator, "full" for all."""

    def __init__(self, **options) -> None:
        super().__init__(SIZE, VIEWS, **options)
        self.log: list[object] = []

    def least_squares(self, y):
        return CountingLeastSquares(self, y)

    def initial(self, y):
        self.log.append("initial")
        return super().initial(y)


class CountingLeastSquares(CTLeastSquares):
    def _gradient(self, x, blocks):
        self.operator.log.append("full" if blocks is None else len(blocks))
        return super()._gradient(x, blocks)

    def _normal(self, v, blocks):
        self.operator.log.append("full" if blocks is None else len(blocks))
        return super()._normal(v, blocks)


class CountingBlur(Blur):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def images(batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(batch, SIZE, SIZE, dtype=dtype, generator=generator)


@pytest.fixture
def ct() -> ParallelBeamCT:
    return ParallelBeamCT(SIZE, VIEWS)


@pytest.fixture
def y(ct) -> Tensor:
    return ct(images())


TAU = 0.05
STEPS = [ProximalStep(), GradientStep()]


# ------------------------------------------------------------------ the map


def scan(kind: str):
    """A scan of any kind in float64: the operator, and its data."""
    generator = torch.Generator().manual_seed(1)
    if kind == "ct":
        ct = ParallelBeamCT(SIZE, VIEWS)
        return ct, ct(images(dtype=torch.float64)) - 5
    if kind == "mri":
        maps = birdcage_maps(3, (SIZE, SIZE)).to(torch.complex128)
        mri = CartesianMRI(maps, torch.arange(SIZE) % 3 != 1)
        return mri, mri(torch.randn(2, SIZE, SIZE, dtype=torch.complex128, generator=generator))
    optics = {"pixel_size": 0.4, "wavelength": 0.6, "numerical_aperture": 0.35, "medium_index": 1.33}
    idt = DiffractionTomography((SIZE, SIZE), (-3.0, 3.0), led_ring(6, 0.3), **optics)
    return idt, idt(torch.randn(2, 2, SIZE, SIZE, dtype=torch.complex128, generator=generator))


@pytest.mark.parametrize("kind", ["ct", "ct, x >= 0", "mri", "idt"])
def test_both_forms_have_the_fixed_point_of_the_equation(kind):
    operator, y = scan(kind.split(",")[0])
    nonnegative = ">=" in kind

    def denoiser(x: Tensor) -> Tensor:
        return 0.9 * torch.tanh(x + x.roll(1, -1)) / 2

    found = []
    for step in STEPS:
        solver = Anderson(3000, 1e-7)
        model = DEQRED(denoiser, tau=TAU, step=step, nonnegative=nonnegative, solver=solver)
        found.append(model(y, operator))
        x, weight = found[-1], TAU * operator.norm_squared()
        denoised = from_channels(denoiser(as_channels(x)), x)
        image = x - (operator.adjoint(operator(x) - y) + weight * (x - denoised)) / weight
        if nonnegative:
            image = image.clamp(min=0)
            assert 0.05 < float((x == 0).double().mean()) < 0.95
        assert (image - x).norm() < 1e-4 * x.norm()
    assert (found[0] - found[1]).norm() < 1e-5 * found[1].norm()


def test_converged_means_near(ct):
    x = torch.zeros(1, SIZE, SIZE)
    x[:, 3:12, 5:10] = 1
    y = ct(x)
    y = y + 0.02 * y.max() * torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    denoiser = TotalVariation(0.1)
    exact = DEQRED(denoiser, tau=0.02, solver=Anderson(1000, 1e-5))(y, ct)
    for step in STEPS:
        model = DEQRED(denoiser, tau=0.02, step=step, solver=Anderson(2000))
        solution = model(y, ct, return_solution=True)
        assert solution.converged.all()
        assert (solution.value - exact).norm() < 1.5 * model.solver.tolerance * exact.norm()
        assert (solution.value - x).norm() < 0.6 * (ct.fbp(y) - x).norm()


@pytest.mark.parametrize(
    "tau",
    [pytest.param(0.1, marks=pytest.mark.exhaustive), 0.5, pytest.param(2.0, marks=pytest.mark.exhaustive)],
)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("solver", [Anderson(1000), Nesterov(1000), Picard(1000)])
def test_a_denoiser_that_contracts_and_is_not_symmetric(ct, y, tau, step, solver):
    model = DEQRED(lambda x: 0.6 * x + 0.3 * x.roll((1, 2), (2, 3)), tau=tau, step=step, solver=solver)
    solution = model(y, ct, return_solution=True)
    exact = DEQRED(model.denoiser, tau=tau, solver=Anderson(500, 1e-5))(y, ct)
    assert solution.converged.all()
    assert ((solution.value - exact).norm(dim=(1, 2)) < 3.5e-3 * exact.norm(dim=(1, 2))).all()


@pytest.mark.parametrize("step", STEPS)
def test_the_start_is_the_operators_or_the_users(ct, y, step):
    def model(iterations: int) -> DEQRED:
        return DEQRED(Blur(), tau=TAU, step=step, solver=Picard(iterations, 1e-9), on_failure="ignore")

    assert torch.equal(model(1)(y, ct), model(1)(y, ct, ct.initial(y)))
    # The inner solve stops by what the outer iteration has reached.
    torch.testing.assert_close(model(1)(y, ct, model(1)(y, ct)), model(2)(y, ct), rtol=1e-2, atol=1e-2)


class Physics(nn.Module):
    """What deepinv calls a physics: images and data with a channel axis."""

    def __init__(self, ct: ParallelBeamCT) -> None:
        super().__init__()
        self.ct = ct

    def A(self, x):
        return self.ct(x[:, 0])[:, None]

    def A_adjoint(self, y):
        return self.ct.adjoint(y[:, 0])[:, None]


@pytest.mark.parametrize("step", STEPS)
def test_a_foreign_physics_gives_the_same_images_and_gradients(ct, y, step):
    y, physics, results = y.double(), Physics(ct), []
    for operator, data in ((ct, y), (physics, y[:, None])):
        denoiser = Blur(0.9).double()
        model = DEQRED(denoiser, tau=TAU, step=step, solver=Anderson(1000, 1e-7), nonnegative=True)
        model.differentiation = Implicit(Anderson(1000, 1e-7))
        x = model(data, operator)
        x.square().sum().backward()
        results.append((x.reshape(2, SIZE, SIZE), denoiser.gain.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


def test_a_physics_lives_until_the_backward_pass(ct, y):
    denoiser = Blur(0.9)
    x = DEQRED(denoiser, tau=TAU)(y[:, None], Physics(ct))
    x.square().sum().backward()
    assert denoiser.gain.grad.isfinite()


@pytest.mark.parametrize("shape", [(2, 5, 6), (2, 1, 5, 6), (2, 3, 5, 6)])
def test_complex_images_are_viewed_as_two_channels(shape):
    image = torch.randn(shape, dtype=torch.complex64)
    channels = as_channels(image)
    expected = torch.view_as_real(image.reshape(2, -1, 5, 6)).movedim(-1, 2).reshape(2, -1, 5, 6)
    assert torch.equal(channels, expected)
    back = from_channels(channels, image)
    assert torch.equal(back, image)
    if len(shape) == 3:
        assert channels.data_ptr() == image.data_ptr()
        assert back.data_ptr() == image.data_ptr()
        conv = nn.Conv2d(2, 2, 3, padding=1)
        denoised = conv(channels)
        assert from_channels(denoised, image).data_ptr() == denoised.data_ptr()


def test_real_images_are_not_copied():
    image = torch.randn(2, 5, 6)
    assert as_channels(image).data_ptr() == image.data_ptr()
    assert from_channels(as_channels(image), image).data_ptr() == image.data_ptr()


# ------------------------------------------------------------------ nothing twice


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("solver", [Picard(500), Nesterov(500), Anderson(500)])
def test_the_calls_counted_are_those_made(solver, step):
    ct, denoiser = CountingCT(), CountingBlur(0.9)
    y = ct(images())
    model = DEQRED(denoiser, tau=TAU, step=step, solver=solver)
    ct.norm_squared()
    ct._circulant(torch.float32)
    ct.log.clear()
    solution = model(y, ct, return_solution=True)
    count = int(solution.iterations.max())
    assert ct.log == ["initial"] + ["full"] * int(solution.operator_calls)
    assert solution.denoiser_calls == count
    assert denoiser.calls == count + 1  # the one with a graph
    if isinstance(step, GradientStep):
        assert solution.operator_calls == count
    ct.log.clear()
    solution.value.sum().backward()
    (adjoint,) = solution.adjoint
    assert denoiser.calls == count + 1  # linearized once, for the whole adjoint solve
    assert adjoint.denoiser_calls == int(adjoint.iterations.max())
    # The Jacobian-free guess of the proximal form is a solve before the first iteration.
    assert ct.log == ["full"] * int(adjoint.operator_calls)


def test_without_anything_to_train_there_is_no_graph(ct, y):
    denoiser = CountingBlur().requires_grad_(False)
    solution = DEQRED(denoiser, tau=TAU, on_failure="ignore")(y, ct, return_solution=True)
    assert not solution.value.requires_grad
    assert denoiser.calls == int(solution.iterations.max())


def test_the_norm_is_computed_once(y, monkeypatch):
    calls = []
    normal = ParallelBeamCT._normal
    monkeypatch.setattr(ParallelBeamCT, "_normal", lambda self, *a: calls.append(1) or normal(self, *a))
    ct = ParallelBeamCT(SIZE, VIEWS)
    ct.norm_squared()
    before = len(calls)
    ct.norm_squared()
    assert 1 < before == len(calls)


def test_tau_is_in_units_of_the_norm(y):
    # The same rays in another unit of length: data and operator scale, and the image does not.
    small = ParallelBeamCT(SIZE, VIEWS, pixel_size=0.1)
    large = ParallelBeamCT(SIZE, VIEWS)
    found = [DEQRED(Blur(), tau=TAU)(ct(images()), ct) for ct in (small, large)]
    torch.testing.assert_close(*found, rtol=0, atol=2e-2)


# ------------------------------------------------------------------ data in any unit


@pytest.mark.parametrize("make", [lambda: UNet(channels=(4, 8)), lambda: DnCNN(depth=3, width=8, bias=True)])
def test_data_in_any_unit_are_denoised_alike(ct, y, make):
    torch.manual_seed(0)
    denoiser = make()
    model = DEQRED(denoiser, tau=TAU, solver=Anderson(10, 1e-3), on_failure="ignore")
    assert model.normalize
    with torch.no_grad():
        expected = model(y, ct)
        for unit in (1e-5, 1e5):
            torch.testing.assert_close(model(y * unit, ct) / unit, expected, rtol=1e-3, atol=1e-3)
        model.normalize = False
        assert (model(y * 1e-5, ct) / 1e-5 - expected).norm() > 0.02 * expected.norm()
    assert not DEQRED(DnCNN(depth=3, width=8, bias=False), tau=TAU).normalize


@pytest.mark.parametrize("step", STEPS)
def test_the_gradient_in_the_data_goes_through_the_normalization(ct, y, step):
    y = y.double().requires_grad_()
    exact = Anderson(2000, 1e-9)
    model = DEQRED(
        lambda x: 0.8 * torch.tanh(x),
        tau=TAU,
        step=step,
        normalize=True,
        solver=exact,
        differentiation=Implicit(exact),
    )
    weights = torch.linspace(0.5, 1.5, SIZE, dtype=torch.float64)

    def loss(data: Tensor) -> Tensor:
        return (model(data, ct) * weights).square().sum()

    (gradient,) = torch.autograd.grad(loss(y), y)
    direction = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(0))
    h = 1e-4
    with torch.no_grad():
        difference = (loss(y + h * direction) - loss(y - h * direction)) / (2 * h)
    torch.testing.assert_close((gradient * direction).sum(), difference, rtol=1e-4, atol=0)


# ------------------------------------------------------------------ minibatches


def solve_by_minibatches(
    *, minibatch_size: int | None = 4, variance_reduction: bool = True, seed: int = 0, **options
) -> tuple[Tensor, CountingCT]:
    ct = CountingCT()
    y = ct(images())
    options = {"solver": Nesterov(200, 1e-3), "differentiation": Implicit(Picard(200, 1e-2)), **options}
    step = GradientStep(None, minibatch_size, variance_reduction)
    model = DEQRED(Blur(), tau=TAU, step=step, generator=torch.Generator().manual_seed(seed), **options)
    ct.log.clear()
    with torch.no_grad():
        return model(y, ct, return_solution=True), ct


def test_minibatches_find_the_fixed_point_of_all_blocks():
    exact = solve_by_minibatches(minibatch_size=None, solver=Anderson(500, 1e-5))[0].value
    solution, ct = solve_by_minibatches()
    assert solution.converged.all()
    assert (solution.value - exact).norm() < 5e-3 * exact.norm()
    count = int(solution.iterations.max())
    assert ct.log == ["initial"] + [4 if k % 10 else "full" for k in range(count)]
    full = ct.log.count("full")
    assert solution.operator_calls == pytest.approx(full + (count - full) * 4 / VIEWS)


@pytest.mark.exhaustive
def test_variance_reduction_and_tails_lower_the_floor_that_momentum_raises():
    exact = solve_by_minibatches(minibatch_size=None, solver=Anderson(500, 1e-5))[0].value

    def error(solver, variance_reduction: bool = False) -> float:
        squares = []
        for seed in range(5):
            solution, _ = solve_by_minibatches(
                seed=seed, solver=solver, variance_reduction=variance_reduction, on_failure="ignore"
            )
            squares.append(float((solution.value - exact).square().sum() / exact.square().sum()))
        return math.sqrt(sum(squares) / len(squares))

    settings = {"max_iterations": 150, "tolerance": 1e-9}
    official = error(Nesterov(**settings, restart=False, tail=None, check_every=None))
    plain = error(Picard(**settings, tail=None, check_every=None))
    assert official > 2 * plain
    assert error(Nesterov(**settings, tail=Average())) < 0.5 * official
    assert error(Nesterov(**settings), variance_reduction=True) < 0.1 * plain


def test_oder_is_the_published_iteration(y):
    ct = ParallelBeamCT(SIZE, VIEWS, sampling="stratified")
    norm = ct.norm_squared()
    for chosen in (0.3, None):
        seeds = (torch.Generator().manual_seed(7) for _ in range(2))
        model = oder(Blur(), 0.1, 4, step_size=chosen, max_iterations=20, generator=next(seeds))
        generator, denoiser, t = next(seeds), Blur(), 1.0
        step, tau = (chosen or 1 / (ct.minibatch_norm_squared(4) / norm + 0.2)) / norm, 0.1 * norm
        x = s = ct.initial(y).clamp(min=0)
        for _ in range(20):
            blocks = ct.draw_blocks(4, generator)
            few = ParallelBeamCT(SIZE, ct.angles[blocks])
            last, prior = x, s - denoiser(s[:, None])[:, 0]
            gradient = VIEWS / 4 * few.adjoint(few(s) - y[:, blocks])
            x = (s - step * (gradient + tau * prior)).clamp(min=0)
            t_next = 0.5 * (1 + math.sqrt(1 + 4 * t**2))
            s = x + (t - 1) / t_next * (x - last)
            t = t_next
        torch.testing.assert_close(model(y, ct), x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variance_reduction", [True, False])
def test_the_same_seed_gives_the_same_bits(variance_reduction):
    options = {"variance_reduction": variance_reduction, "on_failure": "ignore", "solver": Nesterov(25, 1e-7)}
    values = [solve_by_minibatches(seed=seed, **options)[0].value for seed in (0, 0, 1)]
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])


def test_corrected_minibatch_gradients_are_unbiased_and_exact_at_the_anchor(ct, y):
    x, there = images(dtype=torch.float64), images(dtype=torch.float64).flip(0)
    model = DEQRED(Blur().double(), tau=1e-9, step=GradientStep(1.0, 4))
    with torch.no_grad(), model._problem(y.double(), ct, None) as (red, _, _):

        def gradient(at: Tensor, blocks: Tensor | None, anchor=()) -> Tensor:
            step = red.step(at, blocks=blocks, anchor=anchor)
            return (at - step.image) / red.step_size

        anchor = red.step(there).anchor
        exact = gradient(x, None)
        torch.testing.assert_close(gradient(there, red.draw(), anchor), gradient(there, None))
        draws = torch.stack([gradient(x, red.draw(), anchor) for _ in range(400)])
    assert (draws.mean(0) - exact).norm() < 0.1 * (draws[0] - exact).norm()


def test_gradients_by_minibatches_are_those_of_all_blocks(ct, y):
    gradients = []
    for size, solver in ((None, Anderson(500, 1e-4)), (4, Nesterov(500, 1e-3))):
        model = DEQRED(Blur(), tau=TAU, step=GradientStep(None, size), solver=solver)
        model.differentiation = Implicit(solver)
        (model(y, ct) - images()).square().sum().backward()
        gradients.append(float(model.denoiser.gain.grad))
    assert gradients[1] == pytest.approx(gradients[0], rel=3e-2)


@pytest.mark.parametrize("step", [*STEPS, GradientStep(None, 4)])
def test_an_image_does_not_depend_on_its_batch(ct, step):
    truth = torch.stack([torch.zeros(SIZE, SIZE), *images(), 100 * images(1)[0]]).double()
    y, start = ct(truth), torch.zeros(4, SIZE, SIZE, dtype=torch.float64)
    stochastic = getattr(step, "minibatch_size", None) is not None

    def solve(chosen: slice):
        model = DEQRED(
            Blur().double(),
            tau=TAU,
            step=step,
            solver=Nesterov(1000, 1e-5) if stochastic else Anderson(1000, 1e-5),
            generator=torch.Generator().manual_seed(0),
            nonnegative=True,
        )
        with torch.no_grad():
            return model(y[chosen], ct, start[chosen], return_solution=True)

    together = solve(slice(None))
    assert together.converged.all()
    assert together.iterations[0] == 1
    for i in range(4):
        alone = solve(slice(i, i + 1))
        torch.testing.assert_close(alone.value[0], together.value[i], rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------ the denoiser stays the same map


class Changing(nn.Module):
    """Batch norm, dropout and a spectral norm: a map that training mode would change from call to call."""

    def __init__(self, legacy: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        norm = nn.utils.spectral_norm if legacy else parametrizations.spectral_norm
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv = norm(nn.Conv2d(1, 4, 3, padding=1))
            self.norm = nn.BatchNorm2d(4)
            self.drop = nn.Dropout(0.5)
            self.last = norm(nn.Conv2d(4, 1, 3, padding=1))
        self.norm.running_var += torch.rand(4, generator=generator)
        self.norm.num_batches_tracked += 1

    def forward(self, x: Tensor) -> Tensor:
        return 0.3 * self.last(self.drop(torch.tanh(self.norm(self.conv(x)))))


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.spectral_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("differentiation", [Implicit(), JacobianFree(), Unrolled()])
def test_training_mode_does_not_change_the_map_while_it_is_solved(ct, y, differentiation, legacy):
    denoiser = Changing(legacy)
    model = DEQRED(denoiser, tau=TAU, solver=Picard(500, 1e-4), differentiation=differentiation)
    model(y, ct)  # each call in training mode takes one step of the power iteration
    results = []
    for training in (True, False):
        model.train(training)
        denoiser.zero_grad()
        x = model(y, ct)
        assert denoiser.drop.training == training
        running = denoiser.norm.running_mean.clone()
        x.square().sum().backward()
        assert torch.equal(running, denoiser.norm.running_mean)
        assert denoiser.drop.training == training
        results.append([x.detach(), *(p.grad.clone() for p in denoiser.parameters())])
    for trained, evaluated in zip(*results, strict=True):
        torch.testing.assert_close(trained, evaluated, rtol=1e-3, atol=1e-3 * float(evaluated.abs().max()))


@pytest.mark.parametrize("differentiation", [Implicit(), JacobianFree(), Unrolled()])
def test_evaluation_mode_has_gradients(ct, y, differentiation):
    denoiser = UNet(channels=(4, 8)).eval()
    model = DEQRED(
        denoiser, tau=TAU, solver=Picard(5), differentiation=differentiation, on_failure="ignore"
    ).eval()
    if isinstance(differentiation, Implicit):
        model.differentiation = Implicit(Picard(2), on_failure="jacobian_free")
        with pytest.warns(NotConvergedWarning):
            model(y, ct).square().sum().backward()
    else:
        model(y, ct).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in denoiser.parameters())


@pytest.mark.parametrize("differentiation", [Implicit(), JacobianFree(), Unrolled()])
def test_a_parametrized_weight_is_computed_once_per_solve_and_keeps_its_gradient(ct, y, differentiation):
    counts = []

    class Counted(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            counts.append(torch.is_grad_enabled())
            return weight / 3

    denoiser = nn.Conv2d(1, 1, 3, padding=1)
    nn.utils.parametrize.register_parametrization(denoiser, "weight", Counted())
    counts.clear()
    model = DEQRED(denoiser, tau=TAU, solver=Picard(500, 1e-3), differentiation=differentiation)
    solution = model(y, ct, return_solution=True)
    solution.value.sum().backward()
    assert int(solution.iterations.max()) > 3
    assert counts == [True]
    assert denoiser.parametrizations.weight.original.grad.abs().max() > 0


# ------------------------------------------------------------------ failure


def expanding(x: Tensor) -> Tensor:
    return 1e3 * x * x.abs()


@pytest.mark.parametrize("step", STEPS)
def test_divergence_says_what_to_change(ct, y, step):
    with pytest.raises(
        DivergenceError, match=r"lower (step_size or )?tau, or take a denoiser that"
    ) as caught:
        DEQRED(expanding, tau=TAU, step=step, on_failure="ignore")(y, ct)
    assert caught.value.solution.diverged.all()
    with pytest.raises(DivergenceError, match="lower step_size"):
        DEQRED(Blur(), tau=TAU, step=GradientStep(30.0), solver=Picard(500))(y, ct)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("nonnegative", [False, True])
def test_a_denoiser_that_returns_nan_is_no_result(ct, y, step, nonnegative):
    model = DEQRED(lambda x: x * math.nan, tau=TAU, step=step, nonnegative=nonnegative)
    with pytest.raises(DivergenceError, match="became NaN or infinite"):
        model(y, ct)


@pytest.mark.parametrize("wrong_adjoint", [False, True])
def test_an_inner_solve_that_runs_out_of_steps_is_told_and_counts(wrong_adjoint):
    # Few views and hardly a weight: no preconditioner helps.
    n = 24
    operator = ParallelBeamCT(n, 15)
    y = operator(torch.rand(1, n, n, generator=torch.Generator().manual_seed(0)))
    if wrong_adjoint:
        scan = operator
        operator = types.SimpleNamespace(A=scan, A_adjoint=lambda v: scan.adjoint(v) * 1.01)
    denoiser, tau = Blur(0.8).requires_grad_(False), 1e-6
    short = {"tau": tau, "solver": Anderson(8, 0.02), "on_failure": "ignore"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        solution = DEQRED(denoiser, **short)(y, operator, return_solution=True)
    assert "8 of its evaluations" in solution.message
    assert "the inner solve ran out of steps: raise tau" in solution.message
    assert "lower tau" not in solution.message
    assert not solution.converged.any()
    if not wrong_adjoint:
        eye = torch.eye(n * n, dtype=torch.float64).reshape(-1, n, n)
        weight = tau * operator.norm_squared()
        prior = eye - denoiser.double()(eye[:, None])[:, 0]
        matrix = operator.adjoint(operator(eye)) + weight * prior
        exact = torch.linalg.solve(matrix.flatten(1), operator.adjoint(y.double()).flatten())
        assert (solution.value.flatten() - exact).norm() < float(solution.distance) * exact.norm()
    told = DEQRED(denoiser.float(), tau=0.01)(y, operator, return_solution=True)
    assert told.converged.all()
    assert "ran out" not in told.message


def test_an_image_of_nothing_beside_one_whose_inner_solve_runs_out_of_steps():
    operator = ParallelBeamCT(24, 15)
    y = (
        operator(torch.rand(2, 24, 24, generator=torch.Generator().manual_seed(0)))
        * torch.tensor([0.0, 1.0])[:, None, None]
    )
    model = DEQRED(Blur(0.8).requires_grad_(False), tau=1e-6, solver=Anderson(8, 0.02), on_failure="ignore")
    solution = model(y, operator, return_solution=True)
    assert solution.converged.tolist() == [True, False]
    assert solution.distance[0] == 0
    assert not solution.value[0].any()


def test_what_does_not_converge_is_reported(ct, y):
    short = {"tau": TAU, "solver": Picard(3, 1e-6)}
    with pytest.warns(
        NotConvergedWarning, match="2 of 2 images are not within the relative distance 1e-06"
    ) as warned:
        DEQRED(Blur(), **short)(y, ct)
    assert warned[0].filename == __file__
    with pytest.raises(NotConvergedError, match="raise max_iterations"):
        DEQRED(Blur(), **short, on_failure="raise")(y, ct)
    solution = DEQRED(Blur(), **short, on_failure="ignore")(y, ct, return_solution=True)
    assert not solution.converged.any()
    assert solution.iterations.tolist() == [3, 3]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_data_that_is_not_finite_is_refused_with_its_index(ct, y, bad):
    model = DEQRED(Blur(), tau=TAU)
    y[1, 2, 3] = bad
    with pytest.raises(ValueError, match=rf"DEQRED: y must be finite, got {bad} at index \(1, 2, 3\)"):
        model(y, ct)
    x0 = images()
    x0[0, 4, 5] = bad
    with pytest.raises(ValueError, match=r"DEQRED: x0 must be finite, got .* at index \(0, 4, 5\)"):
        model(y.nan_to_num(0, 0), ct, x0)


def test_arguments_that_do_not_fit_are_refused(ct, y):
    model = DEQRED(Blur(), tau=TAU)
    n_bins = ct.n_bins
    for bad, error, message in [
        (y[0], ValueError, rf"DEQRED: y must have shape \(B, 12, {n_bins}\), got \(12, {n_bins}\)"),
        (y[:, 1:], ValueError, r"DEQRED: y must have shape \(B, 12"),
        (y[:0], ValueError, "DEQRED: y must hold at least one image"),
        (y.long(), TypeError, "DEQRED: y must be float32, float64, complex64 or complex128, got torch.int64"),
        (y.half(), TypeError, "got torch.float16; a denoiser runs in less by torch.autocast"),
        (y.bfloat16(), TypeError, "DEQRED: y must be float32"),
        (
            y.double(),
            TypeError,
            r"DEQRED: y must have the denoiser's precision \(torch.float32\), got torch.float64",
        ),
        (y.to("meta"), ValueError, r"DEQRED: y must be on the denoiser's device \(cpu\), got meta"),
        (y.tolist(), TypeError, "DEQRED: y must be a torch.Tensor, got list"),
        (ct, TypeError, "DEQRED: y must be a torch.Tensor, got ParallelBeamCT"),
    ]:
        with pytest.raises(error, match=message):
            model(bad, ct)
    for bad, message in [
        (images()[:, 1:], r"DEQRED: x0 must have shape \(B, 16, 16\), got \(2, 15, 16\)"),
        (images(3), r"DEQRED: x0 must hold as many images as y \(2\), got 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(y, ct, bad)
    with pytest.raises(
        ValueError, match=r"DEQRED: denoiser must return the shape it got, \(2, 1, 16, 16\), got"
    ):
        DEQRED(nn.Conv2d(1, 1, 3), tau=TAU)(y, ct)
    with pytest.raises(TypeError, match="operator"):
        model(y)
    with pytest.raises(
        TypeError, match=r"operator must be a MeasurementOperator, or have A\(x\) .* got Tensor"
    ):
        model(y, y)
    few = DEQRED(Blur(), tau=TAU, step=GradientStep(None, 13))
    with pytest.raises(
        ValueError, match=r"step\.minibatch_size must be at most 12, the blocks of ParallelBeamCT, got 13"
    ):
        few(y, ct)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tau": -1.0}, ValueError, "DEQRED: tau must be finite and above 0, got -1.0"),
        ({"tau": 0.0}, ValueError, "DEQRED: tau must be finite and above 0, got 0.0"),
        (
            {"tau": -1.0, "step": GradientStep()},
            ValueError,
            "DEQRED: tau must be finite and at least 0, got -1.0",
        ),
        ({"tau": math.nan}, ValueError, "DEQRED: tau must be finite"),
        ({"tau": "1"}, TypeError, "DEQRED: tau must be a float or a 0-d tensor, got str"),
        ({"tau": torch.ones(2)}, ValueError, "DEQRED: tau must be a float or a 0-d floating-point tensor"),
        ({"step": GradientStep(0.0)}, ValueError, "DEQRED: step_size must be finite and above 0, got 0.0"),
        (
            {"step": "proximal"},
            TypeError,
            "DEQRED: step must be ProximalStep or GradientStep, got 'proximal'",
        ),
        ({"solver": "nesterov"}, TypeError, "DEQRED: solver must be Solver, got 'nesterov'"),
        ({"differentiation": Implicit}, TypeError, "DEQRED: differentiation must be Differentiation"),
        ({"normalize": 1}, TypeError, "DEQRED: normalize must be bool or None, got 1"),
        ({"nonnegative": None}, TypeError, "DEQRED: nonnegative must be bool, got None"),
        ({"generator": 0}, TypeError, "DEQRED: generator must be Generator or None, got 0"),
        ({"on_failure": "pass"}, ValueError, "DEQRED: on_failure must be one of"),
        (
            {"denoiser": None},
            TypeError,
            "DEQRED: denoiser must be a module or function of images, got NoneType",
        ),
        (
            {"denoiser": ParallelBeamCT(SIZE, VIEWS)},
            TypeError,
            r"got ParallelBeamCT; the operator is given with the data, model\(y, operator\)",
        ),
        (
            {"step": GradientStep(None, 2), "solver": Anderson()},
            ValueError,
            "DEQRED: Anderson takes no minibatches",
        ),
        (
            {"step": GradientStep(None, 2), "differentiation": Implicit(Anderson())},
            ValueError,
            "DEQRED: Anderson takes no minibatches, and the adjoint solve would",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, error, message):
    options = {"denoiser": Blur(), "tau": TAU, **options}
    with pytest.raises(error, match=message):
        DEQRED(options.pop("denoiser"), **options)


@pytest.mark.parametrize("step", [ProximalStep, lambda size: GradientStep(None, size)])
@pytest.mark.parametrize("size", [0, 2.0, True])
def test_minibatches_of_no_blocks_are_refused(step, size):
    with pytest.raises(ValueError, match="Step: minibatch_size must be a whole number above 0 or None, got"):
        step(size)


def test_complex_images_cannot_be_projected():
    class Identity(nn.Module):
        def A(self, x):
            return x

        A_adjoint = A

    operator, y = Identity(), torch.ones(1, 4, 4, dtype=torch.complex64)
    model = DEQRED(Blur(channels=2), tau=0.1, nonnegative=True)
    with pytest.raises(ValueError, match=r"DEQRED: nonnegative needs real images, got torch\.complex64"):
        model(y, operator)
    model.nonnegative = False
    assert model(y, operator).dtype == torch.complex64


# ------------------------------------------------------------------ life in torch


def model_of(**options) -> DEQRED:
    options = {"tau": TAU, "solver": Anderson(100, 1e-4), **options}
    return DEQRED(Blur(0.9), **options)


def test_a_state_dict_goes_round(ct, y):
    def build(tau: float, step_size: float) -> DEQRED:
        tau, step_size = (nn.Parameter(torch.tensor(v)) for v in (tau, step_size))
        return model_of(tau=tau, step=GradientStep(step_size), solver=Anderson(500))

    model = build(0.04, 0.9)
    assert {"tau", "step_size", "denoiser.gain"} <= set(model.state_dict())
    assert {name for name, _ in model.named_parameters()} == {"tau", "step_size", "denoiser.gain"}
    other = build(1.0, 1.0)
    other.denoiser.gain.data.fill_(0.1)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(y, ct), model(y, ct))


def test_a_tensor_that_is_no_parameter_is_kept_too(ct, y):
    model = model_of(tau=torch.tensor(TAU))
    assert "tau" in model.state_dict()
    torch.testing.assert_close(model(y, ct), model_of()(y, ct))


def test_another_precision(ct, y):
    model = model_of(tau=nn.Parameter(torch.tensor(TAU)), solver=Anderson(200, 1e-4))
    single = model(y, ct)
    double = model.to(torch.float64)(y.double(), ct)
    assert double.dtype == torch.float64
    assert model.tau.dtype == torch.float64
    torch.testing.assert_close(single.double(), double, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_go_on_with_the_same_minibatches(ct, y, how):
    model = model_of(
        step=GradientStep(None, 4, variance_reduction=False),
        solver=Picard(50),
        generator=torch.Generator().manual_seed(5),
        on_failure="ignore",
    )
    with torch.no_grad():
        model(y, ct)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    with torch.no_grad():
        first = model(y, ct)
        assert torch.equal(other(y, ct), first)
        assert not torch.equal(model(y, ct), first)


def test_solutions_and_errors_can_be_pickled(ct, y):
    solution = model_of()(y, ct, return_solution=True)
    with torch.no_grad():
        solution = model_of()(y, ct, return_solution=True)
    copied = pickle.loads(pickle.dumps(solution))
    assert torch.equal(copied.value, solution.value)
    error = pickle.loads(pickle.dumps(NotConvergedError("message", solution)))
    assert str(error) == "message"
    assert torch.equal(error.solution.value, solution.value)


def test_autocast_lowers_the_denoiser_alone(ct, y):
    dtypes = []

    class Watched(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            denoised = super().forward(x)
            dtypes.append((x.dtype, denoised.dtype, torch.is_grad_enabled()))
            return denoised

    torch.manual_seed(0)
    denoiser = Watched(1, 1, 3, padding=1)
    model = DEQRED(denoiser, tau=TAU)
    results = []
    for enabled in (False, True):
        denoiser.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            x = model(y, ct)
            loss = (x - images()).square().sum()
        assert x.dtype == torch.float32
        loss.backward()
        results.append((x.detach(), denoiser.weight.grad.clone()))
    assert dtypes[0][1] == torch.float32
    assert dtypes[-1] == (torch.float32, torch.bfloat16, True)
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=0.02)
    error = (results[0][1] - results[1][1]).norm() / results[0][1].norm()
    assert error < 0.1


def test_autocast_keeps_the_gradient_of_weights_used_again(ct, y):
    # Weights that a solve without gradients has cast must not be kept for those who want gradients.
    torch.manual_seed(0)
    denoiser = nn.Conv2d(1, 1, 3, padding=1)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            DEQRED(denoiser, tau=TAU)(y, ct)
        denoiser(images()[:, None]).sum().backward()
    assert denoiser.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    "how",
    [
        pytest.param("torch.compile(model)", marks=pytest.mark.exhaustive),
        pytest.param("model.compile", marks=pytest.mark.exhaustive),
        "torch.compile(denoiser)",
    ],
)
def test_compiled_models_give_the_same_images_and_gradients(ct, y, how):
    torch._dynamo.reset()
    results, graphs = [], []

    def backend(graph, inputs):
        graphs.append(" ".join(str(node.target) for node in graph.graph.nodes))
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    for compiled in (False, True):
        model = model_of(
            step=GradientStep(None, 4), solver=Nesterov(300, 1e-3), generator=torch.Generator().manual_seed(0)
        )
        denoiser, run = model.denoiser, model
        if compiled and how == "torch.compile(model)":
            run = torch.compile(model, backend=backend)
        elif compiled and how == "model.compile":
            model.compile(backend=backend)
        elif compiled:
            model.denoiser = torch.compile(denoiser, backend=backend)
        with torch.no_grad():
            inferred = run(y, ct)
        x = run(y, ct)
        x.square().sum().backward()
        results.append((inferred, x.detach(), denoiser.gain.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)
    if how != "torch.compile(model)":
        assert any("conv2d" in graph for graph in graphs)


def test_the_linearization_of_a_compiled_denoiser_is_not_compiled(ct, y):
    # A compiled backward pass gives its buffers away after one use; the adjoint solve goes back again and again.
    torch._dynamo.reset()
    with_graph = []

    def backend(graph, inputs):
        def run(*args):
            with_graph.append(torch.is_grad_enabled())
            return graph(*args)

        return run

    model = model_of()
    model.compile(backend=backend)
    solution = model(y, ct, return_solution=True)
    assert solution.value.requires_grad
    assert len(with_graph) == int(solution.iterations.max())
    assert not any(with_graph)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_distributed_data_parallel(ct, y, tmp_path):
    expected = model_of()
    expected(y, ct).square().sum().backward()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = DistributedDataParallel(model_of())
        model(y, ct).square().sum().backward()
        torch.testing.assert_close(model.module.denoiser.gain.grad, expected.denoiser.gain.grad)
    finally:
        torch.distributed.destroy_process_group()


def test_networks_of_this_package(ct, y):
    for denoiser in (DnCNN(depth=3, width=8), UNet(channels=(4, 8))):
        model = DEQRED(denoiser, tau=0.1, solver=Anderson(5), on_failure="ignore")
        model.differentiation = JacobianFree()
        model(y, ct).square().sum().backward()
        assert all(p.grad is not None for p in denoiser.parameters())


# ------------------------------------------------------------------ what users bring along


class Scaled:
    """A physics that multiplies by a number."""

    def __init__(self, factor):
        self.factor = factor

    def A(self, x):
        return self.factor * x

    def A_adjoint(self, y):
        return self.factor * y


def test_an_operator_that_would_need_gradients_is_refused():
    y = torch.rand(1, 8, 8)
    with pytest.raises(ValueError, match="Scaled: the operator holds tensors that require gradients"):
        DEQRED(half, tau=0.3)(y, Scaled(torch.tensor(1.5, requires_grad=True)))


def test_a_physics_that_was_changed_has_another_norm():
    x, physics, model = torch.rand(1, 8, 8), Scaled(1.0), DEQRED(half, tau=1.0)
    model(physics.A(x), physics)
    physics.factor = 10.0
    # (100 + 100) x = 100 x_true + 100 x / 2
    torch.testing.assert_close(model(physics.A(x), physics), x * 100 / 150, rtol=2e-3, atol=0)


def test_a_physics_may_have_a_parameter_for_each_image():
    """As masks that are drawn for each; tau is then in units of the largest norm."""
    factors, x = torch.tensor([1.0, 10.0, 3.0]).reshape(3, 1, 1), torch.rand(3, 8, 8)
    physics, model = Scaled(factors), DEQRED(half, tau=1.0)
    for many in (3, 2, 3):
        physics.factor = factors[:many]
        square = physics.factor.square()
        expected = square * x[:many] / (square + 50)
        torch.testing.assert_close(model(physics.A(x[:many]), physics), expected, rtol=2e-2, atol=0)


class Twice(Scaled):
    """A physics that measures each image twice, as coils do: data have an axis more."""

    def A(self, x):
        return torch.stack((x, self.factor * x), 1)

    def A_adjoint(self, y):
        return y[:, 0] + self.factor * y[:, 1]


def test_data_of_a_physics_may_have_more_axes_than_images():
    """Several images of which none is like the other: a warning would be an error."""
    x, physics = torch.rand(3, 8, 8) * torch.tensor([1.0, 10.0, 0.1]).reshape(3, 1, 1), Twice(2.0)
    # (5 + 5) x = 5 x_true + 5 x / 2
    torch.testing.assert_close(DEQRED(half, tau=1.0)(physics.A(x), physics), x / 1.5, rtol=2e-2, atol=0)


def test_objects_that_cannot_be_remembered_are_operators_too():
    @dataclasses.dataclass
    class Physics(Scaled):
        factor: float

    x = torch.rand(1, 8, 8)
    torch.testing.assert_close(DEQRED(half, tau=1.0)(x, Physics(1.0)), x / 1.5, rtol=2e-3, atol=0)


def half(x: Tensor) -> Tensor:
    return 0.5 * x


def test_a_denoiser_that_changes_its_input_is_given_a_copy(ct, y):
    x0 = ct.fbp(y).abs()
    before = x0.clone()
    with torch.no_grad():
        got = DEQRED(lambda x: x.mul_(0.5), tau=0.1)(y, ct, x0)
        torch.testing.assert_close(got, DEQRED(half, tau=0.1)(y, ct, x0))
    assert torch.equal(x0, before)


def test_the_smallest_minibatches_of_views_converge():
    ct = ParallelBeamCT(8, 4)
    y = ct(torch.ones(1, 8, 8))
    expected = DEQRED(lambda x: 0 * x, tau=0.01, solver=Anderson(tolerance=1e-5))(y, ct)
    for step in (ProximalStep(1), GradientStep(minibatch_size=1)):
        model = DEQRED(lambda x: 0 * x, tau=0.01, step=step, solver=Picard(4000))
        torch.testing.assert_close(model(y, ct), expected, rtol=0, atol=5e-3)


def test_weights_that_are_no_parameters_get_gradients(ct, y):
    weight = torch.tensor(0.01, requires_grad=True)
    DEQRED(TotalVariation(weight), tau=0.05)(y, ct).sum().backward()
    assert weight.grad.abs() > 0


def test_a_tau_trained_below_zero_is_refused(ct, y):
    tau = nn.Parameter(torch.tensor(0.1))
    model = DEQRED(half, tau=tau)
    tau.data.fill_(-0.01)
    with pytest.raises(
        ValueError, match=r"tau must be above 0, got -0\.01; where it is trained, train its logarithm"
    ):
        model(y, ct)


def test_a_diverged_image_starts_anew(ct, y):
    grows = lambda x: torch.cat([50 * x[:1], 0.5 * x[1:]])  # noqa: E731
    solution = DEQRED(grows, tau=1.0, solver=Picard(50), on_failure="ignore")(y, ct, return_solution=True)
    assert solution.diverged.tolist() == [True, False]
    assert DEQRED(half, tau=1.0)(y, ct, solution).isfinite().all()


def test_results_can_be_changed_in_place(ct, y):
    scale = nn.Parameter(torch.tensor(0.5))
    DEQRED(lambda x: scale * x, tau=0.1)(y, ct).clamp_(min=0).sum().backward()
    assert scale.grad.abs() > 0


@pytest.mark.parametrize(
    "change",
    [
        lambda ct: ct.angles.mul_(0.5),
        lambda ct: setattr(ct, "angles", ct.angles.clone()),
    ],
)
def test_an_operator_changed_before_the_gradient_is_refused(y, change):
    ct = ParallelBeamCT(SIZE, VIEWS)
    value = DEQRED(Blur(), tau=0.1)(y.clone().requires_grad_(), ct).sum()
    change(ct)
    with pytest.raises(RuntimeError, match="ParallelBeamCT was changed between the solve and its gradient"):
        value.backward()
