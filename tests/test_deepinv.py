"""deepinv both ways: our operators as its physics, under its own tests and algorithms; its physics and trainer with DEQRED."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from cases import relative_error
from torch import nn

from oder_fast import (
    DEQRED,
    Anderson,
    AtNoiseLevel,
    CartesianMRI,
    DiffractionTomography,
    GradientStep,
    Implicit,
    MeasurementOperator,
    ParallelBeamCT,
    Unrolled,
    as_operator,
    choose_tau,
)
from oder_fast.data import birdcage_maps, led_ring, random_lines
from without_torchvision import import_deepinv

pytestmark = [
    pytest.mark.exhaustive,
    # Theirs: deprecations, images outside 0 to 1 in metrics.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:deepinv", "ignore::UserWarning:deepinv"),
]
NAMES = ("ct", "mri", "mri of points", "mri of one coil", "idt")


@pytest.fixture(scope="module", autouse=True)
def dinv():
    deepinv = import_deepinv()
    if deepinv is None:
        pytest.skip("deepinv is not installed: see CONTRIBUTING.md")
    return deepinv


@pytest.fixture(autouse=True)
def _seed(one_thread):
    torch.manual_seed(0)


def operator_of(name, size=(12, 10)):
    g = torch.Generator().manual_seed(0)
    if name == "ct":
        return ParallelBeamCT(size, 16)
    if name == "idt":
        return DiffractionTomography(
            size,
            [-4.0, 0.0, 4.0],
            led_ring(6, 0.3),
            pixel_size=0.4,
            wavelength=0.6,
            numerical_aperture=0.4,
            medium_index=1.33,
        )
    points = torch.rand(size, generator=g) < 0.5
    maps = torch.ones(1, *size, dtype=torch.complex64) if "one coil" in name else birdcage_maps(3, size)
    return CartesianMRI(maps, points if "points" in name else random_lines(size[1], 2, 0.2, g))


def physics_of(name, size=(12, 10), **options):
    from oder_fast.deepinv import OperatorPhysics

    return OperatorPhysics(operator_of(name, size), **options)


def matrix_of(physics):
    """The dense matrix, column by column."""
    n = physics.img_size[0] * physics.img_size[1] * physics.img_size[2]
    return physics.A(torch.eye(n, dtype=torch.float64).reshape(n, *physics.img_size)).reshape(n, -1).T


class Smooth(nn.Module):
    """A linear denoiser that contracts, called as deepinv's are or as ours."""

    def __init__(self, gain=0.9):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain, dtype=torch.float64))

    def forward(self, x, sigma=None):
        return self.gain * (2 * x + x.roll(1, -1) + x.roll(-1, -1) + x.roll(1, -2) + x.roll(-1, -2)) / 6


# ------------------------------------------------------------------ its own tests

GENERIC = (
    ("test_operators_adjointness", {}),
    ("test_adjointness_test", {"num_samples": 3}),
    ("test_operator_multiscale_wrapper", {}),
    ("test_operator_cropper", {}),
    ("test_pseudo_inverse", {"implicit_backward_solver": True}),
    ("test_pseudo_inverse", {"implicit_backward_solver": False}),
    ("test_concatenation", {}),
    ("test_operators_differentiability", {}),
    ("test_device_consistency", {}),
    ("test_physics_state_dict", {}),
    ("test_adjoint_autograd", {}),
    ("test_clone", {}),
    ("test_multiscale_coarse_adjointness", {}),
    ("test_multiscale_A_adjoint_A", {}),
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("test", "options"), GENERIC, ids=[name + "".join(map(str, o.values())) for name, o in GENERIC]
)
def test_what_it_tests_of_every_physics(monkeypatch, tmp_path, name, test, options):
    """But `test_operators_norm`: it wants a power iteration that warns where it is cut short, and ours is none."""
    theirs = pytest.importorskip("deepinv.tests.test_physics", reason="this deepinv comes without its tests")

    def find_operator(name, device, imsize=None, get_physics_param=False):
        physics = physics_of(name, (17, 11) if imsize is None else tuple(imsize[-2:]))
        found = physics, physics.img_size, physics.operator.norm_squared(), torch.float32
        return (*found, []) if get_physics_param else found

    monkeypatch.setattr(theirs, "find_operator", find_operator)
    monkeypatch.setattr(theirs, "OPERATORS", list(NAMES))
    monkeypatch.chdir(tmp_path)
    function = getattr(theirs, test)
    wanted = function.__code__.co_varnames[: function.__code__.co_argcount]
    given = {"name": name, "device": "cpu", "rng": torch.Generator().manual_seed(0), **options}
    with torch.enable_grad():
        function(**{argument: given[argument] for argument in wanted})


