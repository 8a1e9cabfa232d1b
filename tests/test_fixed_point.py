"""Solvers: what they find, when they stop, and what they say when they cannot."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from oder_fast.fixed_point import (
    Anderson,
    Average,
    DivergenceError,
    FixedPointMap,
    Implicit,
    Nesterov,
    NotConvergedError,
    NotConvergedWarning,
    Picard,
    Step,
)

SOLVERS = [Picard, Nesterov, Anderson]
SIZE = 12

pytestmark = pytest.mark.usefixtures("one_thread")


def spectrum_map(rates: list[float], seed: int = 0, dtype: torch.dtype = torch.float64):
    """A linear map with a symmetric matrix of given eigenvalues, and its fixed point (SIZE,)."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(SIZE, SIZE, dtype=dtype, generator=generator))
    values = torch.linspace(*rates, SIZE, dtype=torch.float64).to(dtype)
    matrix = (q * values) @ q.mH
    b = torch.randn(SIZE, dtype=dtype, generator=generator)
    fixed_point = torch.linalg.solve(torch.eye(SIZE, dtype=dtype) - matrix, b)
    return (lambda x: x @ matrix.T + b), fixed_point


@dataclass
class Noisy(FixedPointMap):
    """x -> T(x), and "minibatches" that add noise; logs which was evaluated."""

    matrix: Tensor
    b: Tensor
    generator: torch.Generator
    scale: float = 0.1
    log: list[str] | None = None

    stochastic = True

    def __call__(self, point: Tensor) -> Tensor:
        return point @ self.matrix.T + self.b

    def step(self, point, accuracy=None, previous=None, momentum=None, blocks=None, anchor=()) -> Step:
        if self.log is not None:
            self.log.append("full" if blocks is None else "drawn")
        image = self(point)
        return self.finish(image if blocks is None else image + blocks, point, previous, momentum)

    def draw(self) -> Tensor:
        return self.scale * torch.randn(SIZE, dtype=torch.float64, generator=self.generator)


def noisy_map(seed: int = 0, **options) -> tuple[Noisy, Tensor]:
    function, fixed_point = spectrum_map([0.0, 0.9])
    matrix = (
        function(torch.eye(SIZE, dtype=torch.float64)) - function(torch.zeros(SIZE, dtype=torch.float64))
    ).T
    b = function(torch.zeros(SIZE, dtype=torch.float64))
    return Noisy(matrix, b, torch.Generator().manual_seed(seed), **options), fixed_point


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
def test_finds_the_fixed_point(solver, dtype):
    function, expected = spectrum_map([-0.3, 0.95], dtype=dtype)
    tolerance = 1e-10 if dtype in (torch.float64, torch.complex128) else 2e-5
    solution = solver(tolerance=tolerance, max_iterations=1000).solve(
        function, torch.zeros(3, SIZE, dtype=dtype)
    )
    assert solution.converged.all()
    assert solution.value.dtype == dtype
    assert (solution.distance <= tolerance).all()
    torch.testing.assert_close(
        solution.value, expected.expand(3, -1), rtol=10 * tolerance, atol=10 * tolerance
    )


def test_acceleration_pays():
    function, _ = spectrum_map([0.0, 0.99])
    start = torch.zeros(1, SIZE, dtype=torch.float64)
    count = {
        s: int(s(tolerance=1e-8, max_iterations=5000).solve(function, start).iterations) for s in SOLVERS
    }
    assert count[Nesterov] < count[Picard] / 4
    assert count[Anderson] < count[Nesterov] / 2


def test_nesterov_without_restart_is_the_official_iteration():
    function, _ = spectrum_map([0.0, 0.95])
    x = s = torch.zeros(1, SIZE, dtype=torch.float64)
    t = 1.0
    for _ in range(15):
        last, x = x, function(s)
        t_next = 0.5 * (1 + math.sqrt(1 + 4 * t**2))
        s = x + (t - 1) / t_next * (x - last)
        t = t_next
    solution = Nesterov(restart=False, max_iterations=15).solve(function, torch.zeros_like(x))
    torch.testing.assert_close(solution.value, x, rtol=1e-13, atol=1e-13)


