"""NumPy's numbers and arrays count as numbers and arrays."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import CASES
from torch import Tensor

import oder_fast
from oder_fast import CartesianMRI, DiffractionTomography, ParallelBeamCT, data
from oder_fast._numpy import from_numpy
from oder_fast.denoisers import DnCNN, TotalVariation, UNet
from oder_fast.ops import Detector


def unaligned(array):
    memory = np.zeros(array.nbytes + 1, np.uint8)
    result = memory[1:].view(array.dtype).reshape(array.shape)
    result[...] = array
    return result


def read_only(array):
    result = array.copy()
    result.flags.writeable = False
    return result


# An array of the same values, otherwise in memory.
FORMS = {
    "as it is": np.array,
    "reversed": lambda a: np.flip(np.flip(a).copy()),
    "strided": lambda a: np.repeat(a, 2, -1)[..., ::2] if a.ndim else a,
    "expanded": lambda a: np.broadcast_to(a, (2, *a.shape))[1],
    "Fortran": np.asfortranarray,
    "other byte order": lambda a: a.astype(a.dtype.newbyteorder()),
    "unaligned": unaligned,
    "read-only": read_only,
    "subclass": lambda a: a.view(np.recarray),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("dtype", ["?", "u1", "i4", "i8", "f2", "f4", "f8", "c8", "c16"])
def test_arrays_become_tensors_however_they_lie_in_memory(form, dtype):
    array = (np.arange(12) - 3).reshape(3, 4).astype(dtype)
    assert torch.equal(from_numpy(form(array)), torch.from_numpy(array))
    # Axes of one number may have any strides.
    assert torch.equal(from_numpy(form(array[:1])), torch.from_numpy(array[:1]))


def test_numbers_become_those_of_python():
    numbers = (np.float32(0.5), np.float64(0.5), np.longdouble(0.5), np.array(0.5), np.array(0.5, ">f4"))
    assert [type(from_numpy(v)) for v in numbers] == [float] * 5
    assert [from_numpy(v) for v in numbers] == [0.5] * 5
    assert type(from_numpy(np.int16(3))) is int
    assert from_numpy(np.bool_(True)) is True
    assert from_numpy((np.int64(3), [np.float32(1), "a"])) == (3, [1.0, "a"])
    assert from_numpy(np.ones(2, np.longdouble)).dtype == torch.float64


def test_what_is_no_number_and_masked_arrays_stay_what_they_are():
    for value in (np.array(["a"]), np.array([None]), np.ma.masked_array([1.0], [True]), "a", None, {}):
        assert from_numpy(value) is value
    with pytest.raises(TypeError, match=r"image must be a torch\.Tensor, got MaskedArray"):
        oder_fast.ops.radon_forward(np.ma.masked_all((1, 4, 4)), torch.zeros(1), Detector(4))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_operators_take_arrays_and_numbers(case, generator):
    args, options = case.make_inputs(case.shapes[2], case.dtype, "cpu", generator)

    def turn(value):
        if isinstance(value, Tensor):
            return FORMS["reversed"](value.numpy())
        if isinstance(value, bool) or not isinstance(value, int | float):
            return value
        return (
            np.float32(value)
            if float(np.float32(value)) == value and isinstance(value, float)
            else np.array(value)[()]
        )

    got = case.function(*map(turn, args), **{k: turn(v) for k, v in options.items()})
    expected = case.function(*args, **options)
    for one, other in zip(
        [got] if isinstance(got, Tensor) else got,
        [expected] if isinstance(got, Tensor) else expected,
        strict=True,
    ):
        assert torch.equal(one, other)


def test_measurement_operators_take_arrays_and_numbers():
    x = np.random.default_rng(0).standard_normal((1, 6, 5)).astype(np.float32)[:, ::-1]
    i, f = np.int64, np.float32
    ct = ParallelBeamCT(
        (i(6), i(5)), np.linspace(0, 3, 8)[::-1], i(9), bin_spacing=f(1), bin_offset=f(0), pixel_size=f(1)
    )
    same = ParallelBeamCT((6, 5), torch.linspace(0, 3, 8, dtype=torch.float64).flip(0), 9)
    t = torch.from_numpy(x.copy())
    assert torch.equal(ct(x), same(t))
    fidelity, expected = ct.least_squares(ct(x).numpy()), same.least_squares(same(t))
    assert torch.equal(fidelity.gradient(x, np.arange(8)[::2]), expected.gradient(t, torch.arange(0, 8, 2)))
    assert torch.equal(fidelity.normal(x, np.arange(8)[::2]), expected.normal(t, torch.arange(0, 8, 2)))
    assert torch.equal(ct.fbp(ct(x).numpy().astype(">f4")), same.fbp(same(t)))
    assert ParallelBeamCT(i(6), i(3)).data_shape == ParallelBeamCT(6, 3).data_shape
    assert len(ct.draw_blocks(i(3))) == 3

    maps, mask = np.ones((2, 6, 5), ">c8"), np.arange(30).reshape(6, 5)[:, ::-1] % 2
    mri = CartesianMRI(maps, mask)
    k = mri(x.astype(np.complex64))
    assert torch.equal(
        k, CartesianMRI(torch.ones(2, 6, 5, dtype=torch.complex64), torch.from_numpy(mask.copy()))(t + 0j)
    )
    assert torch.equal(mri.adjoint(k.numpy()), mri.adjoint(k))
    image = x.astype(np.complex64)
    assert torch.equal(mri.least_squares(k.numpy()).gradient(image), mri.least_squares(k).gradient(t + 0j))

    options = {
        "pixel_size": f(0.25),
        "wavelength": f(0.5),
        "numerical_aperture": f(0.5),
        "medium_index": f(1.5),
    }
    idt = DiffractionTomography((i(6), i(5)), np.arange(2.0), np.zeros((3, 2))[::-1], **options)
    y = idt(x[:, None].repeat(2, 1).astype(np.complex64))
    assert torch.equal(idt.adjoint(y.numpy()), idt.adjoint(y))
    assert torch.equal(idt.tikhonov(y.numpy(), f(1)), idt.tikhonov(y, 1.0))


def test_denoisers_take_arrays_and_numbers():
    x = np.random.default_rng(0).random((1, 1, 16, 16), np.float32)[..., ::-1]
    t = torch.from_numpy(x.copy())
    networks = (
        DnCNN(np.int64(3), np.int64(4)),
        UNet(),
        TotalVariation(np.float32(0.5)),
    )
    for denoiser in networks:
        with torch.no_grad():
            assert torch.equal(denoiser.eval()(x), denoiser(t))


def test_data_functions_take_arrays_and_numbers():
    x = np.random.default_rng(0).random((9, 12))[::-1]
    t = torch.from_numpy(x.copy())
    assert data.psnr(x, x + 0.1) == pytest.approx(data.psnr(t, t + 0.1))
    assert data.snr(x, x + 0.1) == pytest.approx(data.snr(t, t + 0.1))
    assert data.ssim(x.astype(">f8"), x + 0.1, np.float64(1)) == pytest.approx(data.ssim(t, t + 0.1, 1.0))
    draw = lambda v, level: data.add_gaussian_noise(v, level, torch.Generator().manual_seed(0))  # noqa: E731
    assert torch.equal(draw(x, np.float32(20)), draw(t, 20.0))
    assert torch.equal(data.shepp_logan(np.int64(16)), data.shepp_logan(16))
    maps = data.birdcage_maps(np.int64(4), (np.int64(8), np.int64(8)), radius=np.float32(1.5))
    assert torch.equal(maps, data.birdcage_maps(4, (8, 8)))
    noise = (x[:4] + 1j * x[4:8])[:, ::-1]
    covariance = data.noise_covariance(noise)
    assert torch.equal(covariance, data.noise_covariance(torch.from_numpy(noise.copy())))
    assert torch.equal(
        data.whiten(noise[:, None], covariance.numpy()),
        data.whiten(torch.from_numpy(noise.copy())[:, None], covariance),
    )