# ------------------------------------------------------------------ the physics


@pytest.mark.parametrize("name", NAMES)
def test_the_physics_is_the_operator_between_channels(name):
    operator, physics = operator_of(name), physics_of(name)
    x = torch.randn(2, *physics.img_size)
    image = torch.empty(0)
    if name == "ct":
        image = x[:, 0]
    elif name == "idt":
        image = torch.complex(x[:, 0::2], x[:, 1::2])
    else:
        image = torch.complex(x[:, 0], x[:, 1])
    y, expected = physics.A(x), operator(image)
    assert torch.equal(y, torch.view_as_real(expected).movedim(-1, 1) if "mri" in name else y.view_as(y))
    torch.testing.assert_close(y.square().sum(), expected.abs().square().sum())
    if "mri" not in name:
        assert torch.equal(y.reshape(expected.shape), expected)
    torch.testing.assert_close(physics.A_adjoint_A(x), physics.A_adjoint(y), rtol=1e-4, atol=1e-3)
    assert physics.adjointness_test(x) < 1e-5


def test_mri_is_its_own_multicoil_mri(dinv):
    physics = physics_of("mri", (16, 13))
    mri = physics.operator
    theirs = dinv.physics.MultiCoilMRI(
        mask=mri.mask[0].float().expand(16, 13), coil_maps=mri.coil_maps, img_size=(2, 16, 13)
    )
    x = torch.randn(2, 2, 16, 13)
    torch.testing.assert_close(physics.A(x), theirs.A(x), rtol=1e-4, atol=1e-5)
    y = torch.randn_like(theirs.A(x))
    torch.testing.assert_close(physics.A_adjoint(y), theirs.A_adjoint(y), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_norm_proximal_operator_and_pseudo_inverse_are_those_of_the_matrix(name):
    physics = physics_of(name).double()
    matrix, x = matrix_of(physics), torch.randn(2, *physics.img_size, dtype=torch.float64)
    largest = float(torch.linalg.matrix_norm(matrix, 2)) ** 2
    norm = physics.compute_sqnorm(x)
    assert norm.dtype == torch.float64
    # Of MRI it is a bound; that of CT is a power iteration's in single precision.
    assert 0.999 * largest < norm < (1.5 if "mri" in name else 1.001) * largest
    assert physics.compute_norm(x, squared=False) == norm.sqrt()
    y, z = physics.A(x), torch.randn_like(x)
    eye = torch.eye(matrix.shape[1], dtype=torch.float64)
    for gamma in (7 / largest, torch.tensor([3, 300], dtype=torch.float64) / largest):
        each = torch.as_tensor(gamma).expand(2)
        for start in (z, 0.5, None):
            at = z if start is z else torch.full_like(z, start or 0)
            expected = torch.stack(
                [
                    torch.linalg.solve(matrix.T @ matrix + eye / g, matrix.T @ b.flatten() + a.flatten() / g)
                    for g, a, b in zip(each, at, y, strict=True)
                ]
            ).reshape(x.shape)
            found = physics.prox_l2(start, y, gamma, tol=1e-12, max_iter=500)
            assert relative_error(found, expected) < 1e-7
    settings = physics.tol, physics.max_iter
    physics.prox_l2(z, y, 1.0, tol=1.0, max_iter=3)
    assert (physics.tol, physics.max_iter) == settings
    seen = (torch.linalg.pinv(matrix, rtol=1e-6) @ matrix @ x.reshape(2, -1).T).T.reshape(x.shape)
    assert relative_error(physics.A_dagger(y, solver="lsqr", tol=1e-10, max_iter=500), seen) < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_derivatives_of_the_proximal_operator(name):
    physics = physics_of(name, (5, 4), tol=1e-13, max_iter=300).double()
    x = torch.randn(2, *physics.img_size, dtype=torch.float64)
    y, z = physics.A(x).requires_grad_(), torch.randn_like(x).requires_grad_()
    gammas = torch.tensor([2.0, 5.0], dtype=torch.float64) / physics.compute_sqnorm(x)
    for gamma in (gammas[:1].squeeze(), gammas):
        arguments = (z, y, gamma.clone().requires_grad_())
        assert torch.autograd.gradcheck(physics.prox_l2, arguments, fast_mode=True)
        assert torch.autograd.gradgradcheck(physics.prox_l2, arguments, fast_mode=True)
    u = torch.randn_like(x)
    _, product = torch.func.vjp(lambda z, y: physics.prox_l2(z, y, gammas[0]), z.detach(), y.detach())
    out = physics.prox_l2(z, y, gammas[0])
    for one, other in zip(product(u), torch.autograd.grad(out, (z, y), u), strict=True):
        torch.testing.assert_close(one, other)
    for function in (physics.A, physics.A_adjoint_A):
        assert torch.autograd.gradcheck(function, (z,), fast_mode=True)
        assert torch.autograd.gradgradcheck(function, (z,), fast_mode=True)


@pytest.mark.parametrize("name", NAMES)
def test_the_adjoint_of_the_same_data_is_kept_and_never_stale(monkeypatch, name):
    physics, fresh = physics_of(name), physics_of(name)
    y = physics.A(torch.randn(1, *physics.img_size))
    calls, adjoint = [], physics.measurement_operator.adjoint
    monkeypatch.setattr(physics.measurement_operator, "adjoint", lambda y: calls.append(y) or adjoint(y))
    first = physics.A_adjoint(y)
    first.mul_(0)
    assert torch.equal(physics.A_adjoint(y), fresh.A_adjoint(y.clone()))
    assert len(calls) == 1
    y.mul_(2)
    assert torch.equal(physics.A_adjoint(y), fresh.A_adjoint(y.clone()))
    with torch.inference_mode():
        physics.A_adjoint(y)
    (physics.A_adjoint(y) * torch.ones(1, requires_grad=True)).sum().backward()
    physics.A_adjoint(y.requires_grad_()).sum().backward()
    assert y.grad.any()
    if "mri" in name:
        y = y.detach()
        before = physics.A_adjoint(y)
        physics.operator.coil_maps.mul_(2)
        torch.testing.assert_close(physics.A_adjoint(y), 2 * before)


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_moves(name):
    physics = physics_of(name)
    x = torch.randn(1, *physics.img_size)
    y = physics.A(x)
    physics.prox_l2(x, y, 0.1)
    for one in (physics.clone(), copy.deepcopy(physics)):
        assert torch.equal(one.A(x), y)
        assert one.operator is not physics.operator
    double = copy.deepcopy(physics).to(torch.float64)
    assert relative_error(double.A(x.double()), y) < 1e-5
    assert double.prox_l2(x.double(), y.double(), 0.1).dtype == torch.float64
    with torch.inference_mode():
        fresh = physics_of(name)
        fresh.A_adjoint_A(x)
    fresh.A_adjoint_A(x.requires_grad_()).sum().backward()
    assert x.grad.isfinite().all()


def test_noise_and_parameters_of_a_call(dinv):
    physics = physics_of("mri", noise_model=dinv.physics.GaussianNoise(0.1))
    x = torch.randn(2, 2, 12, 10)
    noise = physics(x) - physics.A(x)
    sampled = physics.operator.mask[:, None, None].expand(noise.shape)
    assert not noise[~sampled].any()
    assert 0.08 < noise[sampled].std() < 0.12
    assert (physics(x, sigma=0.0) - physics.A(x)).abs().max() < 1e-6
    # A mask stays, as in deepinv, in all the shapes that it has there.
    mask = (torch.rand(12, 10) < 0.4).float()
    both = torch.stack((mask, 1 - mask))
    for given, kept in (
        (mask, mask[None]),
        (mask[None], mask[None]),
        (mask.expand(2, 12, 10), mask[None]),
        (both[:, None].expand(2, 2, 12, 10), both),
    ):
        physics = physics_of("mri")
        expected = physics_of("mri")
        expected.update(mask=given)
        y = physics.A(x, mask=given)
        assert torch.equal(y, expected.A(x))
        assert torch.equal(y, physics.A(x))
        assert torch.equal(y != 0, kept[:, None, None].expand(y.shape).bool() & (y != 0))
        assert torch.equal(physics.A_adjoint(y), physics_of("mri").A_adjoint(y, mask=given))
        torch.testing.assert_close(
            physics.A_dagger(y, solver="lsqr"), physics_of("mri").A_dagger(y, solver="lsqr", mask=given)
        )
    maps = torch.randn(5, 12, 10, dtype=torch.complex64)
    assert physics.A(x, coil_maps=maps).shape == (2, 2, 5, 12, 10)
    # CT has none: what is given is for others.
    ct = physics_of("ct", noise_model=dinv.physics.GaussianNoise(0.1))
    image = torch.randn(1, 1, 12, 10)
    assert torch.equal(ct.A(image, mask=mask), ct.A(image))


def test_what_the_physics_refuses_is_named():
    from oder_fast.deepinv import OperatorPhysics

    class Shapeless(MeasurementOperator):
        """Without shapes."""

    with pytest.raises(
        TypeError, match="OperatorPhysics: operator must be a MeasurementOperator, got Linear"
    ):
        OperatorPhysics(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="Shapeless must have image_shape and data_shape, got None and None"):
        OperatorPhysics(Shapeless())
    physics = physics_of("mri")
    x = torch.zeros(1, 2, 12, 10)
    with pytest.raises(ValueError, match=r"image must have shape \(B, 2, 12, 10\), got \(1, 12, 10\)"):
        physics.A(x[:, 0])
    with pytest.raises(TypeError, match=r"image must be a real torch.Tensor, .* got torch.complex64"):
        physics.A(x.to(torch.complex64))
    with pytest.raises(ValueError, match=r"data must have shape \(B, 2, 3, 12, 10\), got \(1, 2, 12, 10\)"):
        physics.A_adjoint(x)
    with pytest.raises(ValueError, match=r"mask must have shape .* both channels alike, got \(2, 12, 10\)"):
        physics.A(x, mask=torch.arange(240).reshape(2, 12, 10) % 7 > 3)
    for gamma in (0.0, -1.0, torch.ones(3), float("nan")):
        with pytest.raises(
            ValueError, match="gamma must be finite and above 0, one number or one for each of 1"
        ):
            physics.prox_l2(x, physics.A(x), gamma)


# ------------------------------------------------------------------ its algorithms on our physics


@pytest.mark.parametrize("name", ["ct", "mri", "idt"])
@pytest.mark.parametrize("algorithm", ["PGD", "FISTA", "ADMM", "DRS", "GD"])
def test_algorithms_reach_the_known_solution(dinv, name, algorithm):
    """Of least squares with a quadratic prior."""
    physics = physics_of(name, tol=1e-10, max_iter=200).double()
    matrix, x = matrix_of(physics), torch.randn(2, *physics.img_size, dtype=torch.float64)
    norm, y = float(physics.compute_sqnorm(x)), physics.A(x)
    weight = 0.05 * norm
    eye = torch.eye(matrix.shape[1], dtype=torch.float64)
    solution = torch.linalg.solve(matrix.T @ matrix + weight * eye, matrix.T @ y.reshape(2, -1).T).T
    model = getattr(dinv.optim, algorithm)(
        data_fidelity=dinv.optim.L2(),
        prior=dinv.optim.Tikhonov(),
        lambda_reg=weight,
        stepsize=(10 if algorithm in ("ADMM", "DRS") else 0.9) / norm,
        max_iter=4000,
        thres_conv=1e-12,
        early_stop=True,
    )
    with torch.no_grad():
        assert relative_error(model(y, physics).reshape(2, -1), solution) < 1e-5


def hqs(dinv, denoiser, physics, gamma, **options):
    return dinv.optim.HQS(
        data_fidelity=dinv.optim.L2(),
        prior=dinv.optim.PnP(denoiser=denoiser),
        stepsize=gamma,
        sigma_denoiser=0.0,
        g_first=True,
        max_iter=300,
        thres_conv=1e-11,
        early_stop=True,
        **options,
    )


@pytest.mark.parametrize("name", ["ct", "mri", "idt"])
def test_plug_and_play_and_its_gradient_are_those_of_our_fixed_point(dinv, name):
    """HQS with a denoiser is the proximal map of RED; as a deep equilibrium it is differentiated implicitly."""
    physics = physics_of(name, tol=1e-12, max_iter=200).double()
    truth = torch.randn(1, *physics.img_size, dtype=torch.float64)
    y, tau = physics.A(truth), 0.1
    gamma = 1 / (tau * float(physics.compute_sqnorm(truth)))
    precise = Anderson(300, 1e-10)
    results = []
    for model in (
        hqs(
            dinv,
            Smooth(),
            physics,
            gamma,
            DEQ=dinv.optim.DEQConfig(max_iter_backward=300),
            trainable_params=[],
        ),
        DEQRED(Smooth(), tau=tau, solver=precise, differentiation=Implicit(precise), on_failure="raise"),
    ):
        data = y.clone().requires_grad_(isinstance(model, DEQRED))
        x = model(data, physics)
        (x - truth).square().sum().backward()
        gain = next(p for n, p in model.named_parameters() if n.endswith("gain"))
        results.append((x.detach(), gain.grad))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["ct", "mri", "idt"])
