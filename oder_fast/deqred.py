r"""Deep equilibrium reconstruction: fixed points of regularization by denoising, and training through them.

The equation is

.. math:: A^H (A x - y) + \tau (x - D(x)) = 0.

`DEQRED` holds the denoiser `D` and the settings; the operator `A` and the data `y` come with each call. `red.py` has
the two maps whose fixed points solve the equation, ``fixed_point/`` iterates and differentiates them, and
``operators/`` has the data fidelity that they are made of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from ._numpy import takes_numpy
from ._torch import Autocast, full_precision, kept, uncompiled
from .denoisers import frozen
from .denoisers.base import set_scalar
from .denoisers.call import ImageDenoiser
from .fixed_point import Anderson, Differentiation, Implicit, Picard, Solution, Solver
from .fixed_point.maps import per_image
from .fixed_point.solution import POLICIES, Policy
from .operators import MeasurementOperator, as_operator
from .operators.base import check_numbers
from .red import GradientMap, GradientStep, ProximalMap, ProximalStep, REDMap

# Rounding of less than single precision is above any useful tolerance.
DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)


@takes_numpy
class DEQRED(nn.Module):
    r"""Reconstruct images as fixed points of regularization by denoising (RED).

    .. math:: A^H (A x - y) + \tau \, (x - D(x)) = 0

    or, with `nonnegative`, the variational inequality of the same map on :math:`x \ge 0`.

    A solve sees one map throughout: batch normalization uses its running statistics, dropout is off, spectral norms
    are computed once. Training mode makes no other difference.

    Args:
        denoiser: Module or function from ``(B, C, H, W)`` to the same; images ``(B, H, W)`` have one channel,
            complex ones two (real and imaginary part) for each of theirs.
        tau: :math:`\tau` in units of :math:`\|A\|^2`, the weight of the prior: a float, which is not in the
            `state_dict`, a 0-d tensor, or a parameter to be trained.
        step: `ProximalStep`, which converges in tens of calls of the denoiser, or `GradientStep`, the form in which
            RED and ODER were published.
        solver: `Anderson`, `Nesterov` or `Picard`; by default `Anderson`, or `Picard` where gradient steps take
            minibatches.
        differentiation: `Implicit`, `JacobianFree` or `Unrolled`.
        nonnegative: Constrain to :math:`x \ge 0`; real images only.
        normalize: Scale each image such that the operator's start for it has the largest magnitude 1, and back: data in
            any unit are then denoised alike. By default for denoisers of this package, but for those that commute with
            a scale themselves (``DnCNN(bias=False)``, ``DRUNet(sigma=None)``).
        generator: Source of the minibatches; None for the default one of torch.
        on_failure: Where an image does not converge: ``"warn"``, ``"raise"`` or ``"ignore"``. An image that diverges is
            NaN in the result; where all do, that is always an error.

    Raises:
        TypeError: For an argument of the wrong type.
        ValueError: For a value that makes no sense.

    Example:
        >>> import torch
        >>> from oder_fast.operators import ParallelBeamCT
        >>> ct = ParallelBeamCT(image_size=16, angles=12)
        >>> model = DEQRED(torch.nn.Identity(), tau=0.1)
        >>> model(ct(torch.ones(1, 16, 16)), ct).shape
        torch.Size([1, 16, 16])

    References:
        Romano, Elad, Milanfar, "The little engine that could: regularization by denoising (RED)", SIAM J. Imaging
        Sciences 10 (2017). Liu, Xu, Gan, Shoushtari, Kamilov, "Online deep equilibrium learning for regularization by
        denoising", NeurIPS 2022.
    """

    tau: float | Tensor
    step_size: float | Tensor | None

    def __init__(
        self,
        denoiser: Callable[[Tensor], Tensor],
        *,
        tau: float | Tensor,
        step: ProximalStep | GradientStep | None = None,
        solver: Solver[Any] | None = None,
        differentiation: Differentiation | None = None,
        nonnegative: bool = False,
        normalize: bool | None = None,
        generator: torch.Generator | None = None,
        on_failure: Policy = "warn",
    ) -> None:
        super().__init__()
        step = ProximalStep() if step is None else step
        stochastic = isinstance(step, GradientStep) and step.minibatch_size is not None
        if solver is None:
            solver = Picard(1000) if stochastic else Anderson()
        differentiation = Implicit() if differentiation is None else differentiation
        for name, value, kinds in (
            ("step", step, (ProximalStep, GradientStep)),
            ("solver", solver, (Solver,)),
            ("differentiation", differentiation, (Differentiation,)),
            ("nonnegative", nonnegative, (bool,)),
            ("normalize", normalize, (bool, type(None))),
            ("generator", generator, (torch.Generator, type(None))),
        ):
            if not isinstance(value, kinds):
                wanted = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
                raise TypeError(f"DEQRED: {name} must be {wanted}, got {value!r}")
        if isinstance(denoiser, MeasurementOperator) or not callable(denoiser):
            raise TypeError(
                f"DEQRED: denoiser must be a module or function of images, got {type(denoiser).__name__}; the operator "
                "is given with the data, model(y, operator)"
            )
        if on_failure not in POLICIES:
            raise ValueError(f"DEQRED: on_failure must be one of {POLICIES}, got {on_failure!r}")
        if stochastic and not solver.takes_minibatches:
            raise ValueError(f"DEQRED: {type(solver).__name__} takes no minibatches; use Nesterov or Picard")
        adjoint = differentiation.solver if isinstance(differentiation, Implicit) else None
        if stochastic and adjoint is not None and not adjoint.takes_minibatches:
            raise ValueError(
                f"DEQRED: {type(adjoint).__name__} takes no minibatches, and the adjoint solve would; use Nesterov or "
                "Picard for differentiation.solver"
            )
        self.denoiser = denoiser
        set_scalar(self, "tau", tau, positive=isinstance(step, ProximalStep))
        self.step = step
        if isinstance(step, GradientStep) and step.step_size is not None:
            set_scalar(self, "step_size", step.step_size, positive=True)
        else:
            self.step_size = None
        if normalize is None:
            normalize = not getattr(denoiser, "scale_free", True)
        self.solver = solver
        self.differentiation = differentiation
        self.nonnegative = nonnegative
        self.normalize = normalize
        self.generator = generator
        self.on_failure: Policy = on_failure

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if self.generator is not None:
            state["generator"] = (self.generator.device, self.generator.get_state())
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state["generator"] is not None:
            device, numbers = state["generator"]
            state = {**state, "generator": torch.Generator(device).set_state(numbers)}
        super().__setstate__(state)  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        """Tell the settings."""
        return (
            f"tau={float(_tensor(self.tau).detach()):.4g}, step={self.step}, nonnegative={self.nonnegative}, "
            f"normalize={self.normalize},\nsolver={self.solver},\ndifferentiation={self.differentiation}"
        )

    @overload
    def forward(
        self,
        y: Tensor,
        operator: Any,
        x0: Tensor | Solution | None = None,
        *,
        return_solution: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def forward(
        self, y: Tensor, operator: Any, x0: Tensor | Solution | None = None, *, return_solution: Literal[True]
    ) -> Solution: ...

    def forward(
        self, y: Tensor, operator: Any, x0: Tensor | Solution | None = None, *, return_solution: bool = False
    ) -> Tensor | Solution:
        """Solve for the fixed points of measurements `y`.

        Args:
            y: Measurements, shape ``(B, *data_shape)``.
            operator: `ParallelBeamCT` or another `MeasurementOperator`, or anything with ``A`` and ``A_adjoint``, such
                as a physics of deepinv.
            x0: Start, shape ``(B, *image_shape)``; by default ``operator.initial(y)``, clipped at 0 where asked. Or the
                `Solution` of similar data: the solve starts at its value, and the adjoint solve at its last one.
            return_solution: Return the `Solution` instead of its value.

        Returns:
            Images, shape ``(B, *image_shape)``, differentiable once (any number of times with `Unrolled`) in
            the denoiser's weights, `tau`, the step size and `y`; or the `Solution`.

        Raises:
            TypeError: For a dtype that does not fit, or an operator that is none.
            ValueError: For a shape or device that does not fit, an empty batch, NaN or infinity in `y` or
                `x0`.
            DivergenceError: Where the residual of all images becomes NaN or infinite, or grows far beyond its start; of
                one where `on_failure` is ``"raise"``.
            NotConvergedError: Where an image did not converge and `on_failure` is ``"raise"``.
        """
        solution: Solution = self._solve(y, operator, x0)
        # Past the two frames of nn.Module, and that which takes NumPy's arrays.
        solution.require(self.on_failure, stacklevel=6)
        return solution if return_solution else solution.value

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile the denoiser, in place, by `torch.compile`; the loop around it looks at values and stays as it is.

        ``torch.compile(model)`` of the whole works, and compiles what surrounds the model, not the solve.
        """
        if isinstance(self.denoiser, nn.Module):
            self.denoiser.compile(*args, **options)
        else:
            self.denoiser = torch.compile(self.denoiser, *args, **options)

    @uncompiled
    def _solve(self, y: Tensor, operator: Any, x0: Tensor | Solution | None) -> Solution:
        with self._problem(y, operator, x0) as (red_map, start, scale):
            adjoint_start = x0.adjoint[-1].value if isinstance(x0, Solution) and x0.adjoint else None
            solution = self.differentiation.solve(red_map, start, self.solver, adjoint_start)
        return solution if scale is None else replace(solution, value=solution.value * scale)

    @contextmanager
    def _problem(
        self, y: Tensor, operator: Any, x0: Tensor | Solution | None
    ) -> Iterator[tuple[REDMap, Tensor, Tensor | None]]:
        """Give the map, the start and the scale of the images, the denoiser frozen."""
        operator = as_operator(operator)
        with operator.agreement() as same:
            self._check("y", y, operator.data_shape)
            y = kept(y)
            if isinstance(x0, Tensor):
                self._check("x0", x0, operator.image_shape)
            elif not isinstance(x0, Solution | None):
                raise TypeError(f"DEQRED: x0 must be a torch.Tensor or a Solution, got {type(x0).__name__}")
            same.update(self._settings(y, x0))
        with full_precision(y.device):
            # A call of all processes, as nothing inside an agreement may be.
            start, scale = self._start(y, operator, x0)
            with operator.agreement():
                fidelity = operator.least_squares(y if scale is None else y / per_image(scale, y))
        autocast = Autocast(y.device)
        with full_precision(y.device), frozen(self.denoiser) as denoiser:
            size = self.step.minibatch_size
            if size is not None and not 1 <= size <= operator.n_blocks:
                raise ValueError(
                    f"DEQRED: step.minibatch_size must be at most {operator.n_blocks}, the blocks of "
                    f"{type(operator).__name__}, got {size}"
                )
            if any(t.requires_grad for t in (*operator.parameters(), *operator.buffers())):
                raise ValueError(
                    f"DEQRED: {type(operator).__name__} holds tensors that require gradients, which no fixed point "
                    "gives it: detach them"
                )
            tau, norm = float(_tensor(self.tau).detach()), operator.norm_squared()
            if not (tau > 0 or (tau == 0 and isinstance(self.step, GradientStep))):
                raise ValueError(
                    f"DEQRED: tau must be above 0, got {tau:g}; where it is trained, train its logarithm"
                )
            weight = _tensor(self.tau, y.device) * norm
            denoise = ImageDenoiser(denoiser, autocast)
            common = (fidelity, denoise, weight, None, self.nonnegative, None, self.generator)
            red_map: REDMap
            if isinstance(self.step, ProximalStep):
                red_map = ProximalMap(*common, size, 1 / tau)
            else:
                step_size = self._step_size(operator, norm).to(y.device)
                red_map = GradientMap(*common, size, self.step.variance_reduction, step_size=step_size)
            yield red_map, start, None if scale is None else per_image(scale, start)

    def _step_size(self, operator: MeasurementOperator, norm: float) -> Tensor:
        """Return the step size itself, of gradient steps."""
        if self.step_size is not None:
            return _tensor(self.step_size) / norm
        size = self.step.minibatch_size
        smoothness = norm if size is None else operator.minibatch_norm_squared(size)
        return 1 / (smoothness + 2 * norm * _tensor(self.tau).detach())

    def _start(
        self, y: Tensor, operator: MeasurementOperator, x0: Tensor | Solution | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the start, checked, scaled and clipped, and the scale of each image."""
        given = x0.value.detach() if isinstance(x0, Solution) else x0
        initial = operator.initial(y) if given is None or self.normalize else given
        start: Any = initial if given is None else given
        if x0 is None:
            self._check("x0", start, operator.image_shape)
        if start.shape[0] != y.shape[0]:
            raise ValueError(f"DEQRED: x0 must hold as many images as y ({y.shape[0]}), got {start.shape[0]}")
        if start.device != y.device or start.real.dtype != y.real.dtype:
            raise ValueError(
                f"DEQRED: x0 must have the device and precision of y ({y.device}, {y.dtype}), "
                f"got {start.device}, {start.dtype}"
            )
        if self.nonnegative and start.is_complex():
            raise ValueError(f"DEQRED: nonnegative needs real images, got {start.dtype}")
        if isinstance(x0, Solution) and bool(x0.diverged.any()):
            # What diverged there starts anew.
            anew = operator.initial(y) if initial is given else initial
            start = torch.where(per_image(x0.diverged.to(y.device), start), anew, start)
        start, scale = kept(start), None
        if self.normalize:
            scale = initial.abs().flatten(1).amax(1)
            scale = torch.where(scale > 0, scale, 1)
            start = start / per_image(scale, start)
        return start.clamp(min=0) if self.nonnegative else start, scale

    def _settings(self, y: Tensor, x0: Tensor | Solution | None) -> dict[str, object]:
        """Tell what must be the same in all processes."""
        module = self.denoiser if isinstance(self.denoiser, nn.Module) else nn.Identity()
        return {
            "the number of images": y.shape[0],
            "the precision of y": y.real.dtype,
            "y.requires_grad": y.requires_grad,
            "whether gradients are recorded": torch.is_grad_enabled(),
            "x0": x0.value if isinstance(x0, Solution) else x0,
            "the denoiser's weights": [*module.parameters(), *module.buffers()],
            "step_size": self.step_size,
            "tau": self.tau,
            "step": self.step,
            "solver": self.solver,
            "differentiation": self.differentiation,
            "nonnegative": self.nonnegative,
            "normalize": self.normalize,
        }

    def _check(self, name: str, value: Tensor, shape: tuple[int, ...] | None) -> None:
        if not isinstance(value, Tensor):
            raise TypeError(f"DEQRED: {name} must be a torch.Tensor, got {type(value).__name__}")
        if value.dtype not in DTYPES:
            raise TypeError(
                f"DEQRED: {name} must be float32, float64, complex64 or complex128, got {value.dtype}; a denoiser runs "
                "in less by torch.autocast"
            )
        if shape is not None and (value.ndim != len(shape) + 1 or tuple(value.shape[1:]) != tuple(shape)):
            wanted = ", ".join(map(str, ("B", *shape)))
            raise ValueError(f"DEQRED: {name} must have shape ({wanted}), got {tuple(value.shape)}")
        if shape is None and value.ndim < 3:
            raise ValueError(
                f"DEQRED: {name} must have a batch axis and at least two more, got {tuple(value.shape)}"
            )
        if value.shape[0] == 0:
            raise ValueError(f"DEQRED: {name} must hold at least one image, got shape {tuple(value.shape)}")
        for weight in self.denoiser.parameters() if isinstance(self.denoiser, nn.Module) else ():
            if weight.device != value.device:
                raise ValueError(
                    f"DEQRED: {name} must be on the denoiser's device ({weight.device}), got {value.device}"
                )
            if weight.is_floating_point() and weight.dtype != value.real.dtype:
                raise TypeError(
                    f"DEQRED: {name} must have the denoiser's precision ({weight.dtype}), got {value.dtype}"
                )
            break
        check_numbers("DEQRED", name, value)


def _tensor(value: float | Tensor, device: torch.device | None = None) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64, device=device)
