"""Gradients through fixed points: equal to those of the unrolled iterations and to finite differences."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from oder_fast.deqred import DEQRED
from oder_fast.fixed_point import (
    Anderson,
    DivergenceError,
    FixedPointMap,
    Implicit,
    JacobianFree,
    Nesterov,
    NotConvergedError,
    NotConvergedWarning,
    Picard,
    Unrolled,
)
from oder_fast.fixed_point import differentiation as differentiation_module
from oder_fast.operators import LeastSquares, MeasurementOperator
from oder_fast.red import GradientStep, ProximalStep

SIZE = 8
EXACT = {"tolerance": 1e-11, "max_iterations": 3000}
FORMS = ["gradient", "proximal"]
SOLVERS = {"picard": Picard(**EXACT), "nesterov": Nesterov(**EXACT), "anderson": Anderson(**EXACT)}

pytestmark = pytest.mark.usefixtures("one_thread")


class SmallDenoiser(nn.Module):
    """A contraction with weights."""

    def __init__(self, channels: int = 1, activation: type[nn.Module] = nn.Tanh) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, dtype=torch.float64)
        self.activation = activation()
        with torch.no_grad():
            self.conv.weight.copy_(0.3 * torch.rand(self.conv.weight.shape, generator=generator) / channels)
            self.conv.bias.fill_(-0.05)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.conv(x))


class Dense(MeasurementOperator):
    """A dense operator of well-conditioned blocks."""

    image_shape = (SIZE, SIZE)
    n_blocks = 6
    data_shape = (n_blocks, 20)

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        matrix = torch.randn(6 * 20, SIZE * SIZE, dtype=dtype, generator=torch.Generator().manual_seed(1))
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        values = torch.linspace(0.5, 1, SIZE * SIZE, dtype=torch.float64).to(dtype)
        self.matrix = ((u * values) @ v).reshape(6, 20, SIZE * SIZE)

    def forward(self, x: Tensor, blocks: Tensor | slice = slice(None)) -> Tensor:
        return (self.matrix[blocks] @ x.flatten(1).T).permute(2, 0, 1)

    def adjoint(self, y: Tensor, blocks: Tensor | slice = slice(None)) -> Tensor:
        matrix = self.matrix[blocks].flatten(0, 1)
        return (y.flatten(1) @ matrix.conj()).reshape(-1, SIZE, SIZE)

    def least_squares(self, y: Tensor) -> LeastSquares:
        return DenseLeastSquares(self, y)

    def draw_blocks(self, size: int, generator: torch.Generator | None = None) -> Tensor:
        return torch.randperm(6, generator=generator)[:size]

    def norm_squared(self) -> float:
        return 1.0

    def initial(self, y: Tensor) -> Tensor:
        return 0.1 * y.sum((1, 2))[:, None, None].expand(-1, SIZE, SIZE)


class DenseLeastSquares(LeastSquares):
    """Its data fidelity, with minibatches."""

    def _gradient(self, x: Tensor, blocks: Tensor | None) -> Tensor:
        chosen = slice(None) if blocks is None else blocks
        return self._normal(x, blocks) - self._scale(blocks) * self.operator.adjoint(
            self.y[:, chosen], chosen
        )

    def _normal(self, v: Tensor, blocks: Tensor | None) -> Tensor:
        chosen = slice(None) if blocks is None else blocks
        return self._scale(blocks) * self.operator.adjoint(self.operator(v, chosen), chosen)

    def _scale(self, blocks: Tensor | None) -> float:
        return 1.0 if blocks is None else 6 / len(blocks)


class Problem:
    """A small scan, a model, a loss, and the gradient of the loss in everything."""

    def __init__(
        self,
        *,
        form: str = "gradient",
        complex_images: bool = False,
        nonnegative: bool = False,
        minibatch_size: int | None = None,
        variance_reduction: bool = True,
        **options,
    ) -> None:
        dtype = torch.complex128 if complex_images else torch.float64
        self.operator, denoiser = Dense(dtype), SmallDenoiser(channels=2 if complex_images else 1)
        generator = torch.Generator().manual_seed(2)
        self.truth = torch.randn(2, SIZE, SIZE, dtype=dtype, generator=generator)
        self.y = self.operator(self.truth).requires_grad_()
        self.tau, self.step_size = (
            nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (0.3, 1 / 1.6)
        )
        self.form = form
        self.weights = torch.linspace(0.5, 1.5, SIZE, dtype=torch.float64)
        step = ProximalStep()
        if form == "gradient":
            step = GradientStep(self.step_size, minibatch_size, variance_reduction)
        self.model = DEQRED(
            denoiser,
            tau=self.tau,
            step=step,
            nonnegative=nonnegative,
            generator=torch.Generator().manual_seed(3),
            **options,
        )

    @property
    def leaves(self) -> dict[str, Tensor]:
        weight, bias = self.model.denoiser.parameters()
        leaves = {"weight": weight, "bias": bias, "tau": self.tau, "y": self.y}
        return leaves | ({"step_size": self.step_size} if self.form == "gradient" else {})

    def __call__(self, x0=None, **options):
        return self.model(self.y, self.operator, x0, **options)

    def loss(self) -> Tensor:
        return ((self() - self.truth).abs().square() * self.weights).sum()

    def gradients(self) -> dict[str, Tensor]:
        leaves = self.leaves
        return dict(zip(leaves, torch.autograd.grad(self.loss(), leaves.values()), strict=True))


def assert_gradients_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    # A fixed point does not depend on the step size: its gradient, zero, is measured by tau's, times their ratio.
    for name, gradient in found.items():
        difference = (gradient - expected[name]).norm()
        scale = expected["y"].norm() * 1e3 if name == "step_size" else expected[name].norm()
        assert difference <= tolerance * scale, (name, float(difference / scale))


@pytest.fixture(
    scope="module", params=[(form, kind) for form in FORMS for kind in ("real", "nonnegative", "complex")]
)
def kind(request):
    form, kind = request.param
    return {"form": form, "complex_images": kind == "complex", "nonnegative": kind == "nonnegative"}


@pytest.fixture(scope="module")
def unrolled(kind):
    return Problem(**kind, solver=SOLVERS["picard"], differentiation=Unrolled()).gradients()


def test_the_projection_is_active():
    problem = Problem(nonnegative=True, solver=SOLVERS["anderson"])
    active = (problem() == 0).double().mean()
    assert 0.1 < float(active) < 0.9


@pytest.mark.parametrize(
    ("forward", "adjoint"),
    [
        ("picard", "picard"),
        pytest.param("nesterov", "anderson", marks=pytest.mark.exhaustive),
        pytest.param("anderson", "nesterov", marks=pytest.mark.exhaustive),
        ("anderson", "anderson"),
    ],
)
def test_implicit_gradients_equal_unrolled_ones(kind, unrolled, forward, adjoint):
    problem = Problem(**kind, solver=SOLVERS[forward], differentiation=Implicit(SOLVERS[adjoint]))
    assert_gradients_close(problem.gradients(), unrolled, 1e-7)


def test_unrolled_gradients_agree_among_solvers(kind, unrolled):
    # Of Anderson, see test_unrolled_anderson_needs_more_iterations.
    found = Problem(**kind, solver=SOLVERS["nesterov"], differentiation=Unrolled()).gradients()
    assert_gradients_close(found, unrolled, 1e-7)


def test_implicit_gradients_equal_finite_differences(kind):
    problem = Problem(**kind, solver=SOLVERS["anderson"], differentiation=Implicit(SOLVERS["anderson"]))
    gradients = problem.gradients()
    generator = torch.Generator().manual_seed(5)
    for name, leaf in problem.leaves.items():
        direction = torch.randn(leaf.shape, dtype=leaf.dtype, generator=generator)
        direction = direction / direction.norm() * (leaf.detach().abs().mean() + 0.1)
        if name == "step_size":
            direction = 0.1 * leaf.detach()
        h, values = 1e-4, []
        for sign in (1, -1):
            with torch.no_grad():
                leaf += sign * h * direction
                values.append(problem.loss())
                leaf -= sign * h * direction
        difference = (values[0] - values[1]) / (2 * h)
        derivative = (gradients[name].conj() * direction).real.sum()
        scale = max(abs(float(difference)), float(values[0]) * 1e-3)
        assert abs(float(derivative - difference)) <= 1e-5 * scale, name


def test_both_forms_have_the_same_gradients():
    gradients = [
        Problem(
            form=form, solver=SOLVERS["anderson"], differentiation=Implicit(SOLVERS["anderson"])
        ).gradients()
        for form in FORMS
    ]
    assert_gradients_close(gradients[1], gradients[0], 1e-7)


@pytest.mark.parametrize(
    "differentiation", [Implicit(), pytest.param(Unrolled(), marks=pytest.mark.exhaustive)]
)
def test_minibatches_give_the_full_gradients(kind, unrolled, differentiation):
    if kind["form"] == "proximal":
        return
    solver = Nesterov(tolerance=1e-11, max_iterations=3000)
    problem = Problem(**kind, minibatch_size=5, solver=solver, differentiation=differentiation)
    assert_gradients_close(problem.gradients(), unrolled, 1e-6)


@pytest.mark.parametrize("variance_reduction", [True, False])
def test_unrolled_minibatches_are_the_same_when_computed_again(variance_reduction, monkeypatch):
    # Few iterations, so that the gradient depends on which minibatches were drawn.
    options = {
        "minibatch_size": 2,
        "variance_reduction": variance_reduction,
        "solver": Nesterov(8, 1e-12),
        "on_failure": "ignore",
        "differentiation": Unrolled(),
    }
    checkpointed = Problem(**options).gradients()
    monkeypatch.setattr(differentiation_module, "Checkpointed", lambda fixed_point_map: fixed_point_map)
    assert_gradients_close(checkpointed, Problem(**options).gradients(), 1e-12)
    monkeypatch.undo()
    other = Problem(**options)
    other.model.generator.manual_seed(99)
    with pytest.raises(AssertionError):
        assert_gradients_close(checkpointed, other.gradients(), 1e-3)


# ------------------------------------------------------------------ a plain callable


def scalar_problem(differentiation, rate: float = 0.5, solver=None) -> tuple[Tensor, Tensor, Tensor]:
    class Affine(FixedPointMap):
        def __call__(self, point: Tensor) -> Tensor:
            return factor * point + offset

    factor = torch.tensor(rate, dtype=torch.float64, requires_grad=True)
    offset = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    start = torch.zeros(1, 3, dtype=torch.float64)
    solver = Picard(**EXACT) if solver is None else solver
    solution = differentiation.solve(Affine(), start, solver)
    return solution, factor, offset


def test_implicit_knows_nothing_of_imaging():
    solution, factor, offset = scalar_problem(Implicit())
    gradients = torch.autograd.grad(solution.value.sum(), (factor, offset))
    # x = offset / (1 - factor)
    torch.testing.assert_close(gradients[0], torch.tensor(3 * 2 / 0.5**2, dtype=torch.float64))
    torch.testing.assert_close(gradients[1], torch.tensor(3 / 0.5, dtype=torch.float64))
    assert len(solution.adjoint) == 1
    assert solution.adjoint[0].converged.all()


def test_jacobian_free_differentiates_one_application():
    solution, factor, offset = scalar_problem(JacobianFree())
    gradients = torch.autograd.grad(solution.value.sum(), (factor, offset))
    torch.testing.assert_close(gradients[0], torch.tensor(3 * 4.0, dtype=torch.float64))
    torch.testing.assert_close(gradients[1], torch.tensor(3.0, dtype=torch.float64))


def test_jacobian_free_is_a_descent_direction():
    cosines = []
    for form in FORMS:
        exact, cheap = (
            Problem(form=form, solver=SOLVERS["anderson"], differentiation=d).gradients()["weight"].flatten()
            for d in (Implicit(), JacobianFree())
        )
        cosines.append(float(torch.nn.functional.cosine_similarity(exact, cheap, dim=0)))
    assert min(cosines) > 0.5


def test_unrolled_anderson_needs_more_iterations():
    # Its weights count as constants, so its derivatives converge later than its iterates.
    run_on = Anderson(tolerance=1e-300, max_iterations=80)
    found = Problem(solver=run_on, differentiation=Unrolled(), on_failure="ignore").gradients()
    exact = SOLVERS["anderson"]
    expected = Problem(solver=exact, differentiation=Implicit(exact)).gradients()
    assert_gradients_close(found, expected, 1e-6)


# ------------------------------------------------------------------ failure of the adjoint solve


def test_an_adjoint_that_does_not_converge_is_reported():
    adjoint = Picard(max_iterations=3, tolerance=1e-8)
    solution, _, _ = scalar_problem(Implicit(adjoint, on_failure="raise"))
    with pytest.raises(
        NotConvergedError, match="Implicit, adjoint solve: Picard: 1 of 1 images are not within"
    ):
        solution.value.sum().backward()

    solution, factor, _ = scalar_problem(Implicit(adjoint, on_failure="warn"))
    with pytest.warns(NotConvergedWarning, match="Implicit, adjoint solve: Picard"):
        solution.value.sum().backward()
    # 1 + 1/2 + 1/4 + 1/8 of 2, from w = g.
    torch.testing.assert_close(factor.grad, torch.tensor(3 * 4 * 1.875, dtype=torch.float64))
    assert not solution.adjoint[0].converged.any()

    solution, factor, _ = scalar_problem(Implicit(adjoint, on_failure="jacobian_free"))
    with pytest.warns(NotConvergedWarning, match="The gradient is the Jacobian-free one"):
        solution.value.sum().backward()
    torch.testing.assert_close(factor.grad, torch.tensor(3 * 4.0, dtype=torch.float64))


class Expanding(FixedPointMap):
    """A map started at its fixed point, from which it expands: the forward solve sees nothing, the adjoint does."""

    def __init__(self, factor: Tensor) -> None:
        self.factor = factor

    def __call__(self, point: Tensor) -> Tensor:
        return self.factor * point


@pytest.mark.parametrize("on_failure", ["raise", "warn", "jacobian_free"])
def test_an_adjoint_that_diverges_is_never_a_gradient(on_failure):
    factor = torch.tensor(3.0, requires_grad=True)
    solution = Implicit(Picard(), on_failure).solve(Expanding(factor), torch.zeros(1, 2), Picard())
    assert solution.converged.all()
    if on_failure == "jacobian_free":
        with pytest.warns(NotConvergedWarning, match="grew far beyond its start"):
            solution.value.sum().backward()
        assert factor.grad.isfinite()
    else:
        with pytest.raises(DivergenceError, match="Implicit, adjoint solve: Picard: the residual grew far"):
            solution.value.sum().backward()


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="Implicit: on_failure must be one of"):
        Implicit(on_failure="ignore")
    with pytest.raises(TypeError, match="Implicit: solver must be a Solver or None, got 'anderson'"):
        Implicit("anderson")


# ------------------------------------------------------------------ warm start


@pytest.mark.parametrize("form", FORMS)
def test_a_solution_starts_both_solves(form):
    problem = Problem(form=form, solver=SOLVERS["anderson"], differentiation=Implicit(SOLVERS["anderson"]))

    def solve(x0=None):
        solution = problem(x0, return_solution=True)
        loss = ((solution.value - problem.truth).square() * problem.weights).sum()
        return solution, torch.autograd.grad(loss, problem.leaves["weight"])[0]

    cold, expected = solve()
    warm, gradient = solve(cold)
    torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(warm.value, cold.value, rtol=1e-9, atol=1e-9)
    for first, second in ((cold, warm), (cold.adjoint[0], warm.adjoint[0])):
        assert second.denoiser_calls <= 3 < first.denoiser_calls / 2
        assert second.operator_calls < first.operator_calls


# ------------------------------------------------------------------ images that diverge


class OneLost(nn.Module):
    """A blur with a gain; of one image of a batch something that has no fixed point, or NaN."""

    def __init__(self, lost: int | None, factor: float = 1.0) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.6, dtype=torch.float64))
        self.lost, self.factor = lost, factor

    def forward(self, x: Tensor) -> Tensor:
        denoised = self.gain * (x + x.roll(1, -1)) / 2
        lost = torch.arange(len(x))[:, None, None, None] == (-1 if self.lost is None else self.lost)
        return torch.where(lost, self.factor * x.detach(), denoised)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("factor", [30.0, float("nan")])
def test_an_image_that_diverges_costs_the_others_neither_image_nor_gradient(form, factor):
    operator = Dense(torch.float64)
    truth = torch.randn(3, SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    y = operator(truth)

    def solve(y: Tensor, lost: int | None, on_failure: str = "ignore"):
        denoiser = OneLost(lost, factor)
        step = ProximalStep() if form == "proximal" else GradientStep()
        model = DEQRED(denoiser, tau=0.3, step=step, solver=Picard(2000, 1e-7), on_failure=on_failure)
        solution = model(y, operator, return_solution=True)
        solution.value[[0, -1]].square().sum().backward()
        return solution, denoiser.gain.grad

    expected, gradient = solve(y[[0, 2]], None)
    found, found_gradient = solve(y, 1)
    assert found.diverged.tolist() == [False, True, False]
    assert found.value[1].isnan().all()
    torch.testing.assert_close(found.value[[0, 2]], expected.value, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found_gradient, gradient, rtol=1e-5, atol=0)
    with pytest.warns(NotConvergedWarning, match=r"images \[1\] of 3"):
        assert torch.equal(solve(y, 1, "warn")[1], found_gradient)
    with pytest.raises(DivergenceError) as caught:
        solve(y, 1, "raise")
    assert caught.value.solution.diverged.tolist() == [False, True, False]
    with pytest.raises(DivergenceError):
        solve(y[:1], 0)


# ------------------------------------------------------------------ second derivatives


@pytest.mark.parametrize("differentiation", [Implicit(), JacobianFree()])
def test_second_derivatives_are_refused(differentiation):
    problem = Problem(solver=SOLVERS["nesterov"], differentiation=differentiation)
    weight = problem.leaves["weight"]
    (first,) = torch.autograd.grad(problem.loss(), weight, create_graph=True)
    torch.testing.assert_close(
        first.detach(),
        Problem(solver=SOLVERS["nesterov"], differentiation=differentiation).gradients()["weight"],
    )
    with pytest.raises(RuntimeError, match="second derivatives through the fixed point are not available"):
        first.square().sum().backward()


def test_second_derivatives_of_a_linear_loss_are_refused_too():
    problem = Problem(solver=SOLVERS["nesterov"])
    weight = problem.leaves["weight"]
    (first,) = torch.autograd.grad(problem().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(first.sum(), weight)


def test_second_derivatives_of_unrolled_iterations_are_right():
    problem = Problem(solver=Nesterov(tolerance=1e-11, max_iterations=500), differentiation=Unrolled())
    weight = problem.leaves["weight"]
    direction = torch.randn(weight.shape, dtype=weight.dtype, generator=torch.Generator().manual_seed(0))

    def first(create_graph: bool) -> Tensor:
        (gradient,) = torch.autograd.grad(problem.loss(), weight, create_graph=create_graph)
        return (gradient * direction).sum()

    (second,) = torch.autograd.grad(first(True), weight)
    h, values = 1e-4, []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * h * direction
        values.append(first(False))
        with torch.no_grad():
            weight -= sign * h * direction
    expected = (values[0] - values[1]) / (2 * h)
    torch.testing.assert_close((second * direction).sum(), expected, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------ the start


def test_the_start_has_gradient_zero_through_implicit_and_its_own_through_unrolled():
    x0 = torch.rand(2, SIZE, SIZE, dtype=torch.float64, requires_grad=True)
    few = Picard(max_iterations=3)
    for differentiation in (Implicit(), JacobianFree()):
        problem = Problem(solver=SOLVERS["nesterov"], differentiation=differentiation)
        (gradient,) = torch.autograd.grad(problem(x0).square().sum(), x0)
        assert torch.equal(gradient, torch.zeros_like(x0))
    problem = Problem(solver=few, differentiation=Unrolled(), on_failure="ignore")
    (gradient,) = torch.autograd.grad(problem(x0).square().sum(), x0)
    direction = torch.randn(x0.shape, dtype=x0.dtype, generator=torch.Generator().manual_seed(0))
    h = 1e-5
    with torch.no_grad():
        values = [problem(x0 + s * h * direction).square().sum() for s in (1, -1)]
    torch.testing.assert_close(
        (gradient * direction).sum(), (values[0] - values[1]) / (2 * h), rtol=1e-6, atol=0
    )


# ------------------------------------------------------------------ memory


def saved_bytes(problem: Problem) -> tuple[int, int]:
    """Bytes that autograd keeps after the forward pass, and iterations."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        solution = problem(return_solution=True)
    return sum(kept.values()), int(solution.iterations.max())