@pytest.mark.parametrize("algorithm", ["PGD", "HQS"])
def test_unfolded_algorithms_are_those_on_the_matrix(dinv, name, algorithm):
    physics = physics_of(name, tol=1e-12, max_iter=200).double()
    truth = torch.randn(2, *physics.img_size, dtype=torch.float64)
    matrix, y = matrix_of(physics), physics.A(truth)
    dense = dinv.physics.LinearPhysics(
        A=lambda x, **_: (x.flatten(1) @ matrix.T).reshape(y.shape),
        A_adjoint=lambda v, **_: (v.flatten(1) @ matrix).reshape(truth.shape),
        tol=1e-12,
        max_iter=500,
    )
    results = []
    for one in (physics, dense):
        model = getattr(dinv.optim, algorithm)(
            data_fidelity=dinv.optim.L2(),
            prior=dinv.optim.PnP(denoiser=Smooth()),
            stepsize=1 / float(physics.compute_sqnorm(truth)),
            sigma_denoiser=0.1,
            max_iter=4,
            unfold=True,
            trainable_params=["stepsize"],
        ).double()
        x = model(y, one)
        (x - truth).square().sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert len(grads) >= 2
        results.append((x.detach(), grads))
    assert relative_error(results[0][0], results[1][0]) < 1e-6
    for name, grad in results[0][1].items():
        torch.testing.assert_close(grad, results[1][1][name], rtol=1e-4, atol=1e-9)


