"""Parallel-beam CT as users build it."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from cases import angles_over, dot_test, relative_error

from oder_fast import ParallelBeamCT


def disc(n, x, y, radius, value):
    axis = torch.arange(n, dtype=torch.float64) - (n - 1) / 2
    inside = (axis - x) ** 2 + (-axis[:, None] - y) ** 2 < radius**2
    return (value * inside).float()[None], inside


@pytest.mark.parametrize("window", ["ramp", "shepp-logan", "cosine", "hann"])
@pytest.mark.parametrize(
    "options", [{}, {"pixel_size": 0.2}, {"bin_spacing": 0.8, "n_bins": 240}, {"bin_offset": 3.3}], ids=str
)
def test_fbp_of_many_views_gives_back_the_value_of_a_disc(window, options):
    ct = ParallelBeamCT(128, angles=240, **options)
    image, inside = disc(128, 12, -20, 40, 2.5)
    result = ct.fbp(ct(image), window)[0]
    deep = inside & disc(128, 12, -20, 36, 1.0)[1]
    assert result[deep].mean() == pytest.approx(2.5, rel=0.01)
    far = ~disc(128, 12, -20, 46, 1.0)[1]
    assert abs(result[far].mean()) < 0.01 * 2.5


def test_fbp_weighs_unevenly_spread_views():
    angles = torch.cat([angles_over(120, math.pi / 2), angles_over(60, math.pi / 2, math.pi / 2)])
    ct = ParallelBeamCT(96, angles=angles[torch.randperm(180)])
    image, inside = disc(96, 0, 5, 30, 1.0)
    assert ct.fbp(ct(image))[0][inside & disc(96, 0, 5, 26, 1)[1]].mean() == pytest.approx(1.0, rel=0.01)


def test_fbp_is_differentiable_in_the_data():
    ct = ParallelBeamCT(6, angles=5)
    y = torch.rand(1, *ct.data_shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: ct.fbp(y, "hann"), y)


def test_fbp_takes_half_precision():
    ct = ParallelBeamCT(32, angles=20)
    y = ct(disc(32, 0, 0, 10, 1.0)[0])
    assert relative_error(ct.fbp(y.bfloat16()), ct.fbp(y)) < 0.05


def test_degrees_are_noticed():
    with pytest.warns(UserWarning, match="angles are in radians, got up to 174"):
        ParallelBeamCT(8, torch.arange(0, 180, 6.0))


@pytest.mark.parametrize("sampling", ["uniform", "stratified"])
@pytest.mark.parametrize(
    ("n", "size"),
    [
        (7, 3),
        (11, 5),
        *(
            pytest.param(*sizes, marks=pytest.mark.exhaustive)
            for sizes in ((90, 30), (7, 6), (7, 7), (3, 1), (13, 2), (1, 1))
        ),
    ],
)
def test_every_view_is_drawn_as_often_and_once(sampling, n, size, generator):
    ct = ParallelBeamCT(8, angles=n, sampling=sampling)
    counts, draws = torch.zeros(n), 3000
    for _ in range(draws):
        views = ct.draw_blocks(size, generator)
        assert views.shape == (size,)
        assert views.dtype == torch.int64
        assert len(views.unique()) == size
        counts[views] += 1
    p = size / n
    # Five standard deviations of a binomial count.
    assert (counts / draws - p).abs().max() < 5 * math.sqrt(p * (1 - p) / draws) + 1e-9


def test_stratified_draws_the_same_offsets_in_each_sector(generator):
    ct = ParallelBeamCT(8, angles=90, sampling="stratified")
    for _ in range(20):
        views = ct.draw_blocks(30, generator)
        offsets = [set((views[(views >= 18 * k) & (views < 18 * k + 18)] % 18).tolist()) for k in range(5)]
        assert all(o == offsets[0] and len(o) == 6 for o in offsets)


def test_draws_repeat_from_the_seed():
    ct = ParallelBeamCT(8, angles=50)
    first = [ct.draw_blocks(7, g) for g in [torch.Generator().manual_seed(3)] for _ in range(4)]
    second = [ct.draw_blocks(7, g) for g in [torch.Generator().manual_seed(3)] for _ in range(4)]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1])


def test_norm_squared_is_the_largest_eigenvalue():
    ct = ParallelBeamCT((9, 11), angles=7)
    columns = ct.adjoint(ct(torch.eye(99).reshape(99, 9, 11))).reshape(99, 99)
    assert ct.norm_squared() == pytest.approx(np.linalg.eigvalsh(columns.double()).max(), rel=1e-3)


def test_operator_pairs_are_transposes(generator):
    ct = ParallelBeamCT((20, 26), angles=11, bin_offset=0.7)
    x, y = torch.randn(2, 20, 26, generator=generator), torch.randn(2, *ct.data_shape, generator=generator)
    assert dot_test(ct, ct.adjoint, x, y) < 1e-6
    residual = ct(x) - y
    data_fidelity = ct.least_squares(y)
    assert relative_error(data_fidelity.gradient(x), ct.adjoint(residual)) < 1e-6
    assert relative_error(data_fidelity.normal(x), ct.adjoint(ct(x))) < 1e-6


def test_gradient_is_that_of_the_least_squares(generator):
    ct = ParallelBeamCT(12, angles=6)
    x = torch.randn(1, 12, 12, generator=generator, requires_grad=True)
    y = torch.randn(1, *ct.data_shape, generator=generator)
    (expected,) = torch.autograd.grad(0.5 * (ct(x) - y).square().sum(), x)
    assert relative_error(ct.least_squares(y).gradient(x.detach()), expected) < 1e-6


def test_casting_does_not_move_the_rays():
    ct = ParallelBeamCT(16, angles=torch.tensor([0.1, 1.0, 2.0]))
    exact = ct.angles.clone()
    for change in (
        lambda c: c.half(),
        lambda c: c.to(torch.float32),
        copy.deepcopy,
        lambda c: pickle.loads(pickle.dumps(c)),
    ):
        changed = change(copy.deepcopy(ct))
        assert changed.angles.dtype == torch.float64
        assert torch.equal(changed.angles, exact)
        assert torch.equal(changed(torch.ones(1, 16, 16)), ct(torch.ones(1, 16, 16)))
    assert ct.state_dict() == {}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ParallelBeamCT(0, 4), ValueError, "image_size"),
        (lambda: ParallelBeamCT((4, 4, 4), 4), ValueError, "image_size"),
        (lambda: ParallelBeamCT(4, 0), ValueError, "at least one view, got 0"),
        (lambda: ParallelBeamCT(4, []), ValueError, "at least one view"),
        (lambda: ParallelBeamCT(4, [0.0, math.inf]), ValueError, "angles must be finite"),
        (lambda: ParallelBeamCT(4, True), TypeError, "got a bool"),
        (lambda: ParallelBeamCT(4, 4, pixel_size=-1), ValueError, "pixel_size must be a finite number above 0"),
        (lambda: ParallelBeamCT(4, 4, n_bins=0), ValueError, "n_bins must be at least 1"),
        (lambda: ParallelBeamCT(4, 4, sampling="random"), ValueError, "sampling must be one of"),
        (lambda: ParallelBeamCT(4, 4)(torch.zeros(1, 5, 4)), ValueError, r"image must have shape \(B, 4, 4\), got \(1, 5, 4\)"),
        (lambda: ParallelBeamCT(4, 4).fbp(torch.zeros(1, 4, 9)), ValueError, "sinogram must have shape"),
        (lambda: ParallelBeamCT(4, 4).fbp(torch.zeros(1, 4, 7), "boxcar"), ValueError, "filter must be one of"),
        (lambda: ParallelBeamCT(4, 4).draw_blocks(5), ValueError, "1 to 4 views, got 5"),
        (lambda: ParallelBeamCT(4, 4)(None), TypeError, "image must be a torch.Tensor, got NoneType"),
    ],
)  # fmt: skip
def test_messages(call, error, message):
    with pytest.raises(error, match=message):
        call()