def test_restart_removes_the_ripples_of_momentum():
    function, _ = spectrum_map([0.0, 0.95])
    start = torch.zeros(1, SIZE, dtype=torch.float64)
    plain, restarted = (
        int(Nesterov(restart=r, tolerance=1e-10, max_iterations=3000).solve(function, start).iterations)
        for r in (False, True)
    )
    assert restarted < 0.7 * plain


# ------------------------------------------------------------------ Anderson


@pytest.mark.parametrize("unit", [1e-9, 1.0, 1e9])
def test_anderson_does_not_depend_on_the_unit(unit):
    function, _ = spectrum_map([0.0, 0.99])
    start = torch.zeros(1, SIZE, dtype=torch.float64)
    one = Anderson(tolerance=1e-9).solve(function, start)
    other = Anderson(tolerance=1e-9).solve(lambda x: unit * function(x / unit), start)
    assert torch.equal(one.iterations, other.iterations)
    torch.testing.assert_close(other.value / unit, one.value, rtol=1e-6, atol=1e-9)
    assert int(one.iterations) < 100


def test_anderson_rejects_what_makes_the_residual_grow():
    # A kinked map, where mixing across the kinks overshoots.
    matrix = torch.linspace(0.2, 0.98, SIZE, dtype=torch.float64)
    rotation = spectrum_map([0.0, 1.0], seed=3)[0]
    b = rotation(torch.zeros(SIZE, dtype=torch.float64))

    def function(x: Tensor) -> Tensor:
        return (matrix * x + b).clamp(min=0) + 0.01 * (x.abs() - 1).clamp(min=0)

    solution = Anderson(tolerance=1e-10, memory=3).solve(
        function, 5 * torch.ones(1, SIZE, dtype=torch.float64)
    )
    assert solution.converged.all()
    history = solution.residuals[:, 0]
    largest = torch.stack([history[max(0, k - 3) : k].max() for k in range(1, len(history))])
    grew = (history[1:] > largest * (1 + 1e-3)).nonzero().flatten()
    # After a rejected iterate comes the plain step.
    assert len(grew) > 0
    assert (history[grew + 2] <= largest[grew]).all()


def test_anderson_survives_a_mixed_iterate_that_is_nan():
    def function(x: Tensor) -> Tensor:
        y = 0.99 * x + 0.01
        return torch.where(x.abs().amax(1, keepdim=True) > 0.5, torch.nan, y) if len(calls) == 2 else y

    calls: list[int] = []

    def counted(x: Tensor) -> Tensor:
        calls.append(1)
        return function(x)

    solution = Anderson(tolerance=1e-6, max_iterations=2000).solve(
        counted, torch.zeros(1, 3, dtype=torch.float64)
    )
    assert solution.value.isfinite().all()


def test_anderson_refuses_minibatches():
    function, _ = noisy_map()
    with pytest.raises(ValueError, match="Anderson takes no minibatches: use Nesterov or Picard"):
        Anderson().solve(function, torch.zeros(1, SIZE, dtype=torch.float64))


# ------------------------------------------------------------------ batches


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_cold_image_among_warm_ones_goes_on(solver):
    function, fixed_point = spectrum_map([0.0, 0.9])
    cold = fixed_point + 100
    batch = torch.stack([fixed_point + 1e-14, cold, fixed_point + 1e-3])
    solver = solver(tolerance=1e-9, max_iterations=1000)
    solution = solver.solve(function, batch)
    assert solution.converged.all()
    assert int(solution.iterations[0]) <= 2 < int(solution.iterations[2]) < int(solution.iterations[1])
    for i, image in enumerate(batch):
        alone = solver.solve(function, image[None])
        assert int(alone.iterations) == int(solution.iterations[i])
        torch.testing.assert_close(alone.value[0], solution.value[i], rtol=1e-12, atol=1e-12)
    known = ~solution.residuals.isnan()
    assert torch.equal(known.sum(0), solution.iterations)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_converged_image_freezes(solver):
    rates = torch.tensor([0.9, 0.1, 0.8, 0.1], dtype=torch.float64)
    start = torch.zeros(4, 5, dtype=torch.float64)
    solver = solver(tolerance=1e-8, max_iterations=500)
    solution = solver.solve(lambda x: rates[:, None] * x + 1, start)
    assert len(set(solution.iterations.tolist())) > 1
    for i in range(4):
        alone = solver.solve(lambda x, i=i: rates[i] * x + 1, start[:1])
        assert int(alone.iterations) == int(solution.iterations[i])
        assert torch.equal(alone.value[0], solution.value[i])


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match=r"Picard: start must hold at least one image, got \(0, 3\)"):
        Picard().solve(lambda x: x, torch.zeros(0, 3))