# ------------------------------------------------------------------ DEQRED on its physics, and under its trainer


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("step", [None, GradientStep(), GradientStep(minibatch_size=2)], ids=str)
def test_a_model_on_our_physics_is_that_on_the_operator(name, step):
    """The same kernels and inner solves: the same images after the same calls, and the same gradients."""
    if name == "mri of one coil" and step is not None and step.minibatch_size:
        return
    physics = physics_of(name).double()
    operator = operator_of(name).double()
    assert as_operator(physics) is physics.measurement_operator
    y = physics.A(torch.rand(2, *physics.img_size, dtype=torch.float64))
    own = as_operator(physics).own_data(y)
    results = []
    for data, one in ((y, physics), (own, operator)):
        model = DEQRED(
            Smooth(), tau=0.1, step=step, generator=torch.Generator().manual_seed(0), on_failure="ignore"
        )
        solution = model(data, one, return_solution=True)
        (solution.value.abs().square()).sum().backward()
        results.append((solution, model.denoiser.gain.grad))
    (theirs, their_grad), (ours, our_grad) = results
    value = as_operator(physics).own_image(theirs.value)
    assert relative_error(value, ours.value) < 1e-6
    assert (theirs.denoiser_calls, theirs.operator_calls) == (ours.denoiser_calls, ours.operator_calls)
    torch.testing.assert_close(their_grad, our_grad, rtol=1e-5, atol=0)