def test_memory_of_implicit_does_not_depend_on_the_iterations():
    def run(differentiation, iterations: int) -> tuple[int, int]:
        solver = Picard(max_iterations=iterations, tolerance=1e-300)
        return saved_bytes(Problem(solver=solver, differentiation=differentiation, on_failure="ignore"))

    for differentiation in (Implicit(), JacobianFree()):
        (few, _), (many, count) = run(differentiation, 5), run(differentiation, 50)
        assert count == 50
        assert few == many > 0
    few, many = run(Unrolled(), 5)[0], run(Unrolled(), 50)[0]
    image = 2 * SIZE * SIZE * 8
    assert many - few <= 1.5 * 45 * image  # the points alone


def test_nothing_stays_in_memory_after_the_backward_pass():
    alive: list[weakref.ref[Tensor]] = []

    class Watched(SmallDenoiser):
        def forward(self, x: Tensor) -> Tensor:
            denoised = super().forward(x)
            alive.append(weakref.ref(denoised))
            return denoised

    problem = Problem(solver=SOLVERS["nesterov"])
    problem.model.denoiser = Watched()
    gc.disable()  # no cycle may keep a graph until the collector comes by
    try:
        problem.loss().backward()
        assert len(alive) > 10
        assert not any(reference() is not None for reference in alive)
    finally:
        gc.enable()