def test_zero_is_a_fixed_point_like_any_other():
    solution = Nesterov().solve(lambda x: 0.5 * x, torch.zeros(2, 3))
    assert solution.converged.all()
    assert solution.iterations.tolist() == [1, 1]


# ------------------------------------------------------------------ what contracts, converges


class Contractions(FixedPointMap):
    """Random maps x -> rho f(W2 f(W1 x + b)) + c, one an image, that contract by rho at most.

    By turns: a matrix that is not symmetric, a network with spectral norms 1, a rotation, a symmetric matrix near 1.
    """

    def __init__(self, count: int, size: int) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(count, *shape, dtype=torch.float64, generator=generator)

        kind = torch.arange(count) % 4
        first, second = (
            w / torch.linalg.matrix_norm(w, 2)[:, None, None] for w in (draw(size, size), draw(size, size))
        )
        rotation = torch.linalg.qr(draw(size, size))[0]
        values = torch.rand(count, 1, size, dtype=torch.float64, generator=generator)
        symmetric = (rotation * values) @ rotation.mT
        one = torch.eye(size, dtype=torch.float64)
        index = kind[:, None, None]
        self.network = kind[:, None] == 1
        self.first = torch.where(index == 1, first, torch.where(index == 2, rotation, one))
        self.second = torch.where(index < 2, second, torch.where(index == 2, one, symmetric))
        self.rho = 0.5 + 0.49 * torch.rand(count, 1, dtype=torch.float64, generator=generator)
        self.b, self.c = draw(size), draw(size).requires_grad_()

    def __call__(self, point: Tensor) -> Tensor:
        hidden = torch.einsum("bij,bj->bi", self.first, point)
        hidden = torch.where(self.network, torch.relu(hidden + self.b), hidden)
        return self.rho * torch.einsum("bij,bj->bi", self.second, hidden) + self.c


