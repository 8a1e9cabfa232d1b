"""Every operator's least squares against dense NumPy solutions on tiny grids, and what is foreign made an operator."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings

import numpy as np
import pytest
import torch
from cases import relative_error
from scipy.optimize import nnls
from torch import Tensor

from oder_fast import CartesianMRI, DiffractionTomography, ParallelBeamCT, as_operator
from oder_fast.data import led_ring
from oder_fast.operators import LeastSquares, MeasurementOperator
from oder_fast.operators import idt as idt_module
from oder_fast.operators.solve import MAX_PROJECTED, MAX_STEPS, nonnegative

TIGHT = 1e-10


class Blur(MeasurementOperator):
    """With forward and adjoint alone."""

    image_shape = data_shape = (5, 6)

    def forward(self, x):
        return x + 0.5 * x.roll(1, -1) - 0.2 * x.roll(2, -2)

    def adjoint(self, y):
        return y + 0.5 * y.roll(-1, -1) - 0.2 * y.roll(-2, -2)


class ComplexBlur(Blur):
    def forward(self, x):
        return super().forward(x) * (1 + 2j)

    def adjoint(self, y):
        return super().adjoint(y * (1 - 2j))


class Physics:
    """As a physics of deepinv is: A and A_adjoint."""

    def __init__(self, error: float = 0.0) -> None:
        self.error = error

    def A(self, x):
        return Blur.forward(self, x)

    def A_adjoint(self, y):
        return Blur.adjoint(self, y) + self.error * y.roll(1, -2)


def maps(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(*shape, dtype=torch.complex128, generator=generator)


def phases(*shape: int) -> Tensor:
    return maps(*shape).sgn()


def lines(n: int) -> Tensor:
    return torch.arange(n) % 3 != 1


def points(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(5)) < 0.5


def idt(**options) -> DiffractionTomography:
    return DiffractionTomography(
        (6, 5), [-4.0, 0.0, 4.0], led_ring(4, 0.3), pixel_size=0.4, wavelength=0.6, numerical_aperture=0.4,
        medium_index=1.33, **options,
    )  # fmt: skip


def stored() -> DiffractionTomography:
    return idt(transfer_functions=maps(4, 3, 6, 5))


OPERATORS = {
    "ct": lambda: ParallelBeamCT((6, 5), 4),
    "ct, limited": lambda: ParallelBeamCT((5, 8), torch.arange(4) * 0.25, bin_spacing=1.5, pixel_size=0.8),
    "mri, lines": lambda: CartesianMRI(maps(3, 6, 5), lines(5)),
    "mri, rows": lambda: CartesianMRI(maps(3, 6, 5), lines(6)[:, None], centered=False, readout_size=8),
    "mri, points": lambda: CartesianMRI(maps(2, 3, 6, 5), points(2, 6, 5)),
    "mri, unseen pixels": lambda: CartesianMRI(maps(3, 6, 5) * points(6, 5), points(6, 5), centered=False),
    "mri, one coil": lambda: CartesianMRI(maps(1, 6, 5), lines(5)),
    "mri, uniform lines": lambda: CartesianMRI(3 * phases(1, 6, 5), lines(5)),
    "mri, uniform rows": lambda: CartesianMRI(phases(1, 6, 5), lines(6)[:, None], readout_size=9),
    "mri, uniform points": lambda: CartesianMRI(phases(2, 1, 6, 5), points(2, 6, 5), centered=False),
    "idt": lambda: idt(gram=True),
    "idt, illuminations": lambda: idt(gram=False),
    "idt, stored": stored,
    "default": Blur,
    "default, complex": ComplexBlur,
    "foreign": lambda: as_operator(PHYSICS),
    "foreign, inexact": lambda: as_operator(INEXACT),
}
PHYSICS, INEXACT = Physics(), Physics(0.1)
CLOSED = {
    "mri, uniform lines",
    "mri, uniform rows",
    "mri, uniform points",
    "idt",
    "idt, illuminations",
    "idt, stored",
}


def example(operator: MeasurementOperator) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = operator.image_shape or (1, 5, 6)
    kind = (
        torch.float64
        if isinstance(operator, (ParallelBeamCT, Blur)) or operator.image_shape is None
        else torch.complex128
    )
    kind = torch.complex128 if isinstance(operator, ComplexBlur) else kind
    x = torch.randn(2, *shape, dtype=kind, generator=generator)
    # Images of a batch may be of very different size.
    return x * torch.tensor([1.0, 1e6], dtype=torch.float64).reshape(-1, *[1] * len(shape))


def reals(x: Tensor) -> Tensor:
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def dense(function, x: Tensor, image: int) -> np.ndarray:
    """The matrix of a map over the reals, for one image of a batch."""
    columns = []
    for k in range(reals(x[0]).numel()):
        one = torch.zeros_like(x)
        reals(one)[image].view(-1)[k] = 1
        columns.append(reals(function(one))[image].flatten().numpy())
    return np.stack(columns, 1)


def bound(operator, x: Tensor) -> LeastSquares:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return operator.least_squares(operator(x))


@pytest.fixture(params=OPERATORS)
def problem(request):
    """A data fidelity, images, its dense normal matrices and A^H y, for each image."""
    with warnings.catch_warnings():
        # Of its coarse sampling.
        warnings.simplefilter("ignore", UserWarning)
        operator = OPERATORS[request.param]()
    x = example(operator)
    fidelity = bound(operator, x)
    forward = [dense(operator, x, b) for b in range(2)]
    adjoint = [a.T for a in forward] if request.param != "foreign, inexact" else None
    if adjoint is None:
        adjoint = [dense(operator.adjoint, fidelity.y, b) for b in range(2)]
    normal = [t @ a for t, a in zip(adjoint, forward, strict=True)]
    return request.param, fidelity, x, normal


def flat(x: Tensor) -> list[np.ndarray]:
    return [reals(one).flatten().numpy() for one in x]


def close(x: Tensor, expected: list[np.ndarray], tolerance: float) -> None:
    for got, wanted in zip(flat(x), expected, strict=True):
        assert np.linalg.norm(got - wanted) <= tolerance * np.linalg.norm(wanted)


def test_against_dense_matrices(problem):
    name, fidelity, x, normal = problem
    close(fidelity.normal(x), [n @ v for n, v in zip(normal, flat(x), strict=True)], 1e-12)
    z = x.flip(-1)
    differences = [n @ (u - v) for n, u, v in zip(normal, flat(z), flat(x), strict=True)]
    close(fidelity.gradient(z), differences, 1e-11)
    assert fidelity.calls == 2
    weight = torch.tensor(0.3, dtype=torch.float64)
    rhs = fidelity.adjoint_data() + weight * z
    expected = [np.linalg.solve(n + 0.3 * np.eye(len(n)), r) for n, r in zip(normal, flat(rhs), strict=True)]
    tolerance = torch.tensor([TIGHT, TIGHT])
    for start in (torch.zeros_like(x), z):
        before = fidelity.calls
        solution = fidelity.solve(rhs, weight, start, tolerance)
        close(solution, expected, 1e-7)
        assert (fidelity.calls == before + 1) == (name in CLOSED)
    assert not fidelity.solve(torch.zeros_like(x), weight, torch.zeros_like(x), tolerance).any()


def test_each_image_may_have_a_weight(problem):
    _, fidelity, x, normal = problem
    weights = torch.tensor([0.3, 5.0], dtype=torch.float64).reshape(2, *[1] * (x.ndim - 1))
    expected = [
        np.linalg.solve(n + float(w) * np.eye(len(n)), r)
        for n, w, r in zip(normal, weights, flat(x), strict=True)
    ]
    close(fidelity.solve(x, weights, x.flip(-1), torch.full((2,), TIGHT)), expected, 1e-7)


def test_one_image_does_not_decide_for_another(problem):
    _, fidelity, x, _ = problem
    weight = torch.tensor(0.3, dtype=torch.float64)
    rhs = fidelity.adjoint_data() + weight * x
    tolerance = torch.tensor([1e-6, 1e-2])
    solution = fidelity.solve(rhs, weight, x.flip(-2), tolerance)
    residual = rhs - fidelity.normal(solution) - weight * solution
    for b in range(2):
        assert residual[b].norm() <= 1.001 * tolerance[b] * weight * x[b].norm()


def test_solve_on_free_pixels():
    for operator in (ParallelBeamCT((6, 5), 4), Blur()):
        x = example(operator)
        fidelity = bound(operator, x)
        free = points(*x.shape).to(x.dtype)
        weight = torch.tensor(0.3, dtype=torch.float64)
        solution = fidelity.solve(x, weight, x, torch.full((2,), TIGHT), free)
        for b in range(2):
            matrix = dense(fidelity.normal, x, b) + 0.3 * np.eye(30)
            f = free[b].flatten().numpy() > 0
            wanted = np.zeros(30)
            wanted[f] = np.linalg.solve(matrix[f][:, f], x[b].flatten().numpy()[f])
            assert relative_error(solution[b].flatten(), torch.from_numpy(wanted)) < 1e-7


@pytest.mark.parametrize("tolerance", [1e-2, 1e-6])
@pytest.mark.parametrize("make", [lambda: ParallelBeamCT((6, 5), 4), lambda: ParallelBeamCT((6, 5), 1), Blur])
def test_solve_nonnegative(make, tolerance):
    operator = make()
    x = example(operator)
    fidelity = bound(operator, x)
    weight = torch.tensor(0.05, dtype=torch.float64)
    rhs = fidelity.adjoint_data() + weight * x.flip(-1)
    for start in (torch.zeros_like(x), x, -x):
        fidelity.calls = 0
        solution = fidelity.solve_nonnegative(rhs, weight, start, torch.tensor([tolerance, tolerance]))
        assert fidelity.calls <= MAX_STEPS + MAX_PROJECTED + 2
        assert float(solution.min()) == 0
        size = weight * start.flatten(1).norm(dim=1)
        size = torch.where(size > 0, size, rhs.flatten(1).norm(dim=1))
        for b in range(2):
            matrix = dense(fidelity.normal, x, b) + 0.05 * np.eye(30)
            factor = np.linalg.cholesky(matrix)
            wanted = nnls(factor.T, np.linalg.solve(factor, rhs[b].flatten().numpy()))[0]
            got = solution[b].flatten().numpy()
            residual = rhs[b].flatten().numpy() - matrix @ got
            violated = np.linalg.norm(residual[(got > 0) | (residual > 0)])
            # What is left after all steps is told.
            left = 0.0 if fidelity.left is None else 0.05 * float(fidelity.left[b]) * np.linalg.norm(got)
            assert violated <= 1.01 * max(tolerance * float(size[b]), left)
            assert np.linalg.norm(got - wanted) <= 1.01 * violated / 0.05 + 1e-9 * np.linalg.norm(wanted)


def test_nonnegative_solves_of_random_problems_end():
    # Of any condition, from any start, without a good preconditioner.
    generator = torch.Generator().manual_seed(0)
    for condition in (10.0, 1e3):
        q, _ = torch.linalg.qr(torch.randn(50, 12, 12, dtype=torch.float64, generator=generator))
        values = torch.logspace(0, float(np.log10(condition)), 12, dtype=torch.float64)
        matrix = q * values @ q.mT
        rhs, start = torch.randn(2, 50, 12, dtype=torch.float64, generator=generator)
        target = torch.full((50, 1), 1e-8, dtype=torch.float64)
        largest = torch.tensor(condition, dtype=torch.float64)

        def apply(v, matrix=matrix):
            return (matrix @ v[..., None])[..., 0]

        def fall(x, rhs=rhs, apply=apply):
            return (0.5 * x * apply(x) - rhs * x).sum(1)

        x = start.clamp(min=0)
        for _ in range(20):
            last, (x, left) = x, nonnegative(apply, rhs, x, target, lambda v: v, torch.ones(()), largest)
            assert bool((fall(x) <= fall(last) + 1e-12).all())
            r = rhs - apply(x)
            size = (r * ((x > 0) | (r > 0))).norm(dim=1, keepdim=True)
            assert bool((size <= (target if left is None else left.clamp(min=target)) + 1e-9).all())
            if bool((size <= 1e-7).all()):
                break
        else:
            raise AssertionError("not solved")


@pytest.mark.parametrize("name", ["ct", "mri, lines", "mri, points", "idt"])
def test_minibatches_are_unbiased(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        operator = OPERATORS[name]()
    x = example(operator)
    fidelity = bound(operator, x)
    z, n = x.flip(-1), operator.n_blocks
    for size in (1, 2, n):
        drawn = [torch.tensor(b) for b in itertools.combinations(range(n), size)]
        fidelity.calls = 0
        for method in (fidelity.gradient, fidelity.normal):
            mean = torch.stack([method(z, blocks) for blocks in drawn]).mean(0)
            assert relative_error(mean, method(z)) < 1e-12
        assert fidelity.calls == pytest.approx(2 + 2 * len(drawn) * size / n)


def test_calls_are_counted_apart():
    ct = ParallelBeamCT((6, 5), 4)
    x = example(ct)
    first, second = bound(ct, x), bound(ct, x)
    first.normal(x)
    anew = first.counted_anew()
    anew.gradient(x)
    anew.gradient(x, torch.tensor([0]))
    assert (first.calls, second.calls, anew.calls) == (1, 0, 1.25)


@pytest.mark.parametrize("share", [1e-3, 1e-5])
def test_closed_forms_in_single_precision(share):
    for operator in (idt(), CartesianMRI(phases(1, 6, 5), points(6, 5))):
        x = example(operator)
        weight = torch.tensor(share * operator.norm_squared(), dtype=torch.float64)
        fidelity = bound(operator, x)
        rhs = fidelity.adjoint_data() + weight * x
        nowhere, tolerance = torch.zeros_like(x), torch.zeros(2)
        exact = fidelity.solve(rhs, weight, nowhere, tolerance)
        single = (
            operator
            if isinstance(operator, DiffractionTomography)
            else copy.deepcopy(operator).to(torch.float32)
        )
        fidelity = single.least_squares(
            fidelity.y.to(torch.complex64 if fidelity.y.is_complex() else torch.float32)
        )
        got = fidelity.solve(rhs.to(torch.complex64), weight.float(), nowhere.to(torch.complex64), tolerance)
        # The rounding of rhs over the weight.
        assert relative_error(got, exact) < 5e-7 / share
        assert got.dtype == torch.complex64


def test_eigenvectors_are_kept_outside_inference_and_dropped(monkeypatch):
    operator = idt()
    x = example(operator)
    fidelity = bound(operator, x)
    weight, tolerance = torch.tensor(2.0, dtype=torch.float64), torch.zeros(2)
    with torch.inference_mode():
        fidelity.solve(x, weight, x, tolerance)
    kept = operator._pairs
    assert not kept[0].vectors.is_inference()
    y = fidelity.y.clone().requires_grad_()
    operator.tikhonov(y, 2.0).abs().sum().backward()
    assert operator._pairs is kept
    assert y.grad.isfinite().all()
    closed = fidelity.solve(x, weight, x, tolerance)
    assert pickle.loads(pickle.dumps(operator))._pairs == []
    assert operator.to(torch.float64)._pairs == []
    # Too large to be kept: tikhonov is the same, and solve iterates.
    monkeypatch.setattr(idt_module, "LARGEST", 1)
    fidelity.calls = 0
    assert relative_error(fidelity.solve(x, weight, x, torch.full((2,), 1e-9)), closed) < 1e-8
    assert fidelity.calls > 1
    assert (
        relative_error(operator.tikhonov(fidelity.y, 2.0), operator._solve(operator.adjoint(fidelity.y), 2.0))
        < 1e-12
    )
    assert operator._pairs == []


def test_norms_by_power_iteration():
    for operator, factor in ((Blur(), 1), (ComplexBlur(), 5)):
        kind = torch.complex128 if factor == 5 else torch.float64
        matrix = dense(operator, torch.zeros(1, 5, 6, dtype=kind), 0)
        assert operator.norm_squared() == pytest.approx(np.linalg.norm(matrix, 2) ** 2, rel=1e-2)
        y = operator(example(operator))
        assert relative_error(operator.initial(y) * operator.norm_squared(), operator.adjoint(y)) < 1e-12


def test_a_foreign_operator_is_one_operator():
    physics = Physics()
    operator = as_operator(physics)
    assert as_operator(operator) is operator
    with pytest.raises(ValueError, match=r"Physics: the norm needs the shape of an image"):
        operator.norm_squared()
    operator.initial(torch.ones(1, 1, 5, 6))
    assert operator._norms is as_operator(physics)._norms
    assert operator.norm_squared() == pytest.approx(Blur().norm_squared(), rel=1e-3)
    with pytest.raises(
        TypeError, match=r"operator must be a MeasurementOperator, or have A\(x\) and A_adjoint\(y\).*int"
    ):
        as_operator(3)


def test_a_wrong_adjoint_is_named_once():
    physics = Physics(0.1)
    y = torch.ones(2, 1, 5, 6, dtype=torch.float64)
    with pytest.warns(
        UserWarning, match=r"Physics: A_adjoint is not the adjoint of A: .* differ by 0\.\d+"
    ) as caught:
        _ = [as_operator(physics).least_squares(y) for _ in range(2)]
    assert len(caught) == 1


def test_foreign_operators_that_do_not_fit_the_data():
    class Other(Physics):
        def A(self, x):
            return x[..., 1:]

    with pytest.raises(
        ValueError, match=r"Other: the operator does not match y: .* \(2, 1, 5, 5\), y \(2, 1, 5, 6\)"
    ):
        as_operator(Other()).least_squares(torch.ones(2, 1, 5, 6))

    class Mixed(Physics):
        def A_adjoint(self, y):
            return y.sum(0, keepdim=True)

    with pytest.raises(
        ValueError, match=r"Mixed: A_adjoint\(y\) must hold 2 images, as y does, got \(1, 1, 5, 6\)"
    ):
        as_operator(Mixed()).least_squares(torch.ones(2, 1, 5, 6))

    class OneWay:
        def A(self, x):
            return x

    with pytest.raises(TypeError, match=r"got OneWay"):
        as_operator(OneWay())