def test_what_else_takes_an_operator_takes_our_physics(dinv):
    physics, denoiser = physics_of("ct", (16, 16)), Smooth().float()
    x = torch.zeros(1, 1, 16, 16)
    x[..., 4:12, 5:11] = 1
    y = physics.A(x)
    nonnegative = DEQRED(denoiser, tau=0.1, nonnegative=True, on_failure="raise")
    plain = nonnegative(y[:, 0], physics.operator)
    torch.testing.assert_close(nonnegative(y, physics)[:, 0], plain, rtol=1e-3, atol=1e-3)
    choices = [
        choose_tau(data, one, denoiser, solves=6, generator=torch.Generator().manual_seed(0))
        for data, one in ((y, physics), (y[:, 0], physics.operator))
    ]
    assert choices[0].value == pytest.approx(choices[1].value, rel=0.05)


def their_physics(dinv, name):
    if name == "blur":
        return dinv.physics.Blur(
            filter=dinv.physics.functional.gaussian_blur(sigma=(1.0, 1.0)), padding="circular"
        )
    if name == "inpainting":
        return dinv.physics.Inpainting(img_size=(1, 16, 16), mask=0.6)
    if name == "tomography":
        return dinv.physics.Tomography(
            angles=6, img_width=16, circle=False, normalize=False, dtype=torch.float64
        )
    maps = birdcage_maps(3, (16, 16))
    return dinv.physics.MultiCoilMRI(mask=(torch.rand(16, 16) < 0.6).float(), coil_maps=maps)