def test_200_maps_that_contract_converge_and_the_distance_told_bounds_the_true_one():
    # The defaults, but for the number of iterations: rotations by 0.99 take a few hundred.
    maps, adjoint = Contractions(200, 24), Anderson(1000, 1e-2, memory=8)
    start = torch.zeros(200, 24, dtype=torch.float64)
    with torch.no_grad():
        exact = Anderson(2000, 1e-10).solve(maps, start).value
        bound = (maps(exact) - exact).norm(dim=1, keepdim=True) / (1 - maps.rho)
        assert (bound < 1e-7 * exact.norm(dim=1, keepdim=True)).all()
    solution = Implicit(adjoint).solve(maps, start, Anderson(1000))
    assert solution.converged.all()
    assert (solution.distance <= Anderson().tolerance).all()
    true = ((solution.value - exact).norm(dim=1) / exact.norm(dim=1)).detach()
    assert (true <= Anderson().tolerance).all()
    # An estimate: of two symmetric maps, nearly done, it is up to 1.5 times too small.
    assert (true <= 1.6 * solution.distance).all()
    assert float((true <= solution.distance).double().mean()) >= 0.98

    probe = torch.randn(start.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (found,) = torch.autograd.grad(solution.value, maps.c, probe)
    point = solution.value.detach().requires_grad_()
    image = maps(point)
    rows = [torch.autograd.grad(image[:, i].sum(), point, retain_graph=True)[0] for i in range(24)]
    matrix = torch.eye(24, dtype=torch.float64) - torch.stack(rows, 1)
    expected = torch.linalg.solve(matrix.mT, probe)
    (backward,) = solution.adjoint
    assert backward.converged.all()
    assert ((found - expected).norm(dim=1) <= 1.6 * backward.distance * expected.norm(dim=1)).all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_rotation_that_contracts_converges_with_every_solver(solver):
    turn = torch.tensor([[0.0, -0.95], [0.95, 0.0]], dtype=torch.float64)
    solution = solver(tolerance=1e-6, max_iterations=3000).solve(
        lambda x: x @ turn.T + 1, torch.zeros(1, 2, dtype=torch.float64)
    )
    assert solution.converged.all()


# ------------------------------------------------------------------ failure


@pytest.mark.parametrize("solver", [Picard, Nesterov])
def test_divergence_is_an_error_that_carries_the_state(solver):
    solution = solver(max_iterations=2000).solve(lambda x: 1.5 * x + x.abs() ** 1.5 + 1, torch.ones(2, 3))
    assert solution.diverged.all()
    assert solution.value.isnan().all()
    for policy in ("raise", "warn", "ignore"):
        with pytest.raises(
            DivergenceError, match=rf"{solver.__name__}: .*iterate a map that contracts"
        ) as caught:
            solution.require(policy)
        assert caught.value.solution is solution


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_image_that_is_lost_costs_the_others_nothing(solver, bad):
    def function(x: Tensor) -> Tensor:
        return torch.where(torch.tensor([[False], [True]])[: len(x)], bad, 0.5 * x + 1)

    solution = solver().solve(function, torch.ones(2, 3))
    assert solution.diverged.tolist() == [False, True]
    assert solution.value[1].isnan().all()
    assert torch.equal(solution.value[:1], solver().solve(function, torch.ones(1, 3)).value)
    with pytest.raises(DivergenceError, match=r"became NaN or infinite by iteration 1 \(images \[1\] of 2\)"):
        solution.require("raise")
    with pytest.warns(NotConvergedWarning, match="became NaN or infinite"):
        solution.require("warn")


@pytest.mark.parametrize("check_every", [None, 10])
def test_nan_in_the_last_minibatch_is_an_error(check_every):
    function, _ = noisy_map(scale=math.nan)
    solution = Picard(tail=None, check_every=check_every).solve(
        function, torch.zeros(1, SIZE, dtype=torch.float64)
    )
    with pytest.raises(DivergenceError, match="NaN"):
        solution.require("ignore")


def test_anderson_does_not_return_what_has_no_fixed_point():
    assert not Anderson().solve(lambda x: x + 1 + x.square(), torch.ones(2, 3)).converged.any()


def test_momentum_diverges_where_the_map_overshoots_and_is_taken_away():
    # Eigenvalues of T' below -1/3: Picard contracts, momentum does not.
    function, _ = spectrum_map([-0.6, 0.5])
    start = torch.zeros(1, SIZE, dtype=torch.float64)
    assert Picard().solve(function, start).converged.all()
    assert Nesterov().solve(function, start).converged.all()
    lost = Nesterov(restart=False, max_iterations=500).solve(function, start)
    with pytest.raises(DivergenceError, match="grew far beyond its start"):
        lost.require("ignore")


def rotate(x: Tensor) -> Tensor:
    return torch.stack([-x[:, 1], x[:, 0]], 1) + 1


def test_a_map_that_does_not_contract_is_reported():
    solution = Picard(max_iterations=50).solve(rotate, torch.zeros(1, 2, dtype=torch.float64))
    assert not solution.converged.any()
    assert float(solution.contraction) > 0.99
    assert "1 of 1 images are not within the relative distance 0.001" in solution.message
    assert "the map hardly contracts: iterate a map that contracts" in solution.message
    with pytest.raises(NotConvergedError, match="hardly contracts") as caught:
        solution.require("raise")
    assert caught.value.solution is solution
    with pytest.warns(NotConvergedWarning, match="hardly contracts"):
        solution.require("warn")
    assert solution.require("ignore") is solution


def test_slow_convergence_says_how_many_iterations_would_do():
    function, _ = spectrum_map([0.0, 0.95])
    start = torch.zeros(1, SIZE, dtype=torch.float64)
    short = Picard(max_iterations=60, tolerance=1e-8).solve(function, start)
    assert 0.94 < float(short.contraction) < 0.96
    more = int(short.message.split("about ")[2].split(" ")[0])
    needed = int(Picard(max_iterations=2000, tolerance=1e-8).solve(function, start).iterations) - 60
    assert abs(more - needed) < 0.1 * needed


def test_a_tolerance_below_rounding_is_named():
    function, _ = spectrum_map([0.0, 0.9], dtype=torch.float32)
    solution = Picard(tolerance=1e-9).solve(function, torch.zeros(1, SIZE))
    assert solution.converged.all() or "rounding of torch.float32" in solution.message


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Picard(max_iterations=0), "Picard: max_iterations must be a whole number above 0, got 0"),
        (lambda: Picard(check_every=0), "Picard: check_every must be a whole number above 0, got 0"),
        (
            lambda: Nesterov(tolerance=math.nan),
            "Nesterov: tolerance must be a finite number above 0, got nan",
        ),
        (lambda: Nesterov(tolerance=-1.0), "Nesterov: tolerance must be a finite number above 0"),
        (lambda: Anderson(memory=0), "Anderson: memory must be a whole number above 0, got 0"),
        (lambda: Anderson(ridge=-1.0), "Anderson: ridge must be a finite number, at least 0"),
        (lambda: Average(share=0.0), r"Average: share must lie in \(0, 1\], got 0.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ------------------------------------------------------------------ minibatches


def test_a_minibatch_residual_is_never_tested():
    # At the fixed point the minibatches still move the iterate by far more than the tolerance, and a
    # minibatch that happens to move it little is no proof either: only the full map counts.
    function, fixed_point = noisy_map(log=[])
    solution = Picard(tail=None, max_iterations=50).solve(function, fixed_point[None])
    assert solution.iterations.tolist() == [1]
    assert function.log == ["full"]
    solution = Picard(tail=None, max_iterations=55, tolerance=1e-12).solve(function, fixed_point[None] + 1)
    assert solution.residual_iterations.tolist() == [1, 11, 21, 31, 41, 51, 55]
    assert function.log.count("full") == 1 + 7
    assert not solution.converged.any()
    assert "it is the minibatches' noise" in solution.message


def test_the_reported_residual_is_that_of_the_full_map():
    function, fixed_point = noisy_map()
    points: list[Tensor] = []

    class Watched(Noisy):
        def step(self, point, *args, **options):
            points.append(point)
            return super().step(point, *args, **options)

    watched = Watched(function.matrix, function.b, function.generator)
    for tail in (None, Average()):
        solution = Picard(tail=tail, max_iterations=40, tolerance=1e-12).solve(watched, fixed_point[None] + 1)
        # The best of the tested ones; with a tail the mean, tested last.
        best = int(solution.residuals.nan_to_num(math.inf).argmin()) if tail is None else -1
        image = function(points[int(solution.residual_iterations[best]) - 1 if tail is None else -1])
        torch.testing.assert_close(solution.value, image)
        last = function(points[-1])
        expected = (last - points[-1]).norm() / last.norm()
        torch.testing.assert_close(solution.residual, expected[None].double())
        points.clear()


@pytest.mark.parametrize("tail", [None, Average()])
@pytest.mark.parametrize("solver", [Picard, Nesterov])
def test_the_same_seed_gives_the_same_bits(solver, tail):
    start = torch.zeros(2, SIZE, dtype=torch.float64)
    values = [
        solver(tail=tail, max_iterations=40, tolerance=1e-12).solve(noisy_map(seed)[0], start).value
        for seed in (0, 0, 1)
    ]
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])


