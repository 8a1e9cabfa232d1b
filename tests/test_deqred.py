"""DEQRED: the map it iterates, what it calls how often, and how it lives in the rest of torch."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations

from oder_fast.denoisers import DnCNN, UNet
from oder_fast.deqred import DEQRED, Fidelity, as_channels, from_channels
from oder_fast.fixed_point import (
    Anderson,
    Average,
    Decay,
    DivergenceError,
    Implicit,
    JacobianFree,
    Nesterov,
    NotConvergedError,
    NotConvergedWarning,
    Picard,
    Unrolled,
)
from oder_fast.operators import ParallelBeamCT

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
    """A scan that records the number of blocks of each call, "full" for all."""

    def __init__(self, **options) -> None:
        super().__init__(SIZE, VIEWS, **options)
        self.log: list[object] = []

    def gradient(self, x, y, blocks=None):
        self.log.append("full" if blocks is None else len(blocks))
        return super().gradient(x, y, blocks)

    def red_update(self, x, y, blocks, *args, **options):
        self.log.append("full" if blocks is None else len(blocks))
        return super().red_update(x, y, blocks, *args, **options)

    def forward(self, x):
        self.log.append("forward")
        return super().forward(x)

    def adjoint(self, y):
        self.log.append("adjoint")
        return super().adjoint(y)

    def initial(self, y):
        self.log.append("initial")
        return super().initial(y)


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


TAU = 30.0


# ------------------------------------------------------------------ the map


@pytest.mark.parametrize("nonnegative", [False, True])
def test_the_fixed_point_is_one_of_the_map_as_written(ct, y, nonnegative):
    ct, y, denoiser = ct.double(), y.double() - 5, Blur().double()
    step_size = 1 / (ct.norm_squared() + 2 * TAU)
    model = DEQRED(ct, denoiser, tau=TAU, nonnegative=nonnegative, solver=Nesterov(2000, 1e-12))
    x = model(y).detach()
    image = x - step_size * (ct.adjoint(ct(x) - y) + TAU * (x - denoiser(x[:, None])[:, 0]))
    if nonnegative:
        image = image.clamp(min=0)
        assert 0 < float((x == 0).double().mean()) < 1
    assert model.current_step_size() == pytest.approx(step_size)
    torch.testing.assert_close(image, x, rtol=1e-9, atol=1e-9)


def test_the_start_is_the_operators_or_the_users(ct, y):
    model = DEQRED(ct, Blur(), tau=TAU, solver=Picard(1), on_failure="ignore")
    step = DEQRED(ct, Blur(), tau=TAU, solver=Picard(2), on_failure="ignore")
    assert torch.equal(model(y, model(y)), step(y))
    assert torch.equal(model(y), model(y, ct.initial(y)))


class Gradient(nn.Module):
    """An operator of somebody else: nothing but a gradient."""

    def __init__(self, ct: ParallelBeamCT) -> None:
        super().__init__()
        self.ct = ct

    def gradient(self, x, y):
        return self.ct.adjoint(self.ct(x) - y)


class Physics(nn.Module):
    """What deepinv calls a physics: images and data with a channel axis."""

    def __init__(self, ct: ParallelBeamCT) -> None:
        super().__init__()
        self.ct = ct

    def A(self, x):
        return self.ct(x[:, 0])[:, None]

    def A_adjoint(self, y):
        return self.ct.adjoint(y[:, 0])[:, None]


@pytest.mark.parametrize("make", [Gradient, Physics])
def test_other_operators_give_the_same_images_and_gradients(ct, y, make):
    ct, y = ct.double(), y.double()
    results = []
    for operator in (ct, make(ct)):
        torch.manual_seed(0)
        denoiser = Blur(0.9).double()
        model = DEQRED(
            operator, denoiser, tau=TAU, step_size=1 / 400, solver=Nesterov(3000, 1e-11), nonnegative=True
        )
        channel = isinstance(operator, Physics)
        x = model(y[:, None] if channel else y, ct.initial(y)[:, None] if channel else ct.initial(y))
        x.square().sum().backward()
        results.append((x[:, 0] if channel else x, denoiser.gain.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-7, atol=1e-9)


def test_a_physics_starts_from_its_adjoint(ct, y):
    model = DEQRED(Physics(ct), Blur(), tau=TAU, step_size=1 / 400, solver=Picard(1), on_failure="ignore")
    assert torch.equal(model(y[:, None]), model(y[:, None], ct.adjoint(y)[:, None]))


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


@pytest.mark.parametrize("solver", [Picard(500), Nesterov(500), Anderson(500)])
def test_each_iteration_calls_the_operator_and_the_denoiser_once(solver):
    ct, denoiser = CountingCT(), CountingBlur()
    y = ct(images())
    model = DEQRED(ct, denoiser, tau=TAU, solver=solver, on_failure="ignore")
    ct.log.clear()
    with torch.no_grad():
        solution = model(y, return_solution=True)
    count = int(solution.iterations.max())
    assert ct.log == ["initial"] + ["full"] * count
    assert denoiser.calls == count

    ct.log.clear()
    denoiser.calls = 0
    solution = model(y, return_solution=True)
    assert ct.log == ["initial"] + ["full"] * count
    assert denoiser.calls == count + 1  # the one with a graph
    ct.log.clear()
    solution.value.sum().backward()
    assert denoiser.calls == count + 1  # linearized once, for the whole adjoint solve
    assert ct.log == ["full"] * int(solution.adjoint[0].iterations.max())


def test_without_anything_to_train_there_is_no_graph(ct, y):
    denoiser = CountingBlur().requires_grad_(False)
    solution = DEQRED(ct, denoiser, tau=TAU, on_failure="ignore")(y, return_solution=True)
    assert not solution.value.requires_grad
    assert denoiser.calls == int(solution.iterations.max())


def test_the_step_size_is_computed_once(y, monkeypatch):
    calls = []
    monkeypatch.setattr(ParallelBeamCT, "norm_squared", lambda self: calls.append(1) or 500.0)
    model = DEQRED(ParallelBeamCT(SIZE, VIEWS), Blur(), tau=TAU, on_failure="ignore")
    model(y)
    model(y)
    assert len(calls) == 1
    assert model.current_step_size() == 1 / (500 + 2 * TAU)


def test_the_step_size_follows_tau_through_a_checkpoint(ct, y):
    saved = DEQRED(ct, Blur(), tau=nn.Parameter(torch.tensor(5000.0, dtype=torch.float64)))
    loaded = DEQRED(ct, Blur(), tau=nn.Parameter(torch.tensor(1.0, dtype=torch.float64)))
    loaded.load_state_dict(saved.state_dict())
    assert float(loaded.current_step_size()) == float(saved.current_step_size())
    assert torch.equal(loaded(y), saved(y))


# ------------------------------------------------------------------ minibatches


def solve_by_minibatches(**options) -> tuple[Tensor, CountingCT]:
    ct = CountingCT()
    y = ct(images())
    options = {"solver": Nesterov(200, 1e-5), "minibatch_size": 4, **options}
    seed = options.pop("seed", 0)
    model = DEQRED(ct, Blur(), tau=TAU, generator=torch.Generator().manual_seed(seed), **options)
    ct.log.clear()
    with torch.no_grad():
        return model(y, return_solution=True), ct


def test_minibatches_find_the_fixed_point_of_all_blocks():
    exact = solve_by_minibatches(minibatch_size=None, solver=Nesterov(500, 1e-6))[0].value
    solution, ct = solve_by_minibatches()
    assert solution.converged.all()
    assert (solution.value - exact).norm() < 2e-3 * exact.norm()
    count = int(solution.iterations.max())
    assert ct.log == ["initial"] + [4 if k % 10 else "full" for k in range(count)]


def test_variance_reduction_and_tails_lower_the_floor_that_momentum_raises():
    exact = solve_by_minibatches(minibatch_size=None, solver=Nesterov(500, 1e-6))[0].value

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
    for tail in (Average(), Decay()):
        assert error(Nesterov(**settings, tail=tail)) < 0.5 * official
    assert error(Nesterov(**settings), variance_reduction=True) < 0.01 * plain


def test_the_official_iteration_bit_for_bit(ct, y):
    model = DEQRED(
        ct,
        Blur(),
        tau=TAU,
        step_size=1e-3,
        minibatch_size=4,
        variance_reduction=False,
        nonnegative=True,
        solver=Nesterov(20, restart=False, tail=None, check_every=None),
        generator=torch.Generator().manual_seed(7),
        on_failure="ignore",
    )
    generator, denoiser, t = torch.Generator().manual_seed(7), Blur(), 1.0
    x = s = ct.initial(y).clamp(min=0)
    for _ in range(20):
        blocks = ct.draw_blocks(4, generator)
        last, prior = x, s - denoiser(s[:, None])[:, 0]
        x = (s - 1e-3 * (ct.gradient(s, y, blocks) + TAU * prior)).clamp(min=0)
        t_next = 0.5 * (1 + math.sqrt(1 + 4 * t**2))
        s = x + (t - 1) / t_next * (x - last)
        t = t_next
    torch.testing.assert_close(model(y), x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variance_reduction", [True, False])
def test_the_same_seed_gives_the_same_bits(variance_reduction):
    options = {"variance_reduction": variance_reduction, "on_failure": "ignore", "solver": Nesterov(25, 1e-7)}
    values = [solve_by_minibatches(seed=seed, **options)[0].value for seed in (0, 0, 1)]
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])


def test_corrected_minibatch_gradients_are_unbiased_and_exact_at_the_anchor(ct, y):
    ct, y = ct.double(), y.double()
    generator = torch.Generator().manual_seed(0)
    x, elsewhere = images(dtype=torch.float64), images(dtype=torch.float64).flip(0)
    one, zero = torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)

    def gradient(fidelity: Fidelity, at: Tensor) -> Tensor:
        return at - fidelity.red_update(at, at, one, zero).image

    fidelity = Fidelity(ct, y, 4, True, generator)
    torch.testing.assert_close(gradient(fidelity, elsewhere), ct.gradient(elsewhere, y))
    torch.testing.assert_close(gradient(fidelity.draw(), elsewhere), ct.gradient(elsewhere, y))
    draws = torch.stack([gradient(fidelity.draw(), x) for _ in range(400)])
    exact = ct.gradient(x, y)
    assert (draws.mean(0) - exact).norm() < 0.1 * (draws[0] - exact).norm()


@pytest.mark.parametrize(
    ("size", "expected"), [("same", {"full", 4}), (7, {"full", 7}), (None, {"full"}), (1, {"full", 1})]
)
def test_the_adjoint_has_its_own_minibatches(size, expected):
    ct = CountingCT()
    y = ct(images())
    differentiation = Implicit(Picard(25, 1e-9), minibatch_size=size)
    model = DEQRED(
        ct, Blur(), tau=TAU, minibatch_size=4, solver=Nesterov(200), differentiation=differentiation
    )
    x = model(y)
    ct.log.clear()
    with pytest.warns(NotConvergedWarning, match="Implicit, adjoint solve"):
        x.sum().backward()
    assert set(ct.log) == expected
    assert len(ct.log) == 25


@pytest.mark.parametrize("forward_size", [None, 4])
def test_gradients_by_minibatches_are_those_of_all_blocks(ct, y, forward_size):
    gradients = []
    for size, adjoint_size in ((None, None), (forward_size, 4)):
        denoiser = Blur()
        adjoint = Implicit(Nesterov(300, 1e-5), minibatch_size=adjoint_size)
        model = DEQRED(
            ct, denoiser, tau=TAU, minibatch_size=size, solver=Nesterov(300, 1e-5), differentiation=adjoint
        )
        (model(y) - images()).square().sum().backward()
        gradients.append(float(denoiser.gain.grad))
    assert gradients[1] == pytest.approx(gradients[0], rel=1e-2)


@pytest.mark.parametrize("minibatch_size", [None, 4])
def test_an_image_does_not_depend_on_its_batch(ct, minibatch_size):
    ct = ct.double()
    truth = torch.stack([torch.zeros(SIZE, SIZE), *images(), 100 * images(1)[0]]).double()
    y, start = ct(truth), torch.zeros(4, SIZE, SIZE, dtype=torch.float64)

    def solve(chosen: slice):
        generator = torch.Generator().manual_seed(0)
        model = DEQRED(
            ct,
            Blur().double(),
            tau=TAU,
            minibatch_size=minibatch_size,
            solver=Nesterov(500, 1e-9),
            generator=generator,
            nonnegative=True,
        )
        return model(y[chosen], start[chosen], return_solution=True)

    together = solve(slice(None))
    assert together.converged.all()
    assert together.iterations[0] == 1
    for i in range(4):
        alone = solve(slice(i, i + 1))
        assert alone.iterations[0] == together.iterations[i]
        torch.testing.assert_close(alone.value[0], together.value[i], rtol=1e-6, atol=1e-8)


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
    model = DEQRED(ct, denoiser, tau=TAU, solver=Nesterov(200, 1e-5), differentiation=differentiation)
    model(y)  # each call in training mode takes one step of the power iteration
    results = []
    for training in (True, False):
        model.train(training)
        denoiser.zero_grad()
        x = model(y)
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
        ct, denoiser, tau=TAU, solver=Picard(5), differentiation=differentiation, on_failure="ignore"
    ).eval()
    if isinstance(differentiation, Implicit):
        model.differentiation = Implicit(Picard(2), on_failure="jacobian_free")
        with pytest.warns(NotConvergedWarning):
            model(y).square().sum().backward()
    else:
        model(y).square().sum().backward()
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
    model = DEQRED(ct, denoiser, tau=TAU, solver=Nesterov(300, 1e-5), differentiation=differentiation)
    solution = model(y, return_solution=True)
    solution.value.sum().backward()
    assert int(solution.iterations.max()) > 5
    assert counts == [True]
    assert denoiser.parametrizations.weight.original.grad.abs().max() > 0


# ------------------------------------------------------------------ failure


def expanding(x: Tensor) -> Tensor:
    return 50 * x


def test_divergence_names_the_step_size(ct, y):
    with pytest.raises(DivergenceError, match="lower step_size or tau, try Anderson") as caught:
        DEQRED(ct, expanding, tau=TAU)(y)
    assert caught.value.solution.value.shape == (2, SIZE, SIZE)
    with pytest.raises(DivergenceError, match="lower step_size"):
        DEQRED(ct, Blur(), tau=TAU, step_size=1.0)(y)


def test_what_does_not_converge_is_reported(ct, y):
    short = {"tau": TAU, "solver": Picard(3, 1e-6)}
    with pytest.warns(
        NotConvergedWarning, match="2 of 2 images did not reach the relative residual 1e-06"
    ) as warned:
        DEQRED(ct, Blur(), **short)(y)
    assert warned[0].filename == __file__
    with pytest.raises(NotConvergedError, match="raise max_iterations"):
        DEQRED(ct, Blur(), **short, on_failure="raise")(y)
    solution = DEQRED(ct, Blur(), **short, on_failure="ignore")(y, return_solution=True)
    assert not solution.converged.any()
    assert solution.iterations.tolist() == [3, 3]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_data_that_is_not_finite_is_refused_with_its_index(ct, y, bad):
    model = DEQRED(ct, Blur(), tau=TAU)
    y[1, 2, 3] = bad
    with pytest.raises(ValueError, match=rf"DEQRED: y must be finite, got {bad} at index \(1, 2, 3\)"):
        model(y)
    x0 = images()
    x0[0, 4, 5] = bad
    with pytest.raises(ValueError, match=r"DEQRED: x0 must be finite, got .* at index \(0, 4, 5\)"):
        model(y.nan_to_num(0, 0), x0)


def test_arguments_that_do_not_fit_are_refused(ct, y):
    model = DEQRED(ct, Blur(), tau=TAU)
    n_bins = ct.n_bins
    for bad, error, message in [
        (y[0], ValueError, rf"DEQRED: y must have shape \(B, 12, {n_bins}\), got \(12, {n_bins}\)"),
        (y[:, 1:], ValueError, r"DEQRED: y must have shape \(B, 12"),
        (y[:0], ValueError, "DEQRED: y must hold at least one image"),
        (y.long(), TypeError, "DEQRED: y must be floating-point or complex, got torch.int64"),
        (
            y.double(),
            TypeError,
            r"DEQRED: y must have the denoiser's precision \(torch.float32\), got torch.float64",
        ),
        (y.to("meta"), ValueError, r"DEQRED: y must be on the denoiser's device \(cpu\), got meta"),
        (y.numpy(), TypeError, "DEQRED: y must be a torch.Tensor, got ndarray"),
    ]:
        with pytest.raises(error, match=message):
            model(bad)
    for bad, message in [
        (images()[:, 1:], r"DEQRED: x0 must have shape \(B, 16, 16\), got \(2, 15, 16\)"),
        (images(3), r"DEQRED: x0 must hold as many images as y \(2\), got 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(y, bad)
    with pytest.raises(
        ValueError, match=r"DEQRED: denoiser must return the shape it got, \(2, 1, 16, 16\), got"
    ):
        DEQRED(ct, nn.Conv2d(1, 1, 3), tau=TAU)(y)
    with pytest.raises(ValueError, match=r"DEQRED: Gradient has no initial\(y\): give x0"):
        DEQRED(Gradient(ct), Blur(), tau=TAU, step_size=1e-3)(y)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tau": -1.0}, ValueError, "DEQRED: tau must be finite and at least 0, got -1.0"),
        ({"tau": math.nan}, ValueError, "DEQRED: tau must be finite"),
        ({"tau": "1"}, TypeError, "DEQRED: tau must be a float or a 0-d tensor, got str"),
        ({"tau": torch.ones(2)}, ValueError, "DEQRED: tau must be a float or a 0-d floating-point tensor"),
        ({"step_size": 0.0}, ValueError, "DEQRED: step_size must be finite and above 0, got 0.0"),
        (
            {"minibatch_size": 13},
            ValueError,
            "DEQRED: minibatch_size must be a number from 1 to 12 blocks, got 13",
        ),
        (
            {"minibatch_size": 0},
            ValueError,
            "DEQRED: minibatch_size must be a number from 1 to 12 blocks, got 0",
        ),
        ({"minibatch_size": 2.0}, ValueError, "DEQRED: minibatch_size must be a number from 1 to 12"),
        (
            {"differentiation": Implicit(minibatch_size=13)},
            ValueError,
            "DEQRED: differentiation.minibatch_size must be a number from 1 to 12 blocks, got 13",
        ),
        ({"solver": "nesterov"}, TypeError, "DEQRED: solver must be a Solver, got 'nesterov'"),
        ({"differentiation": Implicit}, TypeError, "DEQRED: differentiation must be a Differentiation"),
        ({"generator": 0}, TypeError, "DEQRED: generator must be a torch.Generator, got int"),
        ({"on_failure": "pass"}, ValueError, "DEQRED: on_failure must be one of"),
        ({"denoiser": None}, TypeError, "DEQRED: denoiser must be callable, got NoneType"),
        ({"operator": object()}, TypeError, r"DEQRED: operator must have gradient\(x, y, blocks\)"),
        (
            {"operator": "gradient only"},
            ValueError,
            r"DEQRED: Gradient has no norm_squared\(\): give step_size",
        ),
        (
            {"operator": "gradient only", "step_size": 1.0, "minibatch_size": 2},
            ValueError,
            "DEQRED: minibatch_size needs an operator with n_blocks and draw_blocks",
        ),
        (
            {"minibatch_size": 2, "solver": Anderson()},
            ValueError,
            "DEQRED: Anderson takes no minibatches",
        ),
        (
            {"differentiation": Implicit(Anderson(), minibatch_size=3)},
            ValueError,
            "DEQRED: Anderson takes no minibatches",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(ct, options, error, message):
    if options.get("operator") == "gradient only":
        options = {**options, "operator": Gradient(ct)}
    options = {"operator": ct, "denoiser": Blur(), "tau": TAU, **options}
    with pytest.raises(error, match=message):
        DEQRED(options.pop("operator"), options.pop("denoiser"), **options)


def test_complex_images_cannot_be_projected():
    class Identity(nn.Module):
        def gradient(self, x, y):
            return x - y

    y = torch.ones(1, 4, 4, dtype=torch.complex64)
    model = DEQRED(Identity(), Blur(channels=2), tau=0.1, step_size=0.5, nonnegative=True)
    with pytest.raises(ValueError, match=r"DEQRED: nonnegative needs real images, got torch\.complex64"):
        model(y, torch.zeros_like(y))
    model.nonnegative = False
    assert model(y, torch.zeros_like(y)).dtype == torch.complex64


# ------------------------------------------------------------------ life in torch


def model_of(ct, **options) -> DEQRED:
    options = {"tau": TAU, "solver": Nesterov(100, 1e-4), **options}
    return DEQRED(ct, Blur(0.9), **options)


def test_in_a_sequence_of_modules(ct, y):
    model = nn.Sequential(nn.Identity(), model_of(ct), nn.Flatten())
    model(y).square().sum().backward()
    assert model[1].denoiser.gain.grad.abs() > 0


def test_a_state_dict_goes_round(ct, y):
    parameters = {"tau": nn.Parameter(torch.tensor(20.0)), "step_size": nn.Parameter(torch.tensor(2e-3))}
    model = model_of(ct, **parameters)
    assert {"tau", "step_size", "denoiser.gain"} <= set(model.state_dict())
    assert {name for name, _ in model.named_parameters()} == {"tau", "step_size", "denoiser.gain"}
    other = model_of(ct, tau=nn.Parameter(torch.tensor(1.0)), step_size=nn.Parameter(torch.tensor(1.0)))
    other.denoiser.gain.data.fill_(0.1)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(y), model(y))


def test_a_tensor_that_is_no_parameter_is_kept_too(ct, y):
    model = model_of(ct, tau=torch.tensor(TAU))
    assert "tau" in model.state_dict()
    torch.testing.assert_close(model(y), model_of(ct)(y))


def test_another_precision(ct, y):
    model = model_of(ct, tau=nn.Parameter(torch.tensor(TAU)), solver=Nesterov(200, 1e-5))
    single = model(y)
    double = model.to(torch.float64)(y.double())
    assert double.dtype == torch.float64
    assert model.tau.dtype == torch.float64
    torch.testing.assert_close(single.double(), double, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_go_on_with_the_same_minibatches(ct, y, how):
    model = model_of(
        ct,
        minibatch_size=4,
        generator=torch.Generator().manual_seed(5),
        differentiation=Implicit(warm_start=True),
        variance_reduction=False,
        on_failure="ignore",
    )
    with torch.no_grad():
        model(y)
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
        first = model(y)
        assert torch.equal(other(y), first)
        assert not torch.equal(model(y), first)


def test_solutions_and_errors_can_be_pickled(ct, y):
    solution = model_of(ct)(y, return_solution=True)
    with torch.no_grad():
        solution = model_of(ct)(y, return_solution=True)
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
    model = DEQRED(ct, denoiser, tau=TAU, solver=Nesterov(200, 1e-3))
    results = []
    for enabled in (False, True):
        denoiser.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            x = model(y)
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
            DEQRED(ct, denoiser, tau=TAU, solver=Nesterov(200, 1e-3))(y)
        denoiser(images()[:, None]).sum().backward()
    assert denoiser.weight.grad.abs().max() > 0


@pytest.mark.parametrize("how", ["torch.compile(model)", "model.compile", "torch.compile(denoiser)"])
def test_compiled_models_give_the_same_images_and_gradients(ct, y, how):
    torch._dynamo.reset()
    results, graphs = [], []

    def backend(graph, inputs):
        graphs.append(" ".join(str(node.target) for node in graph.graph.nodes))
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    for compiled in (False, True):
        model = model_of(ct, minibatch_size=4, generator=torch.Generator().manual_seed(0))
        denoiser, run = model.denoiser, model
        if compiled and how == "torch.compile(model)":
            run = torch.compile(model, backend=backend)
        elif compiled and how == "model.compile":
            model.compile(backend=backend)
        elif compiled:
            model.denoiser = torch.compile(denoiser, backend=backend)
        with torch.no_grad():
            inferred = run(y)
        x = run(y)
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

    model = model_of(ct)
    model.compile(backend=backend)
    solution = model(y, return_solution=True)
    assert solution.value.requires_grad
    assert len(with_graph) == int(solution.iterations.max())
    assert not any(with_graph)


def test_torch_export_traces_all_iterations(ct, y):
    model = model_of(ct, solver=Nesterov(20, 1e-12), on_failure="ignore").eval()
    with torch.no_grad():
        expected = model(y)
    batch = torch.export.Dim("batch", min=1, max=8)
    exported = torch.export.export(model, (y,), dynamic_shapes=({0: batch},), strict=False)
    torch.testing.assert_close(exported.module()(y), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(exported.module()(y[:1]), expected[:1], rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_distributed_data_parallel(ct, y, tmp_path):
    expected = model_of(ct)
    expected(y).square().sum().backward()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = DistributedDataParallel(model_of(ct))
        model(y).square().sum().backward()
        torch.testing.assert_close(model.module.denoiser.gain.grad, expected.denoiser.gain.grad)
    finally:
        torch.distributed.destroy_process_group()


def test_networks_of_this_package(ct, y):
    for denoiser in (DnCNN(depth=3, width=8), UNet(channels=(4, 8))):
        model = DEQRED(ct, denoiser, tau=1.0, solver=Nesterov(5), on_failure="ignore")
        model.differentiation = JacobianFree()
        model(y).square().sum().backward()
        assert all(p.grad is not None for p in denoiser.parameters())
