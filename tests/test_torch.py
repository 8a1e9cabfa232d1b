"""What the package works around in torch."""

from __future__ import annotations

import pytest
import torch
from cases import relative_error
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from oder_fast import CartesianMRI, DiffractionTomography, ParallelBeamCT
from oder_fast._torch import fft


class Transforms(TorchDispatchMode):
    """Checks how each transform is called: contiguous, over the last axes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name().startswith("aten::_fft"):
            self.calls += 1
            value, axes = args[:2]
            assert value.is_contiguous()
            assert {k % value.ndim for k in axes} == set(range(value.ndim - len(axes), value.ndim))
        return function(*args, **(kwargs or {}))


def interleaved(*shape, dtype) -> Tensor:
    """Random numbers, the second axis innermost in memory."""
    order = (shape[0], *shape[2:], shape[1])
    return torch.randn(order, dtype=dtype).movedim(-1, 1)


@pytest.mark.parametrize("axes", [(-2, -1), (-3, -2), (-4, -1), (-2,)])
@pytest.mark.parametrize("name", ["fftn", "ifftn", "rfftn", "irfftn"])
def test_transforms_equal_those_of_torch_over_any_axes_and_strides(name, axes):
    transform = getattr(torch.fft, name)
    x = interleaved(2, 3, 4, 6, dtype=torch.float64 if name == "rfftn" else torch.complex128)
    with Transforms():
        got = fft(transform, x, axes)
    assert relative_error(got, transform(x.contiguous(), None, axes, "ortho")) < 1e-14


def scans():
    """Linear maps that transform, by name, and a shape and dtype that they take."""
    maps, mask = torch.randn(2, 6, 5, dtype=torch.complex128), torch.rand(6, 5) < 0.5
    lines = torch.tensor([1, 0, 1, 1, 0], dtype=torch.bool)
    for name, sampled in (("points", mask), ("lines", lines)):
        mri = CartesianMRI(maps, sampled, backend="reference")
        yield f"MRI of {name}", mri, (3, 6, 5), torch.complex128
        yield f"MRI of {name}, adjoint", mri.adjoint, (3, *mri.data_shape), torch.complex128
    idt = DiffractionTomography(
        (6, 5),
        [0.0, 1.0, 2.0],
        0.3 * torch.rand(4, 2, dtype=torch.float64),
        pixel_size=0.2,
        wavelength=0.53,
        numerical_aperture=0.5,
        medium_index=1.33,
        backend="reference",
    )
    yield "IDT", idt, (2, 3, 6, 5), torch.complex128
    yield "IDT, adjoint", idt.adjoint, (2, 4, 6, 5), torch.float64
    x, y = torch.randn(2, 3, 6, 5, dtype=torch.complex128), torch.randn(2, 4, 6, 5, dtype=torch.float64)
    yield "IDT, data", lambda y: idt.least_squares(y).gradient(x), (2, 4, 6, 5), torch.float64
    yield "IDT, normal", idt.least_squares(y).normal, (2, 3, 6, 5), torch.complex128
    yield "IDT, Tikhonov", lambda y: idt.tikhonov(y, 1.0), (2, 4, 6, 5), torch.float64
    yield "CT", ParallelBeamCT((6, 5), 4).fbp, (2, 4, 9), torch.float64


@pytest.mark.parametrize(("function", "shape", "dtype"), [pytest.param(*s[1:], id=s[0]) for s in scans()])
def test_no_transform_and_no_derivative_of_one_runs_over_interleaved_memory(function, shape, dtype):
    x = interleaved(*shape, dtype=dtype).requires_grad_()
    with Transforms() as transforms:
        y = function(x)
        along = interleaved(*y.shape, dtype=y.dtype).requires_grad_()
        (g,) = torch.autograd.grad(y, x, along, create_graph=True)
        torch.autograd.grad(g, along, interleaved(*g.shape, dtype=g.dtype))
    assert transforms.calls >= 3
