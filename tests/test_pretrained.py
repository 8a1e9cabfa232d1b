"""Models that come with the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

import oder_fast
from oder_fast import DiffractionTomography, ParallelBeamCT, model_card, pretrained
from oder_fast.data import add_gaussian_noise, cell_like, led_ring, psnr, shepp_logan
from oder_fast.denoisers.slices import background
from oder_fast.pretrained import Name

WEIGHTS = Path(oder_fast.__file__).parent / "weights"
NAMES = get_args(Name)


@pytest.mark.parametrize("name", NAMES)
def test_a_card_says_what_a_model_is_and_comes_from(name):
    card = model_card(name)
    assert {"denoiser", "tau", "nonnegative", "data", "licence", "training", "tested", "not for"} <= set(card)
    assert pretrained(name).tau == card["tau"]
    assert pretrained(name, tau=0.5).tau == 0.5


def test_files_are_small_and_hold_numbers_alone():
    files = sorted(WEIGHTS.iterdir())
    assert [f.name for f in files] == sorted(f"{n}.{s}" for n in NAMES for s in ("json", "npz"))
    assert sum(f.stat().st_size for f in files) < 8e6
    for name in NAMES:
        assert (WEIGHTS / f"{name}.npz").stat().st_size < 2.5e6
        with np.load(WEIGHTS / f"{name}.npz", allow_pickle=False) as arrays:
            assert all(arrays[key].dtype == np.float16 for key in arrays.files)
            assert all(np.isfinite(arrays[key]).all() for key in arrays.files)
        json.loads((WEIGHTS / f"{name}.json").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_ready_to_be_called_and_trained(name):
    model = pretrained(name)
    assert not model.training
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.denoiser.parameters())
    image = torch.rand(1, model.denoiser.in_channels, 20, 24)
    with torch.no_grad():
        torch.testing.assert_close(model.denoiser(7 * image), 7 * model.denoiser(image), rtol=1e-4, atol=1e-5)


def test_ct_is_better_than_filtered_back_projection_in_any_unit():
    ct, x = ParallelBeamCT(64, 30), shepp_logan(64)[None]
    y = add_gaussian_noise(ct(x), 40.0, torch.Generator().manual_seed(0))
    model = pretrained("ct", tau=4 * model_card("ct")["tau"])
    with torch.no_grad():
        solution, scaled = model(y, ct, return_solution=True), model(1000 * y, ct)
    assert solution.converged.all()
    assert solution.denoiser_calls < 60
    assert psnr(solution.value, x) > psnr(ct.fbp(y, filter="hann"), x) + 3
    assert (scaled / 1000 - solution.value).norm() < 5e-3 * solution.value.norm()


@pytest.mark.parametrize("shape", [(6, 64, 64), (3, 72, 60)])
def test_idt_is_better_than_tikhonov_for_any_number_of_slices_in_any_unit(shape):
    depths = [2.0 * (k - (shape[0] - 1) / 2) for k in range(shape[0])]
    leds = torch.cat([led_ring(20, 0.9), led_ring(10, 0.6), led_ring(5, 0.3)])
    optics = {"pixel_size": 0.14, "wavelength": 0.515, "numerical_aperture": 0.9, "medium_index": 1.33}
    idt = DiffractionTomography(shape[1:], depths, leds, **optics)
    x = cell_like(1, shape, torch.Generator().manual_seed(0), index_contrast=0.01)
    y = add_gaussian_noise(idt(x), 15.0, torch.Generator().manual_seed(1))
    model = pretrained("idt")
    with torch.no_grad():
        solution, scaled = model(y, idt, return_solution=True), model(1000 * y, idt)

    def quality(value):
        return psnr(value.real - background(value.real), x.real)

    best = max(quality(idt.tikhonov(y, share * idt.norm_squared())) for share in (1e-5, 1e-4, 1e-3))
    assert solution.converged.all()
    assert solution.denoiser_calls < 20
    assert quality(solution.value) > best + 2
    assert (scaled / 1000 - solution.value).norm() < 5e-3 * solution.value.norm()


def test_other_names_are_refused():
    for call in (pretrained, model_card):
        with pytest.raises(ValueError, match=r"name must be 'ct'.*, got '\.\./ct'"):
            call("../ct")
