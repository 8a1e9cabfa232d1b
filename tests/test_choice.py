"""Measurements split in two, and the prior's weight chosen by them or by the noise."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from oder_fast import (
    DEQRED,
    CartesianMRI,
    DiffractionTomography,
    DivergenceError,
    ParallelBeamCT,
    TotalVariation,
    as_operator,
    choose_tau,
    choose_weight,
)
from oder_fast.choice import _Search
from oder_fast.data import birdcage_maps, led_ring, random_lines

warns_of_bounds = pytest.warns(UserWarning, match="at the bound")


def g(seed=0):
    return torch.Generator().manual_seed(seed)


class Blur:
    """A physics with ``A`` and ``A_adjoint``."""

    def A(self, x):
        return (x + x.roll(1, -1)) / 2

    def A_adjoint(self, y):
        return (y + y.roll(-1, -1)) / 2


def ct():
    return ParallelBeamCT((12, 10), 9, 17, bin_offset=0.3, bin_spacing=0.9), torch.float32


def lines():
    mask = torch.zeros(2, 1, 16, dtype=torch.bool)
    mask[0, 0, ::2] = mask[1, 0, 1::2] = mask[:, 0, 6:10] = True
    return CartesianMRI(birdcage_maps(2, (12, 16)), mask, readout_size=20), torch.complex64


def points():
    mask = torch.rand(12, 14, generator=g()) < 0.5
    return CartesianMRI(birdcage_maps(2, (12, 14)), mask, centered=False), torch.complex64


def idt():
    operator = DiffractionTomography(
        (16, 14), [-2.0, 0.0, 2.0], led_ring(7, 0.3), pixel_size=0.4, wavelength=0.6, numerical_aperture=0.4,
        medium_index=1.33,
    )  # fmt: skip
    return operator, torch.complex64


def blur():
    operator = as_operator(Blur())
    operator.image_shape = operator.data_shape = (6, 8)
    return operator, torch.float32


@pytest.mark.parametrize("make", [ct, lines, points, idt, blur])
def test_the_parts_are_of_the_same_operator_and_together_the_whole(make):
    operator, dtype = make()
    x = torch.randn(2, *operator.image_shape, dtype=dtype, generator=g())
    y = operator(x)
    kept, rest = operator.split(y, 0.3, g())
    for part in (kept, rest):
        # What a part foretells of the image is what it holds of the data.
        assert torch.allclose(part.operator(x), part.y, atol=1e-4 * float(y.abs().max()))
        part.operator.least_squares(part.y).gradient(x)
    both = kept.operator.adjoint(kept.y) + rest.operator.adjoint(rest.y)
    assert torch.allclose(both, operator.adjoint(y), atol=1e-4 * float(both.abs().max()))
    share = float((rest.y != 0).sum() / ((rest.y != 0).sum() + (kept.y != 0).sum()))
    assert 0.1 < share < 0.45
    again, _ = operator.split(y, 0.3, g())
    assert torch.equal(again.y, kept.y)
    other, _ = operator.split(y, 0.3, g(1))
    assert other.y.shape != kept.y.shape or not torch.equal(other.y, kept.y)


def test_the_middle_of_k_space_stays_and_masks_of_a_batch_are_split_alike():
    mri, _ = lines()
    y = mri(torch.ones(2, 12, 16, dtype=torch.complex64))
    kept, rest = mri.split(y, 0.5, g())
    assert bool(kept.operator.mask[:, 0, 6:10].all())
    assert rest.operator.mask.sum((1, 2)).tolist() == [5, 5]
    # The split of an image is the same whatever else is in the batch.
    alone = CartesianMRI(mri.coil_maps, mri.mask[1:], readout_size=20)
    assert torch.equal(alone.split(y[1:], 0.5, g())[1].operator.mask[0], rest.operator.mask[1])


def test_views_left_out_lie_spread():
    scan = ParallelBeamCT(8, 40)
    _, rest = scan.split(torch.zeros(1, 40, scan.n_bins), 0.25, g())
    assert len(rest.operator.angles) == 10
    assert ((rest.operator.angles / (math.pi / 40)).round().long() // 4).tolist() == list(range(10))


@pytest.mark.parametrize(
    ("share", "message"),
    [(0.0, "above 0 and below 1, got 0"), (1.0, "got 1"), (math.nan, "got nan"), (True, "must be a float")],
)
def test_shares_that_make_no_parts(share, message):
    scan, _ = ct()
    with pytest.raises((ValueError, TypeError), match=message):
        scan.split(torch.zeros(1, 9, 17), share)


def test_what_cannot_be_split():
    scan = ParallelBeamCT(8, 1)
    with pytest.raises(ValueError, match="nothing can be left out of 1 views"):
        choose_tau(scan(torch.ones(1, 8, 8)), scan, TotalVariation(0.1))
    mask = torch.zeros(16, dtype=torch.bool)
    mask[6:10] = True
    mri = CartesianMRI(torch.ones(1, 16, 16, dtype=torch.complex64), mask)
    with pytest.raises(ValueError, match="nothing can be left out of 4 lines"):
        mri.split(mri(torch.ones(1, 16, 16, dtype=torch.complex64)), 0.2)


# ------------------------------------------------------------------ the search


@pytest.mark.parametrize("least", [2e-3, 0.03, 0.5])
def test_the_search_finds_a_minimum_in_few_solves(least):
    search = _Search(lambda v: 1 + math.log(v / least) ** 2, (1e-4, 1.0), 12)
    assert search.least() == pytest.approx(least, rel=0.25)
    assert len(search.scores) <= 10


@pytest.mark.parametrize("least", [1e-6, 1e3])
def test_the_search_ends_at_a_bound(least):
    search = _Search(lambda v: 1 + math.log(v / least) ** 2, (1e-4, 1.0), 12)
    assert search.least() == (1e-4 if least < 1e-4 else 1.0)


def test_the_search_copes_with_values_that_diverge():
    search = _Search(lambda v: math.inf if v > 0.01 else math.log(v / 2e-3) ** 2, (1e-4, 1.0), 12)
    assert search.least() == pytest.approx(2e-3, rel=0.3)
    assert _Search(lambda v: math.inf, (1e-4, 1.0), 12).least() > 0


def test_the_search_meets_a_target():
    search = _Search(lambda v: v**1.5 + 0.01, (1e-4, 1.0), 12)
    assert search.crossing(0.1) == pytest.approx(0.09 ** (2 / 3), rel=0.02)
    assert _Search(lambda v: v, (1e-4, 1.0), 12).crossing(5.0) == 1.0
    assert _Search(lambda v: v, (1e-4, 1.0), 12).crossing(1e-6) == 1e-4


# ------------------------------------------------------------------ the choice


NOISE = {"left_out": None, "risk": 0.5}


def smooth(x):
    return F.avg_pool2d(x, 3, 1, 1)


def problem():
    x = torch.zeros(1, 16, 16)
    x[:, 4:11, 5:12] = 1.0
    x[:, 6:9, 7:10] = 0.5
    scan = ParallelBeamCT(16, 40)
    y = scan(x) + 0.5 * torch.randn(1, 40, scan.n_bins, generator=g())
    return x, scan, y


@pytest.mark.parametrize("criterion", ["left_out", "risk"])
def test_the_tau_chosen_is_near_the_best(criterion):
    x, scan, y = problem()
    choice = choose_tau(y, scan, smooth, noise=NOISE[criterion], criterion=criterion)
    assert choice.at_bound is None

    def error(tau):
        return float((DEQRED(smooth, tau=tau)(y, scan) - x).square().mean())

    with torch.no_grad():
        best = min(error(t) for t in torch.logspace(-3, 0, 7).tolist())
        assert error(choice.value) < 1.2 * best < 0.5 * min(error(1e-3), error(1.0))
    assert choice.value in [trial.value for trial in choice.tried]
    assert "tau=" in repr(choice)


@pytest.mark.exhaustive
@pytest.mark.parametrize("criterion", ["left_out", "risk"])
def test_the_weight_chosen_is_near_the_best(criterion):
    x, scan, y = problem()
    choice = choose_weight(y, scan, noise=NOISE[criterion], criterion=criterion)
    assert choice.at_bound is None

    def error(weight):
        return float((DEQRED(TotalVariation(weight), tau=0.1)(y, scan) - x).square().mean())

    with torch.no_grad():
        best = min(error(w) for w in torch.logspace(-2.5, 0, 7).tolist())
        assert error(choice.value) < 1.3 * best < 0.5 * min(error(3e-3), error(1.0))


def test_the_weight_of_a_denoiser_of_ones_own():
    _, scan, y = problem()
    choice = choose_weight(y, scan, lambda w: lambda x: x + w * (smooth(x) - x), tau=1.0, bounds=(1e-4, 1.0))
    assert choice.tau == 1.0
    assert "weight=" in repr(choice)
    assert choice.name == "weight"


def test_tau_and_a_models_settings():
    _, scan, y = problem()
    model = DEQRED(smooth, tau=1.0, nonnegative=True, on_failure="raise")
    choice = choose_tau(y, scan, model)
    assert choice.model.nonnegative
    assert choice.model.on_failure == "raise"
    assert choice.model.tau == choice.value == choice.tau
    assert model.tau == 1.0
    assert choice.value == choose_tau(y.numpy(), scan, model).value


def test_the_discrepancy_meets_the_noise():
    _, scan, y = problem()
    choice = choose_tau(y, scan, smooth, noise=0.5, criterion="discrepancy", bounds=(1e-4, 100.0))
    residual = (scan(choice.model(y, scan).detach()) - y).square().mean()
    assert float(residual) == pytest.approx(0.25, rel=0.05)


def test_k_space_without_samples_is_no_measurement():
    mri = CartesianMRI(birdcage_maps(4, (16, 16)), random_lines(16, 2, 0.2, g()))
    x = torch.zeros(1, 16, 16, dtype=torch.complex64)
    x[:, 4:11, 5:12] = 1.0
    y = mri(x)
    y = y + 0.5 * torch.randn(y.shape, dtype=y.dtype, generator=g()) * (y != 0)
    choice = choose_tau(y, mri, smooth, noise=0.5, criterion="discrepancy", bounds=(1e-4, 100.0))
    residual = (
        (mri(choice.model(y, mri).detach()) - y)[:, :, mri.mask[0].expand(16, 16)].abs().square().mean()
    )
    assert float(residual) == pytest.approx(0.25, rel=0.05)
    assert 1e-2 < choose_tau(y, mri, smooth, bounds=(1e-4, 100.0)).value < 10


def test_a_range_without_a_minimum_warns():
    _, scan, y = problem()
    with warns_of_bounds:
        choice = choose_tau(y, scan, smooth, bounds=(1e-4, 1e-3))
    assert choice.at_bound == choice.value == 1e-3
    with warns_of_bounds:
        assert choose_tau(y, scan, smooth, bounds=(1.0, 10.0)).at_bound == 1.0
    with pytest.warns(UserWarning, match="hardly depends on tau"):
        choose_tau(y, scan, smooth, bounds=(0.02, 0.020001))


@pytest.mark.filterwarnings("ignore:.*did not converge")
def test_a_denoiser_that_always_diverges():
    _, scan, y = problem()
    with pytest.raises(DivergenceError, match="diverge for every tau"):
        choose_tau(y, scan, lambda x: x * math.nan)


def test_an_object_of_ones_own():
    x = torch.zeros(1, 1, 16, 16)
    x[..., 4:11, 5:12] = 1.0
    y = Blur().A(x) + 0.2 * torch.randn(x.shape, generator=g())
    assert 1e-3 < choose_tau(y, Blur(), smooth).value < 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"criterion": "risk", "noise": 0.0},
            "noise must be finite and above 0, got 0; without noise the least tau",
        ),
        ({"criterion": "risk", "noise": math.nan}, "noise must be finite and above 0, got nan"),
        ({"criterion": "risk"}, "'risk' needs the noise"),
        ({"noise": 0.5}, "is for the criteria"),
        ({"criterion": "gcv"}, "criterion must be one of"),
        ({"bounds": (1.0, 0.1)}, "the least first"),
        ({"bounds": (0.0, 0.1)}, "above 0"),
        ({"solves": 2}, "at least 3"),
        ({"share": 0.0}, "above 0 and below 1"),
    ],
)
def test_messages(options, message):
    _, scan, y = problem()
    with pytest.raises(ValueError, match=message):
        choose_tau(y, scan, TotalVariation(0.1), **options)


def test_nan_is_refused_with_its_index():
    _, scan, y = problem()
    y[0, 3, 4] = math.nan
    with pytest.raises(ValueError, match=r"y must be finite, got nan at index \(0, 3, 4\)"):
        choose_tau(y, scan, smooth)


def test_plot(tmp_path):
    _, scan, y = problem()
    axes = choose_tau(y, scan, smooth, noise=0.5, criterion="discrepancy", bounds=(1e-4, 100.0)).plot()
    assert axes.get_xscale() == "log"
    axes.figure.savefig(tmp_path / "choice.png")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bounds": 0.1}, "bounds must be two finite numbers above 0, the least first, got 0.1"),
        ({"bounds": ("a", "b")}, "bounds must be two finite numbers"),
        ({"bounds": (1, 2, 3)}, "bounds must be two finite numbers"),
        ({"criterion": "risk", "noise": "loud"}, "noise must be a number, got 'loud'"),
        (
            {"y": torch.ones(1, 9, 17, dtype=torch.int64)},
            "y must be floating-point or complex, got torch.int64",
        ),
        ({"y": torch.ones(0, 9, 17)}, r"y must not be empty, got the shape \(0, 9, 17\)"),
        ({"generator": 3}, "generator must be a torch.Generator or None, got 3"),
    ],
)
def test_a_choice_says_what_is_wrong(changed, message):
    scan, _ = ct()
    arguments = {"y": torch.ones(1, 9, 17), "operator": scan, "denoiser": TotalVariation(0.1), **changed}
    with pytest.raises((TypeError, ValueError), match=message):
        choose_tau(**arguments)
    with pytest.raises(TypeError, match="build must be a function of the weight, got "):
        choose_weight(torch.ones(1, 9, 17), scan, 0.1)
