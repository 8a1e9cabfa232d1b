"""What a measurement operator is, and the data fidelity that it makes of data."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._numpy import takes_numpy
from . import _blocks
from . import solve as inner

# Relative change of a norm that tells that an operator was changed.
CHANGED = 0.01
# Relative mismatch of a dot test beyond which an adjoint is called wrong, for each precision.
MISMATCH = {torch.float32: 1e-3, torch.float64: 1e-6}


class Part(NamedTuple):
    """A part of the measurements.

    Attributes:
        operator: Of this part.
        y: Its data, shape ``(B, *operator.data_shape)``.
    """

    operator: MeasurementOperator
    y: Tensor


class MeasurementOperator(nn.Module):
    r"""A linear map from images to measurements, and everything a fixed point needs of it.

    .. math:: y = A x

    A subclass defines `forward` and `adjoint`, and sets `image_shape` and `data_shape`; all else follows. It gains by
    a `LeastSquares` of its own: a faster `normal`, a preconditioner, a closed form.

    Attributes:
        image_shape: Shape of an image without the batch; None where any will do.
        data_shape: Shape of an image's data without the batch; None where any will do.
        n_blocks: Number of blocks that minibatches are drawn from; 1 where there are no minibatches.

    Example:
        >>> import torch
        >>> class Mask(MeasurementOperator):
        ...     def __init__(self, mask):
        ...         super().__init__()
        ...         self.mask = mask
        ...         self.image_shape = self.data_shape = tuple(mask.shape)
        ...     def forward(self, x):
        ...         return self.mask * x
        ...     def adjoint(self, y):
        ...         return self.mask * y
        >>> mask = Mask(torch.eye(8))
        >>> data_fidelity = mask.least_squares(torch.ones(1, 8, 8))
        >>> data_fidelity.gradient(torch.zeros(1, 8, 8)).sum()
        tensor(-8.)
    """

    image_shape: tuple[int, ...] | None = None
    data_shape: tuple[int, ...] | None = None
    n_blocks: int = 1

    def __init__(self) -> None:
        super().__init__()
        self._norms: dict[tuple[Any, ...], tuple[float, Tensor]] = {}
        self._like: Tensor | None = None
        self._batch = 1

    def forward(self, x: Tensor) -> Tensor:
        """Measure images ``(B, *image_shape)``: data ``(B, *data_shape)``."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(x)")

    def adjoint(self, y: Tensor) -> Tensor:
        """Bring data back to images: the exact conjugate transpose of `forward`."""
        raise NotImplementedError(f"{type(self).__name__} must define adjoint(y)")

    def least_squares(self, y: Tensor) -> LeastSquares:
        r"""Return the data fidelity :math:`g(x) = \tfrac12 \|A x - y\|^2`."""
        return LeastSquares(self, y)

    def least_squares_part(self, y: Tensor) -> LeastSquares:
        """Return the data fidelity of a part of the measurements, which alone may see nothing."""
        return self.least_squares(y)

    def initial(self, y: Tensor) -> Tensor:
        """Reconstruct a start for iterations: the adjoint over the norm squared."""
        image = self.adjoint(y)
        self._like, self._batch = image.detach()[:1], len(image)
        norm = self.norm_squared()
        if norm == 0:
            raise ValueError(f"{self._name}: the operator is zero, or sees nothing of the image")
        return image / norm

    def norm_squared(self) -> float:
        r"""Return :math:`\|A\|^2`, the Lipschitz constant of the full gradient.

        By power iteration on images like the last start or, where there was none, of `image_shape`. What was found for
        a shape is compared with one more call of the operator, which may have been changed since.

        Raises:
            ValueError: Where there was no start and `image_shape` is None.
        """
        like = self._like
        if like is None:
            if self.image_shape is None:
                raise ValueError(
                    f"{self._name}: the norm needs the shape of an image: set image_shape, or call initial(y) first"
                )
            tensors = (*self.parameters(), *self.buffers())
            numbers = next((t for t in tensors if t.is_floating_point() or t.is_complex()), torch.empty(0))
            like = torch.zeros(1, *self.image_shape, dtype=numbers.real.dtype, device=numbers.device)
        key = (tuple(like.shape), like.dtype, like.device)
        if key in self._norms:
            norm, x = self._norms[key]
            now = torch.inf
            if len(x) in (1, self._batch):
                with torch.no_grad():
                    now = float(inner.dot(x, self.adjoint(self(x))).sum())
            if not abs(now - norm) <= CHANGED * norm:
                del self._norms[key]
        if key not in self._norms:
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(like.shape, dtype=like.dtype, generator=generator).to(like.device)
            with torch.no_grad():
                # Complex where the operator makes it so; one for each image of a batch that has operators of its own.
                x = self.adjoint(self(x))
            self._norms[key] = power_iteration(lambda v: self.adjoint(self(v)), x)
        return self._norms[key][0]

    @property
    def _name(self) -> str:
        return type(self).__name__

    def minibatch_norm_squared(self, size: int) -> float:
        r"""Return what takes the place of :math:`\|A\|^2` where each step sees a minibatch of `size` blocks."""
        return self.norm_squared()

    def draw_blocks(self, size: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw a minibatch of blocks, int64 indices, each block as likely as any other."""
        raise NotImplementedError(f"{type(self).__name__} has no minibatches")

    def split(self, y: Tensor, share: float, generator: torch.Generator | None = None) -> tuple[Part, Part]:
        """Split measurements at random into those to reconstruct from and those left out, to score with.

        Left out are whole views (CT), lines or points of k-space (MRI), illuminations (diffraction tomography); of any
        other operator single values. The draw is the same for all images of the batch.

        Args:
            y: Data, shape ``(B, *data_shape)``.
            share: Share of the measurements that is left out, above 0 and below 1; at least one and never all.
            generator: Source of randomness.

        Returns:
            The part that is kept and the part that is left out; data are differentiable in `y`.

        Raises:
            ValueError: For a share out of range, or measurements of which none can be left out.

        Example:
            >>> import torch
            >>> from oder_fast import ParallelBeamCT
            >>> ct = ParallelBeamCT(image_size=16, angles=10)
            >>> kept, left_out = ct.split(torch.zeros(1, 10, ct.n_bins), 0.2)
            >>> kept.y.shape, left_out.operator.data_shape
            (torch.Size([1, 8, 23]), (2, 23))
        """
        size = y[0].numel() if len(y) else 0
        drawn = _blocks.left_out(self._name, "values", size, share, generator)
        mask = torch.ones(size, dtype=y.real.dtype)
        mask[drawn] = 0
        kept, rest = (m.reshape(y.shape[1:]).to(y.device) for m in (mask, 1 - mask))
        return Part(MaskedOperator(self, kept), kept * y), Part(MaskedOperator(self, rest), rest * y)

    def agreement(self) -> AbstractContextManager[dict[str, object]]:
        """Return a context for what may fail in one process alone where the measurements are spread over several."""
        return nullcontext({})

    def agree(self, numbers: Tensor) -> Tensor:
        """Return the numbers that decide how an iteration goes on, in all processes the same."""
        return numbers


@takes_numpy
class LeastSquares:
    r"""The data fidelity of an operator, bound to data.

    .. math:: g(x) = \tfrac12 \|A x - y\|^2

    Args:
        operator: :math:`A`.
        y: Data, shape ``(B, *data_shape)``.

    Attributes:
        y: The data; gradients in them flow through `adjoint_data` and `gradient`.
        calls: Calls of the normal operator so far; a minibatch counts as its share of the blocks.
        left: Where the steps of the last `solve` ran out: a bound on the relative error that it left, shape ``(B,)``;
            else None.
    """

    def __init__(self, operator: MeasurementOperator, y: Tensor) -> None:
        self.operator = operator
        self.y = y
        self.calls = 0.0
        self.left: Tensor | None = None
        self._adjoint_data: Tensor | None = None

    def adjoint_data(self) -> Tensor:
        r"""Return :math:`A^H y`, kept; differentiable in `y`."""
        if self._adjoint_data is None or (self.y.requires_grad and torch.is_grad_enabled()):
            self._adjoint_data = self.operator.adjoint(self.y)
        return self._adjoint_data

    def gradient(self, x: Tensor, blocks: Tensor | None = None) -> Tensor:
        r"""Compute :math:`\frac{n}{|B|} A_B^H (A_B x - y_B)`, with all blocks where `blocks` is None."""
        self._count(blocks)
        return self._gradient(x, blocks)

    def normal(self, v: Tensor, blocks: Tensor | None = None) -> Tensor:
        r"""Compute :math:`\frac{n}{|B|} A_B^H A_B v`, with all blocks where `blocks` is None."""
        self._count(blocks)
        return self._normal(v, blocks)

    def solve(
        self, rhs: Tensor, weight: Tensor, start: Tensor, tolerance: Tensor, free: Tensor | None = None
    ) -> Tensor:
        r"""Solve :math:`(A^H A + w) x = r`.

        Args:
            rhs: :math:`r`, shape ``(B, *image_shape)``.
            weight: :math:`w` above 0, a 0-d tensor, or ``(B, 1, ...)`` with one for each image.
            start: Where the iteration starts, shape of `rhs`.
            tolerance: An image is done where the norm of its residual is at most this times ``weight * |start|``, or,
                for a start of 0, times ``|rhs|``; shape ``(B,)``. The relative error is then at most as large. After 60
                steps the solve ends in any case: what is left is left to the next one.
            free: 1 where pixels are free; the others are 0 and their equations left out. None for all pixels.
        """
        target = self._target(rhs, weight, start, tolerance)
        solved = self._method(
            self._regularized(weight), rhs, start, target, self._preconditioner(weight), free
        )
        return self._solution(*solved, weight)

    def solve_nonnegative(self, rhs: Tensor, weight: Tensor, start: Tensor, tolerance: Tensor) -> Tensor:
        r"""Minimize :math:`\tfrac12 \langle x, (A^T A + w) x \rangle - \langle r, x \rangle` over :math:`x \ge 0`.

        Arguments as of `solve`.
        """
        target = self._target(rhs, weight, start, tolerance)
        # A power iteration ends a little below the norm.
        largest = 1.01 * self.operator.norm_squared() + weight
        solved = inner.nonnegative(
            self._regularized(weight), rhs, start, target, self._preconditioner(weight), weight, largest
        )
        return self._solution(*solved, weight)

    def counted_anew(self) -> LeastSquares:
        """Return the same data fidelity with a count of calls of its own."""
        anew = copy.copy(self)
        anew.calls, anew.left = 0.0, None
        return anew

    @property
    def _method(self) -> Callable[..., inner.Solved]:
        return inner.conjugate_gradients

    def _solution(self, x: Tensor, left: Tensor | None, weight: Tensor) -> Tensor:
        """Return `x`, and keep how far from the solution the residual that is left may be."""
        if left is not None:
            # Of images that are done it is 0, whatever they are.
            left = torch.where(left > 0, left / (weight * inner.norm(x)), 0).flatten()
        self.left = left
        return x

    def _regularized(self, weight: Tensor) -> Callable[[Tensor], Tensor]:
        """Return A^H A + weight."""
        return lambda v: torch.addcmul(self.normal(v), weight, v)

    def _target(self, rhs: Tensor, weight: Tensor, start: Tensor, tolerance: Tensor) -> Tensor:
        size = weight * inner.norm(start)
        size = torch.where(size > 0, size, inner.norm(rhs))
        return tolerance.to(size.dtype).reshape(size.shape) * size

    def _count(self, blocks: Tensor | None) -> None:
        self.calls += 1.0 if blocks is None else len(blocks) / self.operator.n_blocks

    def _gradient(self, x: Tensor, blocks: Tensor | None) -> Tensor:
        return self._normal(x, blocks) - self.adjoint_data()

    def _normal(self, v: Tensor, blocks: Tensor | None) -> Tensor:
        return self.operator.adjoint(self.operator(v))

    def _preconditioner(self, weight: Tensor) -> Callable[[Tensor], Tensor]:
        """Return an approximate inverse of A^H A + weight."""
        return lambda v: v


class MaskedOperator(MeasurementOperator):
    """Another operator with some values of its data left out.

    Args:
        whole: The other operator, which stays as it is.
        mask: 1 where values are kept, else 0; shape ``data_shape``.
    """

    whole: MeasurementOperator
    mask: Tensor

    def __init__(self, whole: MeasurementOperator, mask: Tensor) -> None:
        super().__init__()
        object.__setattr__(self, "whole", whole)
        self.register_buffer("mask", mask, persistent=False)
        self.image_shape, self.data_shape = whole.image_shape, tuple(mask.shape)

    def forward(self, x: Tensor) -> Tensor:
        """Measure, and leave out."""
        return self.mask * self.whole.forward(x)

    def adjoint(self, y: Tensor) -> Tensor:
        """Bring what is kept back to images."""
        return self.whole.adjoint(self.mask * y)


@dataclass
class Known:
    """What has been found out of a foreign operator: its norms by shape, and whether its adjoint is exact."""

    norms: dict[tuple[Any, ...], tuple[float, Tensor]]
    exact: bool | None = None


_KNOWN: weakref.WeakKeyDictionary[Any, Known] = weakref.WeakKeyDictionary()


class ForeignOperator(MeasurementOperator):
    """Anything with ``A(x)`` and ``A_adjoint(y)``, such as a physics of deepinv, as an operator."""

    physics: Any

    def __init__(self, physics: Any) -> None:
        super().__init__()
        # No submodule: what is wrapped is not this operator's to move or to train.
        object.__setattr__(self, "physics", physics)
        try:
            self._known = _KNOWN.setdefault(physics, Known({}))
        except TypeError:
            # What has no hash or takes no weak reference is examined at each call.
            self._known = Known({})
        self._norms = self._known.norms

    def forward(self, x: Tensor) -> Tensor:
        """Return ``A(x)``."""
        measured: Tensor = self.physics.A(x)
        return measured

    def adjoint(self, y: Tensor) -> Tensor:
        """Return ``A_adjoint(y)``."""
        image: Tensor = self.physics.A_adjoint(y)
        return image

    def least_squares(self, y: Tensor) -> LeastSquares:
        """Return the data fidelity, the adjoint tested where this is the first one."""
        with torch.enable_grad():
            like = self.adjoint(y.detach())
        if isinstance(like, Tensor) and like.requires_grad:
            raise ValueError(
                f"{self._name}: the operator holds tensors that require gradients, which no fixed point gives it: "
                "detach them"
            )
        if not isinstance(like, Tensor) or like.shape[0] != y.shape[0]:
            got = tuple(like.shape) if isinstance(like, Tensor) else type(like).__name__
            raise ValueError(
                f"{self._name}: A_adjoint(y) must hold {y.shape[0]} images, as y does, got {got}"
            )
        self._like, self._batch = like[:1], len(like)
        if self._known.exact is None:
            self._known.exact = self._test_adjoint(like, y)
        return LeastSquares(self, y) if self._known.exact else InexactLeastSquares(self, y)

    @property
    def _name(self) -> str:
        return type(self.physics).__name__

    def _test_adjoint(self, like: Tensor, y: Tensor) -> bool:
        generator = torch.Generator().manual_seed(0)
        x, v = (torch.randn(t.shape, dtype=t.dtype, generator=generator).to(t.device) for t in (like, y))
        with torch.no_grad():
            measured, back = self.forward(x), self.adjoint(v)
            if measured.shape != y.shape:
                raise ValueError(
                    f"{self._name}: the operator does not match y: A(A_adjoint(y)) has shape "
                    f"{tuple(measured.shape)}, y {tuple(y.shape)}"
                )
            # Data may have more axes than images.
            difference = (inner.dot(measured, v).flatten() - inner.dot(x, back).flatten()).abs().amax()
            size = (inner.norm(measured) * inner.norm(v)).amax()
            # The range of A and that of its adjoint: random data are nearly orthogonal to the first.
            size = torch.minimum(size, (inner.norm(x) * inner.norm(back)).amax())
            mismatch = float(difference / size) if float(size) > 0 else 0.0
        if mismatch <= MISMATCH[x.real.dtype]:
            return True
        warnings.warn(
            f"{self._name}: A_adjoint is not the adjoint of A: <A x, y> and <x, A_adjoint y> differ by {mismatch:.2g} "
            "of |A x| |y|; the fixed point is that of the pair as it is, and gradients are not exact",
            stacklevel=2,
        )
        return False


class InexactLeastSquares(LeastSquares):
    """The data fidelity of an operator whose adjoint is not the transpose of its forward."""

    @property
    def _method(self) -> Callable[..., inner.Solved]:
        return inner.minimal_residuals


def as_operator(operator: Any) -> MeasurementOperator:
    """Return an operator as it is, or anything with ``A`` and ``A_adjoint`` as one.

    Args:
        operator: A `MeasurementOperator`, or an object with ``A(x)`` and ``A_adjoint(y)``, such as a physics of
            deepinv.

    Returns:
        The operator. The norm of an object and the test of its adjoint are kept for as long as the object lives.

    Raises:
        TypeError: For anything else.

    Example:
        >>> import torch
        >>> class Blur:
        ...     def A(self, x):
        ...         return (x + x.roll(1, -1)) / 2
        ...     def A_adjoint(self, y):
        ...         return (y + y.roll(-1, -1)) / 2
        >>> blur = Blur()
        >>> operator = as_operator(blur)
        >>> data_fidelity = operator.least_squares(torch.ones(1, 1, 8, 8))
        >>> round(operator.norm_squared(), 3)
        1.0
    """
    # A physics that was made of an operator (`oder_fast.deepinv`) has it, in its own shapes.
    operator = getattr(operator, "measurement_operator", operator)
    if isinstance(operator, MeasurementOperator):
        return operator
    if not (hasattr(operator, "A") and hasattr(operator, "A_adjoint")):
        raise TypeError(
            "operator must be a MeasurementOperator, or have A(x) and A_adjoint(y) as a physics of deepinv has, got "
            f"{type(operator).__name__}"
        )
    return ForeignOperator(operator)


def seen(operator: MeasurementOperator, like: Tensor) -> Tensor:
    """Return 1 where data depend on the image at all, as they do not where a mask leaves them out; else 0.

    Args:
        operator: Of the data.
        like: Images, shape ``(B, *image_shape)``; their values do not matter.
    """
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(like.shape[1:], dtype=like.dtype, generator=generator).to(like.device)
    with torch.no_grad():
        measured: Tensor = operator(image.expand(like.shape))
    return (measured != 0).to(dtype=measured.real.dtype)


def power_iteration(
    normal: Callable[[Tensor], Tensor], x: Tensor, tolerance: float = 1e-4, max_iterations: int = 200
) -> tuple[float, Tensor]:
    """Return the largest eigenvalue of a positive semidefinite map, and its eigenvector.

    Args:
        normal: The map.
        x: Where to start, shape ``(1, ...)``, or ``(B, ...)`` where images have maps of their own: the eigenvalue is
            then the largest of all.
        tolerance: Relative change of the estimate at which to stop.
        max_iterations: At the most.
    """
    last = value = 0.0
    unit = z = x
    with torch.no_grad():
        for _ in range(max_iterations):
            if not bool(z.any()):
                return 0.0, unit
            unit = z / torch.linalg.vector_norm(z)
            z = normal(unit)
            value = float(inner.dot(unit, z).sum())
            if abs(value - last) <= tolerance * value:
                break
            last = value
    return value, unit


def check_numbers(owner: str, name: str, value: Tensor) -> None:
    """Refuse NaN, infinity, and images whose squares, as norms have them, do not fit the dtype.

    Args:
        owner: Who is told to refuse.
        name: Of the argument.
        value: Shape ``(B, ...)``.

    Raises:
        ValueError: With the index of what is not finite, or the image that is too large or too small.
    """
    finite = value.detach().isfinite()
    if not bool(finite.all()):
        index = tuple(int(i) for i in (~finite).nonzero()[0])
        raise ValueError(f"{owner}: {name} must be finite, got {value[index].item()} at index {index}")
    largest = value.detach().abs().flatten(1).amax(1)
    span = torch.finfo(value.dtype).max ** 0.3
    bad = ((largest > span) | ((largest < 1 / span) & (largest > 0))).nonzero()
    if len(bad):
        image = int(bad[0])
        raise ValueError(
            f"{owner}: {name} of image {image} has the largest magnitude {float(largest[image]):.3g}; {value.dtype} is "
            f"for {1 / span:.0e} to {span:.0e}: give it in another unit"
        )
