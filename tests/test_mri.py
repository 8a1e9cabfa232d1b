"""CartesianMRI: conventions, masks, preparation, and the fixed point through it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from cases import dot_test, relative_error

from oder_fast import DEQRED, Anderson, CartesianMRI, GradientStep, Implicit, Nesterov, Picard, Unrolled
from oder_fast.data import birdcage_maps, espirit_maps, random_ellipses, random_lines


def draw(*size, generator, dtype=torch.complex128):
    return torch.randn(*size, dtype=torch.complex128, generator=generator).to(dtype)


def plain(x, maps, mask, centered):
    """As users of plain PyTorch write it."""
    axes = (-2, -1)
    weighted = maps * x[:, None]
    if not centered:
        return torch.fft.fft2(weighted, norm="ortho") * mask
    shifted = torch.fft.fft2(torch.fft.ifftshift(weighted, dim=axes), norm="ortho")
    return torch.fft.fftshift(shifted, dim=axes) * mask


def masks(height, width, generator):
    """Masks as a user gives them, and as they multiply k-space."""
    columns = torch.rand(width, generator=generator) < 0.4
    rows = torch.rand(height, 1, generator=generator) < 0.4
    points = torch.rand(height, width, generator=generator) < 0.4
    many = torch.rand(2, 1, width, generator=generator) < 0.4
    columns[:2], rows[:2], points[:2], many[..., :2] = True, True, True, True
    return [
        (columns, columns[None, None], -1),
        (columns.float(), columns[None, None], -1),
        (rows, rows[None, None], -2),
        (columns.expand(height, width), columns[None, None], -1),
        (points, points[None, None], None),
        (many, many[:, None], -1),
        (torch.stack((points, ~points)), torch.stack((points, ~points))[:, None], None),
        (torch.ones(height, width), torch.ones(1, 1, 1, 1), -1),
    ]


@pytest.mark.parametrize("size", [(16, 12), (15, 13)])
@pytest.mark.parametrize("centered", [True, False])
def test_equals_plain_transforms(size, centered, generator):
    x = draw(2, *size, generator=generator)
    maps = draw(3, *size, generator=generator)
    for given, mask, axis in masks(*size, generator):
        mri = CartesianMRI(maps, given, centered=centered)
        assert mri.axis == axis
        assert mri.data_shape == (3, *size)
        y = mri(x)
        assert relative_error(y, plain(x, maps, mask, centered)) < 1e-13
        z = draw(*y.shape, generator=generator) * mask
        assert dot_test(mri, mri.adjoint, x, z) < 1e-14
        expected = mri.adjoint(mri(x) - z)
        data_fidelity = mri.least_squares(z)
        assert relative_error(data_fidelity.gradient(x), expected) < 1e-13
        assert relative_error(data_fidelity.normal(x), mri.adjoint(mri(x))) < 1e-13
        blocks = torch.tensor([0, 2])
        some = data_fidelity.gradient(x, blocks)
        few = CartesianMRI(maps[blocks], given, centered=centered)
        assert relative_error(some, 1.5 * few.adjoint(few(x) - z[:, blocks])) < 1e-13


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize(("rows", "size"), [(True, (11, 16)), (False, (15, 10)), (True, (8, 9))])
def test_an_oversampled_readout_costs_nothing_and_loses_nothing(rows, size, centered, generator):
    """Against the image surrounded by zeros, transformed whole."""
    along = -1 if rows else -2
    x, maps = draw(2, *size, generator=generator), draw(2, *size, generator=generator)
    mask = torch.rand((size[0], 1) if rows else (size[1],), generator=generator) < 0.5
    mask[0] = True
    readout = 2 * size[along] + 1
    mri = CartesianMRI(maps, mask, centered=centered, readout_size=readout)
    wide = list(size)
    wide[along] = readout
    shifted = torch.fft.fftshift(maps * x[:, None], dim=along) if not centered else maps * x[:, None]
    padded = torch.zeros(2, 2, *wide, dtype=x.dtype)
    padded.narrow(along, readout // 2 - size[along] // 2, size[along]).copy_(shifted)
    if not centered:
        padded = torch.fft.ifftshift(padded, dim=along)
    y = plain(padded.flatten(0, 1), 1, mask, centered).reshape(padded.shape)
    assert mri.data_shape == (2, *wide)
    assert relative_error(mri(x), y) < 1e-13
    z = draw(*y.shape, generator=generator) * mask
    assert dot_test(mri, mri.adjoint, x, z) < 1e-14


def test_norms_bound_the_gradient(generator):
    maps = birdcage_maps(6, (20, 24)).to(torch.complex128)
    mask = random_lines(24, 3, 0.2, generator)
    mri = CartesianMRI(maps, mask)
    full = CartesianMRI(maps, torch.ones(24))
    assert mri.norm_squared() == pytest.approx(1, abs=1e-6)
    x = draw(1, 20, 24, generator=generator)
    assert relative_error(full.least_squares(full(x)).normal(x), x) < 1e-6
    data_fidelity = mri.least_squares(mri(x))
    for _ in range(30):
        x = data_fidelity.normal(x / x.norm())
    assert 0.9 < float(x.norm()) <= mri.norm_squared() + 1e-9
    constants = [mri.minibatch_norm_squared(b) for b in (1, 2, 3, 6)]
    assert constants == sorted(constants, reverse=True)
    assert constants[-1] == mri.norm_squared()
    # Expected smoothness: E |g_B(x)|^2 <= L <x, A^H A x>.
    x = draw(1, 20, 24, generator=generator)
    squares = torch.stack(
        [data_fidelity.normal(x, mri.draw_blocks(2, generator)).norm().square() for _ in range(300)]
    ).mean()
    along = (x.conj() * data_fidelity.normal(x)).real.sum()
    assert float(squares) < constants[1] * float(along)


def test_blocks_are_drawn_evenly(generator):
    mri = CartesianMRI(birdcage_maps(5, (4, 4)), torch.ones(4))
    counts = torch.zeros(5)
    for _ in range(2000):
        drawn = mri.draw_blocks(2, generator)
        assert len(drawn.unique()) == 2
        counts[drawn] += 1
    assert bool((counts / 2000 - 0.4).abs().max() < 0.05)
    with pytest.raises(ValueError, match="1 to 5 coils, got 6"):
        mri.draw_blocks(6)


def scan(generator, size=24, coils=4, dtype=torch.complex128):
    """A phantom with smooth phase, its k-space, and the operator."""
    magnitude = random_ellipses(1, size, generator).double()
    ramp = torch.linspace(-1, 1, size, dtype=torch.float64)
    x = torch.polar(magnitude, (ramp[:, None] + ramp**2).expand_as(magnitude)).to(dtype)
    maps = birdcage_maps(coils, (size, size)).to(dtype)
    mri = CartesianMRI(maps, random_lines(size, 2, 0.2, generator))
    return x, mri(x), mri


class Soft(torch.nn.Module):
    """A linear denoiser that contracts."""

    def __init__(self):
        super().__init__()
        self.kernel = torch.nn.Parameter(torch.full((2, 1, 3, 3), 0.8 / 9, dtype=torch.float64))

    def forward(self, x):
        return torch.nn.functional.conv2d(x, self.kernel, padding=1, groups=2)


def test_the_fixed_point_solves_its_equation(generator):
    x, y, mri = scan(generator)
    denoiser = Soft()
    solution = DEQRED(denoiser, tau=0.3, solver=Anderson(500, 1e-9))(y, mri, return_solution=True)
    assert bool(solution.converged.all())
    z = solution.value
    channels = torch.view_as_real(z).permute(0, 3, 1, 2)
    smooth = torch.view_as_complex(denoiser(channels).permute(0, 2, 3, 1).contiguous())
    residual = (mri.adjoint(mri(z) - y) + 0.3 * mri.norm_squared() * (z - smooth)).detach()
    assert float(residual.norm() / z.detach().norm()) < 1e-8
    assert relative_error(z.detach(), x) < relative_error(mri.initial(y), x)


def test_minibatches_of_coils_reach_the_fixed_point(generator):
    _, y, mri = scan(generator)
    denoiser = Soft()
    full = DEQRED(denoiser, tau=0.3, solver=Anderson(500, 1e-9))(y, mri)
    model = DEQRED(
        denoiser, tau=0.3, step=GradientStep(None, 2), solver=Picard(3000, 1e-6), generator=generator
    )
    assert relative_error(model(y, mri), full) < 1e-5


def test_implicit_gradients_equal_unrolled_ones(generator):
    _, y, mri = scan(generator, size=12)
    grads = []
    solver = Picard(3000, 1e-9)
    for differentiation in (Implicit(solver=solver), Unrolled()):
        denoiser, tau = Soft(), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        data = y.clone().requires_grad_()
        model = DEQRED(denoiser, tau=tau, solver=solver, differentiation=differentiation)
        loss = (model(data, mri) - 0.5).abs().square().sum()
        grads.append(torch.autograd.grad(loss, [denoiser.kernel, tau, data]))
    for one, other in zip(*grads, strict=True):
        assert relative_error(one, other) < 1e-7


def test_images_with_maps_and_masks_of_their_own_may_converge_apart(generator):
    """Where one of a batch is done, the others keep their own maps."""
    maps = torch.stack([birdcage_maps(3, (16, 16)), birdcage_maps(3, (16, 16)).flip(-1)]).to(torch.complex128)
    mask = torch.stack([random_lines(16, 2, 0.2, generator)[None] for _ in range(2)])
    x = draw(2, 16, 16, generator=generator)
    mri = CartesianMRI(maps, mask)
    y = mri(x)
    # The second starts at its solution.
    model = DEQRED(Soft(), tau=0.5, solver=Anderson(500, 1e-8))
    with torch.no_grad():
        start = model(y, mri)
        start[0] = 0
        solution = model(y, mri, start, return_solution=True)
        assert int(solution.iterations[1]) < int(solution.iterations[0])
        for k in range(2):
            own = CartesianMRI(maps[k], mask[k])
            alone = model(y[k : k + 1], own, start[k : k + 1])
            assert relative_error(solution.value[k], alone[0]) < 1e-6


def test_double_conversion_copy_and_pickle(generator):
    mri = CartesianMRI(birdcage_maps(3, (8, 8)), torch.ones(8))
    x = draw(1, 8, 8, generator=generator, dtype=torch.complex64)
    y = mri(x)
    for other in (copy.deepcopy(mri), pickle.loads(pickle.dumps(mri))):
        assert torch.equal(other(x), y)
    model = torch.nn.Sequential(mri).half()
    assert model[0].coil_maps.dtype == torch.complex64
    model.double()
    assert model[0].coil_maps.dtype == torch.complex128
    assert relative_error(model[0](x.to(torch.complex128)), y) < 1e-6
    assert "n_coils=3" in repr(mri)
    assert not mri.state_dict()


@pytest.mark.parametrize("shape", [(10,), (12, 1), (12, 10), (2, 1, 10)])
def test_what_is_made_of_mask_and_maps_follows_them(generator, shape):
    before, after = (torch.rand(shape, generator=generator) < 0.5 for _ in range(2))
    before.flatten()[:2], after.flatten()[-2:] = True, True
    before[-1], after[-1] = True, True
    maps = draw(1, 12, 10, generator=generator)
    maps = maps / maps.abs()
    mri, x = CartesianMRI(maps.clone(), before.clone()), draw(2, 12, 10, generator=generator)
    weight, tolerance = torch.tensor(0.5, dtype=torch.float64), torch.full((2,), 1e-10, dtype=torch.float64)
    # All that is kept is made.
    mri.least_squares(mri(x)).solve(x, weight, x, tolerance)
    copied = copy.deepcopy(mri)
    mri.mask.copy_(CartesianMRI(maps, after).mask.clone())
    mri.coil_maps.mul_(3)
    fresh = CartesianMRI(3 * maps, after)
    y = fresh(x)
    torch.testing.assert_close(mri(x), y)
    torch.testing.assert_close(mri.adjoint(y), fresh.adjoint(y))
    solved, expected = (m.least_squares(y).solve(x, weight, x, tolerance) for m in (mri, fresh))
    torch.testing.assert_close(solved, expected)
    torch.testing.assert_close(copied(x), CartesianMRI(maps, before)(x))
    # A copy of one that was changed and not called since.
    mri.mask.copy_(copied.mask)
    torch.testing.assert_close(copy.deepcopy(mri)(x), 3 * copied(x))
    # Nothing is measured where nothing is sampled.
    copied.mask.fill_(False)
    assert not copied(x).any()
    assert not copied.adjoint(copied(x)).any()
    copied.mask.fill_(True)
    torch.testing.assert_close(copied(x), plain(x, maps, torch.ones(1, 1, 1, 1), True))


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_operator_takes_its_mask_as_it_is(generator):
    mri = CartesianMRI(draw(2, 6, 5, generator=generator), torch.tensor([1, 0, 1, 1, 0]))
    x = draw(1, 6, 5, generator=generator)
    for one in (mri, copy.deepcopy(mri), copy.deepcopy(mri).to(torch.float64)):
        compiled = torch.compile(one.forward, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), mri(x))


def test_maps_estimated_from_the_data_serve_as_well(generator):
    """From k-space alone: calibration lines to maps to image."""
    x = random_ellipses(1, 64, generator).to(torch.complex64)
    true = birdcage_maps(6, (64, 64))
    mask = random_lines(64, 2, 0.4, generator)
    y = CartesianMRI(true, mask)(x)
    mri = CartesianMRI(espirit_maps(y[0]), mask)
    step, solver = GradientStep(), Nesterov(200, 1e-6)
    found = DEQRED(torch.nn.Identity(), tau=0.0, step=step, solver=solver, on_failure="ignore")(y, mri)
    inside = x[0].abs() > 0.1
    error = (found[0].abs() - x[0].abs())[inside].norm() / x[0][inside].norm()
    assert float(error) < 0.05


@pytest.mark.parametrize(
    ("maps", "mask", "options", "error", "match"),
    [
        (torch.ones(2, 4, 6), torch.ones(6), {}, TypeError, "coil_maps must be complex"),
        (torch.ones(2, 4, 6) + 0j, torch.ones(6) + 0j, {}, TypeError, "mask must be bool or real"),
        ((torch.ones(2, 4, 6) + 0j).requires_grad_(), torch.ones(6), {}, ValueError, "detach it"),
        (torch.zeros(2, 4, 6) + 0j, torch.ones(6), {}, ValueError, "zero everywhere"),
        (torch.ones(2, 4, 6) + 0j, torch.ones(6), {"centered": "no"}, TypeError, "must be a bool"),
        (torch.ones(3, 2, 4, 6) + 0j, torch.ones(3, 6), {}, ValueError, r"\(B, 1, 6\).*got \(3, 6\)"),
        ([1], torch.ones(6), {}, TypeError, "must be a torch.Tensor, got list"),
        (torch.ones(4, 6) + 0j, torch.ones(6), {}, ValueError, r"\(C, H, W\)"),
        (torch.full((2, 4, 6), torch.nan) + 0j, torch.ones(6), {}, ValueError, "must be finite"),
        (torch.ones(2, 4, 6) + 0j, torch.ones(5), {}, ValueError, r"mask must have shape \(6,\).*got \(5,\)"),
        (torch.ones(2, 4, 6) + 0j, torch.ones(1, 1, 4, 6), {}, ValueError, "mask must have shape"),
        (torch.ones(2, 4, 6) + 0j, torch.full((6,), 0.5), {}, ValueError, "only 0 and 1"),
        (torch.ones(2, 4, 6) + 0j, torch.zeros(6), {}, ValueError, "samples nothing"),
        (
            torch.ones(2, 4, 6) + 0j,
            torch.stack((torch.ones(1, 6), torch.zeros(1, 6))),
            {},
            ValueError,
            "samples nothing",
        ),
        (torch.ones(3, 2, 4, 6) + 0j, torch.eye(6)[:2, None], {}, ValueError, "as many images, got 3 and 2"),
        (torch.ones(2, 4, 6) + 0j, torch.ones(6), {"readout_size": 3}, ValueError, "at least the 4 pixels"),
        (torch.ones(2, 4, 6) + 0j, torch.ones(6), {"readout_size": 8.0}, TypeError, "must be an int"),
        (torch.ones(2, 4, 6) + 0j, torch.eye(6)[:4], {"readout_size": 8}, ValueError, "whole lines"),
    ],
)
def test_what_makes_no_scan_is_named(maps, mask, options, error, match):
    with pytest.raises(error, match=match):
        CartesianMRI(maps, mask, **options)


def test_data_that_disagree_are_named(generator):
    x, y, mri = scan(generator, size=16)
    model = DEQRED(torch.nn.Identity(), tau=0.1)
    missing = (~mri.mask[0, 0]).nonzero()[0]
    bad = y.clone()
    bad[0, 1, 3, missing] = 1 + 1j
    with pytest.raises(ValueError, match=rf"disagree: the mask is 0 at index \(0, 1, 3, {int(missing)}\)"):
        model(bad, mri)
    with pytest.raises(ValueError, match="k-space of image 0 is zero wherever"):
        model(torch.zeros_like(y), mri)
    bad = y.clone()
    bad[0, 0, 0, 0] = complex("nan")
    with pytest.raises(ValueError, match="y must be finite"):
        model(bad, mri)
    with pytest.raises(ValueError, match="k-space must be finite"):
        mri.least_squares(bad)
    with pytest.raises(ValueError, match=r"\(B, 4, 16, 16\), got \(1, 3, 16, 16\)"):
        mri.least_squares(y[:, :3])
    with pytest.raises(TypeError, match="image must be complex"):
        mri(x.real)
    with pytest.raises(ValueError, match="nonnegative needs real images"):
        DEQRED(torch.nn.Identity(), tau=0.1, nonnegative=True)(y, mri)
    two = CartesianMRI(torch.stack([mri.coil_maps[0]] * 2), mri.mask[0])
    with pytest.raises(ValueError, match="as many as there are coil maps, got 1"):
        two(x)


def test_units_out_of_the_range_of_squares_are_refused(generator):
    """Norms of such data would underflow to zero, and nothing would be left to iterate."""
    _, y, mri = scan(generator, dtype=torch.complex64)
    model = DEQRED(lambda x: 0.9 * x, tau=0.2, solver=Anderson(300, 1e-4))
    expected = model(y, mri)
    for factor in (1e-8, 1e8):
        assert relative_error(model(y * factor, mri) / factor, expected) < 1e-3
    for factor in (1e-18, 1e18):
        with pytest.raises(ValueError, match=r"y of image 0 has the largest magnitude .* in another unit"):
            model(y * factor, mri)


def test_a_full_mask_keeps_the_direction_of_its_lines(generator):
    maps = birdcage_maps(2, (6, 8))
    assert CartesianMRI(maps, torch.ones(6, 1), readout_size=16).data_shape == (2, 6, 16)
    assert CartesianMRI(maps, torch.ones(8), readout_size=12).data_shape == (2, 12, 8)


def test_an_empty_batch_stays_empty():
    mri = CartesianMRI(birdcage_maps(2, (6, 8)), torch.ones(8))
    x = torch.zeros(0, 6, 8, dtype=torch.complex64)
    assert mri(x).shape == (0, 2, 6, 8)
    assert mri.adjoint(mri(x)).shape == x.shape
    assert mri.least_squares(mri(x)).gradient(x).shape == x.shape