@pytest.mark.parametrize("name", ["blur", "inpainting", "tomography", "mri"])
def test_a_model_on_its_physics_and_denoisers(dinv, name):
    """Gradients in weights and data against finite differences and an unrolled solve."""
    physics = their_physics(dinv, name)
    for buffer_name, buffer in list(physics.named_buffers()):
        if buffer.is_complex() or buffer.is_floating_point():
            owner, _, last = buffer_name.rpartition(".")
            wide = torch.complex128 if buffer.is_complex() else torch.float64
            setattr(physics.get_submodule(owner), last, buffer.to(wide))
    channels = 2 if name == "mri" else 1
    truth = torch.rand(1, channels, 16, 16, dtype=torch.float64)
    y = physics.A(truth)
    precise = Anderson(500, 1e-9)
    network = dinv.models.DRUNet(channels, channels, nc=(4, 4, 4, 4), nb=1, pretrained=None)
    denoiser = AtNoiseLevel(network.double(), 0.1)
    model = DEQRED(
        denoiser,
        tau=0.2,
        solver=precise,
        differentiation=Implicit(precise),
        normalize=False,
        on_failure="raise",
    )

    def loss(data):
        return (model(data, physics) - truth).square().sum()

    x = model(y, physics)
    with torch.no_grad():
        operator = as_operator(physics)
        operator.initial(y)
        norm = operator.norm_squared()
        equation = physics.A_adjoint(physics.A(x) - y) + 0.2 * norm * (x - denoiser(x))
    assert equation.norm() < 1e-6 * norm * x.norm()
    data = y.clone().requires_grad_()
    loss(data).backward()
    weights = list(denoiser.parameters())
    implicit = [p.grad.clone() for p in weights]
    for _ in range(2):
        u = torch.randn_like(y)
        with torch.no_grad():
            difference = (loss(y + 1e-4 * u) - loss(y - 1e-4 * u)) / 2e-4
        torch.testing.assert_close((data.grad * u).sum(), difference, rtol=1e-4, atol=1e-6)
    model.zero_grad()
    model.differentiation = Unrolled()
    loss(y).backward()
    for one, other in zip(weights, implicit, strict=True):
        assert relative_error(other, one.grad) < 1e-5


