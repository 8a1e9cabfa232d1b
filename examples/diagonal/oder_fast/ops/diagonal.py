"""Pixels weighted by a mask."""

from __future__ import annotations

import torch
from torch import Tensor

from .._numpy import takes_numpy
from ..reference import diagonal as reference
from . import _checks, backends
from ._library import LIBRARY, compute, register_linear

LIBRARY.define("diagonal(Tensor image, Tensor mask, str backend) -> Tensor")


def _fake(image: Tensor, mask: Tensor, backend: str) -> Tensor:
    return torch.empty_like(image, memory_format=torch.contiguous_format)


def _impl(image: Tensor, mask: Tensor, backend: str) -> Tensor:
    data = _fake(image, mask, backend)
    if image.numel() > 0:
        backends.launch("diagonal", image, backend, image, mask, data, image.shape[0], mask.numel())
    return data


# Its own transpose. Of two operators each names the other.
register_linear("diagonal", _impl, _fake, "diagonal", lambda image, *others: others)


@takes_numpy
def diagonal(image: Tensor, mask: Tensor, *, backend: str = "auto") -> Tensor:
    r"""Weight pixels by a mask: its own adjoint.

    .. math:: y_b = m \odot x_b

    Args:
        image: Shape ``(B, H, W)``, floating point.
        mask: :math:`m`, shape ``(H, W)``, dtype of `image`. Not differentiable.
        backend: ``"auto"`` or the name of a backend.

    Returns:
        Like `image`; differentiable any number of times in `image`.

    Raises:
        TypeError: For something that is no tensor, or of another dtype.
        ValueError: For a shape or device that does not fit.
        BackendUnavailableError: If a backend named by `backend` is not here.
    """
    _checks.tensor("diagonal", "image", image, ndim=3)
    _checks.floating("diagonal", "image", image)
    _checks.tensor("diagonal", "mask", mask)
    _checks.same("diagonal", "mask", mask, "image", image)
    _checks.shape("diagonal", "mask", mask, tuple(image.shape[1:]), "H, W of image")
    chosen = backends.resolve(backend, image.device, image.dtype)
    result: Tensor = compute("diagonal", (image, mask), chosen, reference)
    return result