def test_a_tail_lowers_the_noise_of_minibatches_and_momentum_raises_it():
    def error(solver) -> float:
        squares = []
        for seed in range(8):
            function, fixed_point = noisy_map(seed)
            value = solver.solve(function, torch.zeros(1, SIZE, dtype=torch.float64)).value
            squares.append(float((value - fixed_point).square().sum()))
        return math.sqrt(sum(squares) / len(squares))

    settings = {"max_iterations": 300, "tolerance": 1e-12, "check_every": None}
    plain = error(Picard(tail=None, **settings))
    official = error(Nesterov(restart=False, tail=None, **settings))
    assert official > 1.5 * plain
    assert error(Nesterov(tail=None, **settings)) < official
    assert error(Picard(**settings)) < 0.75 * plain
    assert error(Nesterov(**settings)) < 0.9 * plain


def test_without_tests_all_iterations_run():
    function, _ = noisy_map(log=[])
    start = torch.zeros(1, SIZE, dtype=torch.float64)
    solution = Nesterov(check_every=None, tail=None, max_iterations=17).solve(function, start)
    assert function.log == ["drawn"] * 17
    assert len(solution.residuals) == 0
    assert "no residual was taken" in solution.message
    deterministic, _ = spectrum_map([0.0, 0.5])
    assert Picard(check_every=None, max_iterations=60).solve(deterministic, start).iterations.tolist() == [60]
