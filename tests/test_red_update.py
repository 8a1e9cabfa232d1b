"""The RED update by itself: formula, large images, messages."""

from __future__ import annotations

import pytest
import torch
from cases import relative_error

import oder_fast


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
def test_equals_the_formula(dtype, build, generator):
    if dtype not in build.dtypes:
        pytest.skip(f"{build.name} has no kernel for {dtype}")
    x, g, d, last = (
        torch.randn(2, 9, 11, dtype=dtype, generator=generator).to(build.device) for _ in range(4)
    )
    got = oder_fast.ops.red_update(x, g, d, 0.3, 2.0, previous=last, momentum=0.25, backend=build.backend)
    image = x - 0.3 * (g + 2.0 * (x - d))
    assert relative_error(got.image, image) < 1e-6
    assert relative_error(got.extrapolated, image + 0.25 * (image - last)) < 1e-6
    change = (image - x).abs().square().flatten(1).sum(1)
    uphill = ((x - image).conj() * (image - last)).real.flatten(1).sum(1)
    expected = torch.stack([change, image.abs().square().flatten(1).sum(1), uphill], 1)
    assert relative_error(got.reductions, expected) < 1e-6


def test_projection_clips_and_keeps_nan(build):
    x = torch.tensor([[1.0, -1.0, float("nan"), 0.5]], device=build.device)
    zero = torch.zeros_like(x)
    got = oder_fast.ops.red_update(
        x, zero, x.nan_to_num(), 0.1, 0.0, nonnegative=True, backend=build.backend
    ).image
    assert torch.equal(got.isnan(), x.isnan())
    assert got.nan_to_num().tolist() == [[1.0, 0.0, 0.0, 0.5]]


def test_large_images_go_past_the_caches(build, generator):
    images = [torch.randn(3, 1024, 512, generator=generator).to(build.device) for _ in range(4)]
    got = oder_fast.ops.red_update(
        *images[:3], 0.1, 1.5, previous=images[3], momentum=0.5, backend=build.backend
    )
    wide = [v.double() for v in images]
    expected = oder_fast.ops.red_update(
        *wide[:3], 0.1, 1.5, previous=wide[3], momentum=0.5, backend="reference"
    )
    for one, other in zip(got, expected, strict=True):
        assert relative_error(one, other) < 1e-6


def test_nonnegative_gradient_is_zero_where_projected():
    x = torch.tensor([[1.0, -1.0]], requires_grad=True)
    oder_fast.ops.red_update(
        x, torch.zeros(1, 2), torch.zeros(1, 2), 0.1, 0.0, nonnegative=True
    ).image.sum().backward()
    assert x.grad.tolist() == [[1.0, 0.0]]


X = torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: oder_fast.ops.red_update(3.0, X, X, 0.1, 1.0), TypeError, "red_update: image must be a torch.Tensor"),
        (lambda: oder_fast.ops.red_update(X.int(), X, X, 0.1, 1.0), TypeError, "floating-point or complex"),
        (lambda: oder_fast.ops.red_update(X, X[:1], X, 0.1, 1.0), ValueError, r"fidelity_grad must have shape \(2, 4\)"),
        (lambda: oder_fast.ops.red_update(X, X.double(), X, 0.1, 1.0), TypeError, "fidelity_grad must have the dtype"),
        (lambda: oder_fast.ops.red_update(X, X, X[:, 1:], 0.1, 1.0), ValueError, "denoised must have shape"),
        (lambda: oder_fast.ops.red_update(X, X, X, 0.1, 1.0, previous=X.half(), momentum=0.5), TypeError, "previous must have the dtype"),
        (lambda: oder_fast.ops.red_update(X, X, X, None, 1.0), TypeError, "step_size must be a float or a 0-d tensor"),
        (lambda: oder_fast.ops.red_update(X, X, X, torch.ones(2), 1.0), ValueError, "step_size must be a float or a 0-d"),
        (lambda: oder_fast.ops.red_update(X, X, X, 0.1, "1"), TypeError, "tau must be a float or a 0-d tensor, got str"),
        (lambda: oder_fast.ops.red_update(X, X, X, float("nan"), 1.0), ValueError, "step_size must be finite, got nan"),
        (lambda: oder_fast.ops.red_update(X, X, X, 0.1, 1.0, momentum=0.5), ValueError, "previous and momentum go together"),
        (lambda: oder_fast.ops.red_update(X, X, X, 0.1, 1.0, previous=X, momentum=torch.ones(3)), ValueError, r"momentum must have shape \(2,\)"),
        (lambda: oder_fast.ops.red_update(X.to_sparse(), X, X, 0.1, 1.0), TypeError, "image must be a dense tensor, got torch.sparse_coo"),
        (lambda: oder_fast.ops.red_update(X + 0j, X + 0j, X + 0j, 0.1, 1.0, nonnegative=True), ValueError, "nonnegative needs a real image"),
    ],
)  # fmt: skip
def test_messages(call, error, message):
    with pytest.raises(error, match=message):
        call()
