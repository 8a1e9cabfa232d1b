"""Group normalization followed by PReLU: one pass over memory for the statistics, one for all the rest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._numpy import takes_numpy
from ..reference import group_norm_prelu as reference
from . import _checks, faces
from ._library import LIBRARY, register

# On CPUs torch's own kernels are the right thing.
FACES = ("triton",)
# Numbers that a program takes at once, and programs that share the sums over one image at most.
TILE = 4096
PROGRAMS = 512
# Channels of a tile where they lie side by side.
COLUMNS = 64

LIBRARY.define(
    "group_norm_prelu(Tensor image, Tensor weight, Tensor bias, Tensor slope, int groups, float eps, str backend) "
    "-> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "group_norm_prelu_backward(Tensor grad, Tensor image, Tensor weight, Tensor bias, Tensor slope, Tensor mean, "
    "Tensor rstd, int groups, float eps, bool in_image, bool in_parameters, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
OPERATOR, OPERATOR_BACKWARD = (
    getattr(torch.ops.oder_fast, name) for name in ("group_norm_prelu", "group_norm_prelu_backward")
)


def dense(image: Tensor) -> tuple[Tensor, torch.memory_format]:
    """Return the image without gaps, as it is where it is contiguous or channels last, and which of them it is."""
    if not image.is_contiguous() and image.is_contiguous(memory_format=torch.channels_last):
        return image, torch.channels_last
    return image.contiguous(), torch.contiguous_format


def _power_above(n: int) -> int:
    return 1 << (n - 1).bit_length()


def split(channels: int, positions: int, channels_last: bool) -> tuple[tuple[int, int], int, int]:
    """Return the tile (positions, channels), in how many parts sums over positions are taken, and their length.

    The size of one image decides alone, so that no image's bits depend on how many others there are.
    """
    if channels_last:
        columns = min(COLUMNS, _power_above(channels))
        rows = min(TILE // columns, _power_above(positions))
    else:
        rows = min(TILE, _power_above(positions))
        columns = min(TILE // rows, _power_above(channels))
    tiles, blocks = -(-positions // rows), -(-channels // columns)
    each = -(-tiles // max(1, PROGRAMS // blocks))
    return (rows, columns), -(-tiles // each), each * rows


def _sizes(image: Tensor, groups: int, memory_format: torch.memory_format) -> tuple[Any, ...]:
    """Return what both launchers take last."""
    batch, channels, height, width = image.shape
    channels_last = memory_format == torch.channels_last
    tile, parts, share = split(channels, height * width, channels_last)
    return batch, channels, height * width, channels // groups, channels_last, tile, parts, share


def _fake(
    image: Tensor, weight: Tensor, bias: Tensor, slope: Tensor, groups: int, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (image.new_empty(image.shape[0], groups, dtype=torch.float64) for _ in range(2))
    return torch.empty_like(dense(image)[0]), mean, rstd


def _impl(
    image: Tensor, weight: Tensor, bias: Tensor, slope: Tensor, groups: int, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    image, memory_format = dense(image)
    output, mean, rstd = _fake(image, weight, bias, slope, groups)
    if image.numel() == 0:
        return output, mean.zero_(), rstd.zero_()
    sizes = _sizes(image, groups, memory_format)
    batch, channels, *_, parts, _ = sizes
    faces.face(backend).launch(
        "group_norm_prelu",
        image,
        image,
        *(v.contiguous() for v in (weight, bias, slope)),
        output,
        mean,
        rstd,
        image.new_empty(batch, parts, channels, dtype=torch.float64),
        image.new_empty(batch, parts, channels, dtype=torch.float32),
        eps,
        *sizes,
    )
    return output, mean, rstd


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    image, weight, bias, slope, *ctx.others = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(image, weight, bias, slope, *output[1:])


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    groups, eps, backend = ctx.others
    wanted = ctx.needs_input_grad[:4]
    grads = OPERATOR_BACKWARD(grad, *ctx.saved_tensors, groups, eps, wanted[0], any(wanted[1:]), backend)
    return *(g if w else None for g, w in zip(grads, wanted, strict=True)), None, None, None


register("group_norm_prelu", _impl, _fake, _backward, _setup, any_strides=True)


# ------------------------------------------------------------------ the backward pass


def _fake_backward(
    grad: Tensor,
    image: Tensor,
    weight: Tensor,
    bias: Tensor,
    slope: Tensor,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    eps: float,
    in_image: bool,
    in_parameters: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_image = torch.empty_like(dense(image)[0]) if in_image else image.new_empty(0)
    of_weight, of_bias, of_slope = (
        torch.empty_like(v, memory_format=torch.contiguous_format) if in_parameters else v.new_empty(0)
        for v in (weight, bias, slope)
    )
    return of_image, of_weight, of_bias, of_slope


def _impl_backward(
    grad: Tensor,
    image: Tensor,
    weight: Tensor,
    bias: Tensor,
    slope: Tensor,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    eps: float,
    in_image: bool,
    in_parameters: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    image, memory_format = dense(image)
    results = _fake_backward(
        grad, image, weight, bias, slope, mean, rstd, groups, eps, in_image, in_parameters, backend
    )
    if image.numel() == 0:
        for v in results:
            v.zero_()
        return results
    sizes = _sizes(image, groups, memory_format)
    batch, channels, *_, parts, _ = sizes
    sums = image.new_empty(batch, 3, channels, dtype=torch.float64)
    faces.face(backend).launch(
        "group_norm_prelu_backward",
        image,
        grad.contiguous(memory_format=memory_format),
        image,
        *(v.contiguous() for v in (weight, bias, slope, mean, rstd)),
        results[0] if in_image else None,
        image.new_empty(batch, parts, 3, channels, dtype=torch.float32),
        sums,
        image.new_empty(batch, groups, 2, dtype=torch.float64),
        *sizes,
    )
    if in_parameters:
        of_bias, of_weight, of_slope = sums.sum(0)
        results[1].copy_(of_weight)
        results[2].copy_(of_bias)
        results[3].copy_(of_slope if slope.numel() > 1 else of_slope.sum(0, keepdim=True))
    return results


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    grad, image, weight, bias, slope, _, _, ctx.groups, ctx.eps, in_image, in_parameters, _ = inputs
    ctx.save_for_backward(grad, image, weight, bias, slope)
    ctx.wanted = (in_image, *[in_parameters] * 3)


def _double_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    with torch.enable_grad():
        # Tensors of their own: one of them may have been computed from another.
        grad, image, weight, bias, slope = inputs = [
            v.view_as(v) if v.requires_grad else v.detach().requires_grad_() for v in ctx.saved_tensors
        ]
        # Channels last, torch's kernels lose digits where the mean is large, and cannot be compiled on a CPU.
        features = image.contiguous()
        output = reference.group_norm_prelu(features, ctx.groups, weight, bias, slope, ctx.eps)
        first = torch.autograd.grad(output, inputs[1:], grad.contiguous(), create_graph=True)
    given = [(f, g) for f, g, w in zip(first, grads, ctx.wanted, strict=True) if w and g is not None]
    if not given:
        return (None,) * 12
    second = torch.autograd.grad(
        [f for f, _ in given],
        inputs,
        [g for _, g in given],
        create_graph=torch.is_grad_enabled(),
        allow_unused=True,
    )
    return *second, *[None] * 7


register(
    "group_norm_prelu_backward",
    _impl_backward,
    _fake_backward,
    _double_backward,
    _setup_backward,
    any_strides=True,
)


# ------------------------------------------------------------------ what users call


def _check_parameter(name: str, value: Tensor, image: Tensor, sizes: tuple[int, ...]) -> None:
    op = "group_norm_prelu"
    _checks.tensor(op, name, value, ndim=1)
    _checks.floating(op, name, value)
    if value.device != image.device:
        raise ValueError(f"{op}: {name} must be on the device of image ({image.device}), got {value.device}")
    if value.shape[0] not in sizes:
        rule = " or ".join(map(str, sorted(set(sizes))))
        raise ValueError(f"{op}: {name} must have {rule} elements, got {value.shape[0]}")


@takes_numpy
def group_norm_prelu(
    image: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    slope: Tensor,
    eps: float = 1e-5,
    *,
    backend: str = "auto",
) -> Tensor:
    r"""Normalize groups of channels and apply PReLU, as `torch.nn.GroupNorm` and `torch.nn.PReLU` one after the other.

    .. math:: z = w_c \frac{x - \mu_g}{(\sigma_g^2 + \epsilon)^{1/2}} + b_c, \qquad
        y = \max(z, 0) + a_c \min(z, 0)

    with mean and variance over the channels and pixels of group `g` of one image. All of it is computed in float32,
    and float64 where few numbers are left, and stored in the dtype of the image; autocast changes nothing. Where
    torch runs the two under autocast on CUDA tensors, the normalized features pass between them in float32.

    There are two faces: ``"triton"`` for CUDA tensors in float32, bfloat16 and float16, and ``"reference"``, which
    ``"auto"`` takes for all others. The former reads channels-last images as they are; its bits are equal from run
    to run and do not depend on the other images. Only the image and its statistics are kept for the backward pass.

    Args:
        image: Features, shape ``(B, C, H, W)``, real. Contiguous or channels last; others are made contiguous.
        groups: Number of groups, a divisor of ``C``.
        weight: ``w``, shape ``(C,)``, of any real dtype; None for 1.
        bias: ``b``, shape ``(C,)``, of any real dtype; None for 0.
        slope: ``a``, shape ``(1,)`` or ``(C,)``, of any real dtype.
        eps: Added to the variance.
        backend: ``"auto"``, ``"reference"`` or ``"triton"``.

    Returns:
        ``y``, with the shape, dtype and memory format of the image; differentiable any number of times in image,
        weight, bias and slope.

    Raises:
        TypeError: For something that is no tensor, or not real.
        ValueError: For a shape or device that does not fit, or groups that hold one number each.
        BackendUnavailableError: If the named face is missing or cannot take such tensors.

    Example:
        >>> import torch
        >>> image = torch.tensor([-3.0, -1.0, 1.0, 3.0]).reshape(1, 1, 2, 2)
        >>> group_norm_prelu(image, 1, None, None, torch.tensor([0.5]))
        tensor([[[[-0.6708, -0.2236],
                  [ 0.4472,  1.3416]]]])

    References:
        Wu, He, "Group normalization", ECCV 2018. He, Zhang, Ren, Sun, "Delving deep into rectifiers", ICCV 2015.
        Chan, Golub, LeVeque, "Algorithms for computing the sample variance", The American Statistician 37 (1983),
        by which the statistics of parts of an image are merged.
    """
    op = "group_norm_prelu"
    _checks.tensor(op, "image", image, ndim=4)
    _checks.floating(op, "image", image)
    channels = image.shape[1]
    if groups < 1 or channels % groups:
        raise ValueError(f"{op}: groups must divide the {channels} channels of image, got {groups}")
    if image.numel() == groups:
        raise ValueError(f"{op}: groups must hold more than one number, got image {tuple(image.shape)}")
    _checks.positive(op, "eps", eps)
    if weight is not None:
        _check_parameter("weight", weight, image, (channels,))
    if bias is not None:
        _check_parameter("bias", bias, image, (channels,))
    _check_parameter("slope", slope, image, (1, channels))
    chosen = faces.resolve(backend, image.device, image.dtype, FACES)
    # Torch lacks the second derivatives of a group_norm with one of the two.
    if chosen != "reference" or (weight is None) != (bias is None):
        weight = slope.new_ones(channels) if weight is None else weight
        bias = slope.new_zeros(channels) if bias is None else bias
    if chosen == "reference":
        return reference.group_norm_prelu(image, groups, weight, bias, slope, eps)
    result: Tensor = OPERATOR(image, weight, bias, slope, groups, eps, chosen)[0]
    return result
