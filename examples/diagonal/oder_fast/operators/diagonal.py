"""Images seen through a mask."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..ops.diagonal import diagonal
from .base import LeastSquares, MeasurementOperator


class Diagonal(MeasurementOperator):
    r"""Images seen through a mask: :math:`y = m \odot x`.

    Args:
        mask: :math:`m`, shape ``(H, W)``.
        backend: ``"auto"`` or the name of a backend.
    """

    mask: Tensor

    def __init__(self, mask: Tensor, *, backend: str = "auto") -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.image_shape = self.data_shape = tuple(mask.shape)
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        """Return y."""
        return diagonal(x, self.mask, backend=self.backend)

    def adjoint(self, y: Tensor) -> Tensor:
        """Return the images that `forward`'s transpose makes of data."""
        return diagonal(y, self.mask, backend=self.backend)

    def least_squares(self, y: Tensor) -> LeastSquares:
        """Return the data fidelity, which knows a preconditioner."""
        return DiagonalLeastSquares(self, y)


class DiagonalLeastSquares(LeastSquares):
    """The data fidelity of `Diagonal`: an inner solve takes one step."""

    operator: Diagonal

    def _preconditioner(self, weight: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda v: v / (self.operator.mask.square() + weight)