@pytest.mark.parametrize("name", ["ct", "mri", "its own mri"])
def test_its_trainer_trains_and_tests_a_model(dinv, name, tmp_path):
    """Online measurements of masks drawn for each step where it is MRI, as deepinv has them."""
    size, mri = (16, 16), name != "ct"
    channels = 1 + mri
    if name == "its own mri":
        physics = dinv.physics.MultiCoilMRI(coil_maps=birdcage_maps(3, size), img_size=(2, *size))
    else:
        physics = physics_of(name, size, noise_model=dinv.physics.GaussianNoise(0.01))
    images = torch.zeros(4, channels, *size)
    for i in range(4):
        images[i, 0, 2 + i : 9 + i, 4 : 12 - i] = 0.8
    loader = torch.utils.data.DataLoader(images, batch_size=2)
    masks = dinv.physics.generator.GaussianMaskGenerator(
        (2, *size), acceleration=2, rng=torch.Generator().manual_seed(0)
    )
    network = dinv.models.DRUNet(channels, channels, nc=(8, 8, 8, 8), nb=1, pretrained=None)
    model = DEQRED(AtNoiseLevel(network, 0.1), tau=0.3)
    before = [p.clone() for p in model.parameters()]
    common = {
        "physics": physics,
        "physics_generator": masks if mri else None,
        "online_measurements": True,
        "device": "cpu",
        "verbose": False,
        "show_progress_bar": False,
    }
    trainer = dinv.Trainer(
        model,
        train_dataloader=loader,
        optimizer=torch.optim.Adam(model.parameters(), 3e-3),
        epochs=6,
        save_path=str(tmp_path),
        **common,
    )
    first = dinv.test(model, loader, **common)["PSNR"]
    trainer.train()
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    result = dinv.test(model, loader, **common)
    assert result["PSNR"] > first + 0.5
    assert result["PSNR"] > result["PSNR no learning"]


@pytest.mark.parametrize("name", ["ct", "mri"])
@pytest.mark.parametrize("loss", ["SureGaussianLoss", "MCLoss", "SplittingLoss", "R2RLoss"])
def test_its_losses_without_truth(dinv, name, loss):
    """They call the model on other data and on other physics made of ours, and add noise where nothing is sampled."""
    noise = dinv.physics.GaussianNoise(0.05)
    physics = physics_of(name, (16, 16), noise_model=noise)
    channels = physics.img_size[0]
    image = torch.zeros(channels, 16, 16)
    image[0, 4:10, 5:12] = 0.8
    y = physics(image[None])[0]
    arguments = {"SureGaussianLoss": (0.05,), "R2RLoss": (None, noise)}.get(loss, ())
    network = dinv.models.DRUNet(channels, channels, nc=(8, 8, 8, 8), nb=1, pretrained=None)
    trainer = dinv.Trainer(
        DEQRED(AtNoiseLevel(network, 0.1), tau=0.3),
        physics=physics,
        train_dataloader=torch.utils.data.DataLoader([{"y": y}] * 2, batch_size=2),
        optimizer=torch.optim.Adam(network.parameters(), 1e-3),
        losses=getattr(dinv.loss, loss)(*arguments),
        metrics=[],
        epochs=8,
        save_path=None,
        device="cpu",
        verbose=False,
        show_progress_bar=False,
    )
    trainer.train()
    history = trainer.loss_history[loss]
    # What is drawn at each step makes them go up and down.
    assert sum(history[-3:]) < sum(history[:3])


def test_its_tests_are_found_where_the_package_has_them():
    """A rename there would else skip them all."""
    theirs = pytest.importorskip("deepinv.tests.test_physics")
    assert all(hasattr(theirs, name) for name, _ in GENERIC)
    assert importlib.import_module("deepinv").__version__
