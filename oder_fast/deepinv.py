r"""The measurement operators as physics of deepinv, for its algorithms, losses and trainer.

`OperatorPhysics` is a `deepinv.physics.LinearPhysics` of an operator of this package. The other direction needs no
adapter: `DEQRED` takes any linear physics of deepinv, ``model(y, physics)``, and so its trainer calls a reconstructor.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._extras import needs

needs("oder_fast.deepinv", "deepinv")

from deepinv.physics import LinearPhysics, ZeroNoise

from .denoisers.call import as_channels, from_channels
from .operators import CartesianMRI, DiffractionTomography, MeasurementOperator
from .operators.base import LeastSquares, Part
from .operators.solve import MAX_STEPS, norm

__all__ = ["OperatorPhysics"]


class OperatorPhysics(LinearPhysics):  # type: ignore[misc]
    r"""A measurement operator of this package as a `deepinv.physics.LinearPhysics`.

    .. math:: y = N(A x)

    Images and data are real, with a channel axis; real and imaginary part are channels, as deepinv has them:

    - `ParallelBeamCT`: images ``(B, 1, H, W)``, sinograms ``(B, 1, V, D)``, views before bins.
    - `CartesianMRI`: images ``(B, 2, H, W)``, k-space ``(B, 2, C, H', W')``, as deepinv's ``MultiCoilMRI`` has them.
    - `DiffractionTomography`: images ``(B, 2 Z, H, W)``, both parts of the first slice, both of the second, and so on;
      intensities ``(B, L, H, W)``.

    An operator of one's own has real images and data, with a channel axis put in where they are ``(B, H, W)``.

    `prox_l2` is solved by the operator's own preconditioned or closed solve, `compute_sqnorm` and `compute_norm` give
    its own norm, which for MRI is a bound from above, and `A_adjoint_A` takes one kernel. All are differentiable in
    images and data any number of times, `prox_l2` in `gamma` too; nothing is in coil maps, mask or angles. `A_dagger`
    is deepinv's, by its solvers.

    Parameters can be given with a call, and stay, as in deepinv: ``A(x, mask=..., coil_maps=...)`` of MRI; a mask has
    the shape ``(H, W)`` or less, ``(1 or 2, H, W)`` or ``(B, 1 or 2, H, W)`` with equal channels. CT and diffraction
    tomography have none. What else is given is left to the noise model.

    Args:
        operator: The operator. It is part of this module, which moves it.
        noise_model: `N`, of `deepinv.physics`; None for no noise. In MRI noise is only where the mask is.
        **options: Of `deepinv.physics.LinearPhysics`. Of its `max_iter` and `tol`, `prox_l2` takes the steps of
            conjugate gradients at most, rounded up to a multiple of 60, and the norm of the residual relative to the
            right-hand side :math:`A^H y + z / \gamma`.

    Attributes:
        operator: As given, or what the last parameters have made of it.
        img_size: Shape of an image without the batch.

    Raises:
        TypeError: For anything that is no `MeasurementOperator`.
        ValueError: For an operator that does not tell the shapes of images and data.

    Example:
        >>> import torch
        >>> from deepinv.physics import GaussianNoise
        >>> from oder_fast import ParallelBeamCT
        >>> physics = OperatorPhysics(ParallelBeamCT(image_size=16, angles=12), noise_model=GaussianNoise(0.01))
        >>> y = physics(torch.ones(1, 1, 16, 16))
        >>> y.shape, physics.prox_l2(torch.zeros(1, 1, 16, 16), y, gamma=1.0).shape
        (torch.Size([1, 1, 12, 23]), torch.Size([1, 1, 16, 16]))
    """

    measurement_operator: ChannelOperator

    def __init__(self, operator: MeasurementOperator, noise_model: Any = None, **options: Any) -> None:
        channels = ChannelOperator(operator)
        tensors = [*operator.parameters(), *operator.buffers()]
        device = tensors[0].device if tensors else torch.device("cpu")
        noise_model = ZeroNoise() if noise_model is None else noise_model
        super().__init__(img_size=channels.image_shape, noise_model=noise_model, device=device, **options)
        self._adjoint_data: tuple[list[tuple[Any, int]], Tensor] | None = None
        self._set(channels)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_adjoint_data": None}

    def _set(self, channels: ChannelOperator) -> None:
        self.measurement_operator = channels
        self.img_size = channels.image_shape

    @property
    def operator(self) -> MeasurementOperator:
        """The operator in its own shapes."""
        return self.measurement_operator.operator

    def extra_repr(self) -> str:
        """Tell the shapes."""
        channels = self.measurement_operator
        return f"image_shape={channels.image_shape}, data_shape={channels.data_shape}"

    def A(self, x: Tensor, **parameters: Any) -> Tensor:
        """Measure images, without noise."""
        self.update_parameters(**parameters)
        return self.measurement_operator.forward(x)

    def A_adjoint(self, y: Tensor, **parameters: Any) -> Tensor:
        """Bring data back to images: the exact transpose of `A`; kept, as each gradient asks for it again."""
        self.update_parameters(**parameters)
        sources = [y, *self.operator.buffers()]
        if y.requires_grad or any(source.is_inference() for source in sources):
            return self.measurement_operator.adjoint(y)
        kept = self._adjoint_data
        versions = [source._version for source in sources]
        if (
            kept is None
            or [version for _, version in kept[0]] != versions
            or any(ref() is not source for (ref, _), source in zip(kept[0], sources, strict=True))
        ):
            made_for = list(zip(map(weakref.ref, sources), versions, strict=True))
            kept = self._adjoint_data = made_for, self.measurement_operator.adjoint(y)
        return kept[1].clone()

    def A_adjoint_A(self, x: Tensor, **parameters: Any) -> Tensor:
        """Compute :math:`A^H A x`."""
        self.update_parameters(**parameters)
        return self.measurement_operator.homogeneous(x).normal(x)

    def A_dagger(self, y: Tensor, *args: Any, **options: Any) -> Tensor:
        """Compute the least-squares solution by deepinv's solvers; `mask` and `coil_maps` as of `A`."""
        self.update_parameters(**{name: options.pop(name, None) for name in PARAMETERS})
        solution: Tensor = super().A_dagger(y, *args, **options)
        return solution

    def noise(self, x: Tensor, **parameters: Any) -> Tensor:
        """Add noise to data; to those of MRI where the mask is."""
        noisy: Tensor = super().noise(x, **parameters)
        if isinstance(self.operator, CartesianMRI):
            noisy = noisy * self.operator.mask[:, None, None]
        return noisy

    def prox_l2(
        self,
        z: Tensor | float | None,
        y: Tensor,
        gamma: float | Tensor,
        solver: str | None = None,
        max_iter: int | None = None,
        tol: float | None = None,
        verbose: bool = False,
        **parameters: Any,
    ) -> Tensor:
        r"""Compute the proximal operator of the data fidelity, by the operator's own solve.

        .. math:: \arg\min_x \tfrac{\gamma}{2} \|A x - y\|^2 + \tfrac12 \|x - z\|^2
            = (A^H A + 1 / \gamma)^{-1} (A^H y + z / \gamma)

        Args:
            z: Images, where the solve starts; a number for all pixels, None for 0.
            y: Data.
            gamma: :math:`\gamma`, above 0, in the unit of :math:`1 / |A|^2`: a number, or ``(B,)`` or
                ``(B, 1, 1, 1)`` with one for each image.
            solver: Not used.
            max_iter: Steps at most, rounded up to a multiple of 60; None for ``self.max_iter``.
            tol: Norm of the residual relative to the right-hand side; None for ``self.tol``. Where
                :math:`\gamma |A|^2` is large, the error is larger by it at most.
            verbose: Not used.
            **parameters: As of `A`.

        Returns:
            Images, differentiable in `z`, `y` and `gamma`, by the same solve.

        Raises:
            ValueError: For a `gamma` that is not above 0, or as many as there are images.
        """
        self.update_parameters(**parameters)
        back = self.A_adjoint(y)
        weight = 1 / torch.as_tensor(gamma, dtype=back.dtype, device=back.device)
        if not bool((weight.isfinite() & (weight > 0)).all()) or weight.numel() not in (1, len(back)):
            raise ValueError(
                f"OperatorPhysics.prox_l2: gamma must be finite and above 0, one number or one for each of {len(back)} "
                f"images, got {gamma}"
            )
        weight = weight.reshape(() if weight.numel() == 1 else (-1, *[1] * (back.ndim - 1)))
        if not isinstance(z, Tensor):
            z = torch.full_like(back, float(z or 0))
        solves = math.ceil((self.max_iter if max_iter is None else max_iter) / MAX_STEPS)
        fidelity = self.measurement_operator.homogeneous(back)
        tolerance = self.tol if tol is None else tol
        solution: Tensor = _Solve.apply(fidelity, back + weight * z, weight, z.detach(), tolerance, solves)  # type: ignore[no-untyped-call]
        return solution

    def compute_sqnorm(self, x0: Tensor, **options: Any) -> Tensor:
        r"""Return :math:`\|A\|^2`, the operator's own: of MRI a bound from above.

        Args:
            x0: Of the device and dtype that the result has.
            **options: `max_iter`, `tol`, `verbose` and `rng`, which are not used, and parameters as of `A`.
        """
        self.update_parameters(**{name: options.get(name) for name in PARAMETERS})
        return torch.tensor(self.operator.norm_squared(), dtype=x0.real.dtype, device=x0.device)

    def update_parameters(
        self, mask: Tensor | None = None, coil_maps: Tensor | None = None, **others: Any
    ) -> None:
        """Change mask or coil maps of MRI, for good; other operators have none."""
        mri = self.operator
        if not isinstance(mri, CartesianMRI) or (mask is None and coil_maps is None):
            return
        maps, lines = mri.coil_maps, mri.mask if mask is None else _mask(mask)
        if coil_maps is not None:
            maps = coil_maps.to(maps.device, maps.dtype)
        readouts = {
            size for size, image in zip(mri.data_shape[1:], mri.image_shape, strict=True) if size != image
        }
        operator = CartesianMRI(
            maps,
            lines.to(maps.device),
            centered=mri.centered,
            readout_size=next(iter(readouts), None),
            backend=mri.backend,
        )
        self._set(ChannelOperator(operator))


# Of MRI, the names that deepinv has for them.
PARAMETERS = ("mask", "coil_maps")


def _mask(mask: Tensor) -> Tensor:
    """Return a mask of deepinv as `CartesianMRI` takes one."""
    if mask.ndim < 3:
        return mask
    channels = mask if mask.ndim == 4 else mask[None]
    if channels.ndim != 4 or channels.shape[1] not in (1, 2) or bool((channels != channels[:, :1]).any()):
        raise ValueError(
            "OperatorPhysics: mask must have shape (H, W), (1 or 2, H, W) or (B, 1 or 2, H, W), both channels alike, "
            f"got {tuple(mask.shape)}"
        )
    return channels[:, 0]


class _Solve(torch.autograd.Function):
    """Solve (A^H A + weight) x = rhs; differentiated by the same solve, any number of times."""

    @staticmethod
    def forward(
        fidelity: LeastSquares, rhs: Tensor, weight: Tensor, start: Tensor, tolerance: float, solves: int
    ) -> Tensor:
        x, size = start, norm(rhs)
        for _ in range(solves):
            # The solve's own tolerance is relative to its start.
            scale = weight * norm(x)
            relative = torch.where(scale > 0, size / torch.where(scale > 0, scale, 1), 1)
            x = fidelity.solve(rhs, weight, x, (tolerance * relative).flatten())
            if fidelity.left is None or not bool(fidelity.left.any()):
                break
        return x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.fidelity, _, weight, _, *ctx.settings = inputs
        ctx.save_for_backward(weight, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        weight, x = ctx.saved_tensors
        u = _Solve.apply(ctx.fidelity, grad, weight, torch.zeros_like(x), *ctx.settings)  # type: ignore[no-untyped-call]
        return None, u, -(u * x).sum_to_size(weight.shape), None, None, None


class ChannelOperator(MeasurementOperator):
    """An operator between real images and data with a channel axis.

    Args:
        operator: The operator, in its own shapes.
    """

    operator: MeasurementOperator
    image_shape: tuple[int, ...]
    data_shape: tuple[int, ...]

    def __init__(self, operator: MeasurementOperator) -> None:
        super().__init__()
        if not isinstance(operator, MeasurementOperator):
            raise TypeError(
                f"OperatorPhysics: operator must be a MeasurementOperator, got {type(operator).__name__}"
            )
        if operator.image_shape is None or operator.data_shape is None:
            raise ValueError(
                f"OperatorPhysics: {type(operator).__name__} must have image_shape and data_shape, got "
                f"{operator.image_shape} and {operator.data_shape}"
            )
        self.operator = operator
        self.own_shapes = operator.image_shape, operator.data_shape
        self.complex_image = isinstance(operator, (CartesianMRI, DiffractionTomography))
        self.complex_data = isinstance(operator, CartesianMRI)
        *slices, height, width = operator.image_shape
        self.image_shape = ((1 + self.complex_image) * math.prod(slices), height, width)
        shape = tuple(operator.data_shape)
        self.data_shape = (2, *shape) if self.complex_data else (1, *shape) if len(shape) == 2 else shape
        self._homogeneous: tuple[Any, LeastSquares] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_homogeneous": None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ChannelOperator:
        self._homogeneous = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    @property
    def n_blocks(self) -> int:  # type: ignore[override]
        """Number of blocks."""
        return self.operator.n_blocks

    def own_image(self, x: Tensor) -> Tensor:
        """Return images with a channel axis as the operator has them."""
        self._check("image", x, self.image_shape)
        dtype = x.dtype.to_complex() if self.complex_image else x.dtype
        return from_channels(x, torch.empty(len(x), *self.own_shapes[0], dtype=dtype, device="meta"))

    def own_data(self, y: Tensor) -> Tensor:
        """Return data with a channel axis as the operator has them."""
        self._check("data", y, self.data_shape)
        if self.complex_data:
            return torch.view_as_complex(y.movedim(1, -1).contiguous())
        return y.squeeze(1) if y.ndim > 1 + len(self.own_shapes[1]) else y

    def data(self, y: Tensor) -> Tensor:
        """Return the operator's data with a channel axis."""
        if self.complex_data:
            return torch.view_as_real(y.resolve_conj()).movedim(-1, 1)
        return y.unsqueeze(1) if len(self.own_shapes[1]) == 2 else y

    def _check(self, name: str, value: Tensor, shape: tuple[int, ...]) -> None:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(
                f"OperatorPhysics: {name} must be a real torch.Tensor, real and imaginary part as channels, got {got}"
            )
        if tuple(value.shape[1:]) != shape:
            wanted = ", ".join(map(str, ("B", *shape)))
            raise ValueError(f"OperatorPhysics: {name} must have shape ({wanted}), got {tuple(value.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        """Measure images."""
        return self.data(self.operator(self.own_image(x)))

    def adjoint(self, y: Tensor) -> Tensor:
        """Bring data back to images."""
        return as_channels(self.operator.adjoint(self.own_data(y)))

    def least_squares(self, y: Tensor) -> LeastSquares:
        """Return the data fidelity; k-space where the mask is 0 does not count, as in deepinv."""
        return ChannelLeastSquares(self, y, self.operator.least_squares(self._sampled(y)))

    def least_squares_part(self, y: Tensor) -> LeastSquares:
        """Return the data fidelity of data that may be zero."""
        return ChannelLeastSquares(self, y, self.operator.least_squares_part(self._sampled(y)))

    def _sampled(self, y: Tensor) -> Tensor:
        own = self.own_data(y)
        return own * self.operator.mask[:, None] if isinstance(self.operator, CartesianMRI) else own

    def homogeneous(self, like: Tensor) -> LeastSquares:
        """Return the data fidelity of data that are zero, for as many images as `like`; kept."""
        key = (len(like), like.dtype, like.device)
        if self._homogeneous is None or self._homogeneous[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                zero = torch.zeros(len(like), *self.data_shape, dtype=like.dtype, device=like.device)
                self._homogeneous = key, self.least_squares_part(zero)
        return self._homogeneous[1].counted_anew()

    def initial(self, y: Tensor) -> Tensor:
        """Reconstruct a start for iterations."""
        return as_channels(self.operator.initial(self.own_data(y)))

    def norm_squared(self) -> float:
        """Return the operator's."""
        return self.operator.norm_squared()

    def minibatch_norm_squared(self, size: int) -> float:
        """Return the operator's."""
        return self.operator.minibatch_norm_squared(size)

    def draw_blocks(self, size: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw a minibatch of blocks."""
        return self.operator.draw_blocks(size, generator)

    def split(self, y: Tensor, share: float, generator: torch.Generator | None = None) -> tuple[Part, Part]:
        """Split measurements as the operator does."""
        kept, rest = (
            Part(whole := ChannelOperator(part.operator), whole.data(part.y))
            for part in self.operator.split(self._sampled(y), share, generator)
        )
        return kept, rest


class ChannelLeastSquares(LeastSquares):
    """The data fidelity of `ChannelOperator`: another one between channels.

    Args:
        operator: The operator.
        y: Its data.
        own: The operator's data fidelity in its own shapes.
    """

    operator: ChannelOperator

    def __init__(self, operator: ChannelOperator, y: Tensor, own: LeastSquares) -> None:
        super().__init__(operator, y)
        self.own = own

    def solve(
        self, rhs: Tensor, weight: Tensor, start: Tensor, tolerance: Tensor, free: Tensor | None = None
    ) -> Tensor:
        """Solve as the operator does; on free pixels alone, which may differ from part to part, as any operator."""
        if free is not None:
            return super().solve(rhs, weight, start, tolerance, free)
        own = self.own.counted_anew()
        one = self.operator.own_image
        right = one(rhs)
        # One for each image, where there are several, stands before its axes.
        weight = weight.reshape(-1, *[1] * (right.ndim - 1)) if weight.ndim else weight
        solution = as_channels(own.solve(right, weight, one(start), tolerance))
        self.calls, self.left = self.calls + own.calls, own.left
        return solution

    def _gradient(self, x: Tensor, blocks: Tensor | None) -> Tensor:
        return as_channels(self.own._gradient(self.operator.own_image(x), blocks))

    def _normal(self, v: Tensor, blocks: Tensor | None) -> Tensor:
        return as_channels(self.own._normal(self.operator.own_image(v), blocks))

    def _preconditioner(self, weight: Tensor) -> Callable[[Tensor], Tensor]:
        own = self.own._preconditioner(weight)
        return lambda v: as_channels(own(self.operator.own_image(v)))
