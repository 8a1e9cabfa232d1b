"""Deep equilibrium reconstruction: fixed points of regularization by denoising, and training through them."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import torch
from torch import Tensor, nn

from . import ops
from .denoisers import Rematerialized, frozen
from .fixed_point import (
    Differentiation,
    FixedPointMap,
    Implicit,
    Linearization,
    Nesterov,
    Solution,
    Solver,
    Step,
)
from .fixed_point.differentiation import AdjointMemory
from .fixed_point.graphs import EAGER, graph_execution, tell
from .fixed_point.maps import Hidden, vjp
from .fixed_point.solution import POLICIES, Policy
from .ops._kept import kept

if TYPE_CHECKING:
    from collections.abc import Iterator

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


def _uncompiled(method: F) -> F:
    """Keep torch.compile away from a method and all that it calls."""
    # `torch.compiler.disable` at once would import the compiler, about a second, whether it is used or not.
    disabled: list[Callable[..., Any]] = []

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return method(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(method))
        return disabled[0](*args, **kwargs)

    return call  # type: ignore[return-value]


class DEQRED(nn.Module):
    r"""Reconstruct images as fixed points of regularization by denoising: RED, or with minibatches ODER.

    .. math:: x^* = T(x^*), \qquad T(x) = P \bigl( x - \gamma (\nabla g(x) + \tau (x - D(x))) \bigr)

    where :math:`g(x) = \tfrac12 \|A x - y\|^2` and `P` is the projection on :math:`x \ge 0` or the identity.
    With a minibatch size, each iteration takes the gradient of a fresh minibatch of measurements instead.

    While a solve runs the denoiser is the same map throughout: batch normalization uses its running
    statistics, dropout is off, spectral norms are computed once. Training mode makes no other difference.

    Args:
        operator: `ParallelBeamCT` or another operator of this package; or any object with
            ``gradient(x, y, blocks=None)``, or with ``A(x)`` and ``A_adjoint(y)``, such as a physics of deepinv.
        denoiser: Module or function from ``(B, C, H, W)`` to the same; images ``(B, H, W)`` have one channel,
            complex ones two (real and imaginary part) for each of theirs.
        step_size: :math:`\gamma`; a float, a 0-d tensor or a parameter to be trained. By default
            :math:`1 / (\|A\|^2 + 2 \tau)`, of the present tau (`current_step_size`), the norm computed here
            once: the map is then averaged if `D` is nonexpansive. For minibatches the operator's
            ``minibatch_norm_squared(size)`` takes the place of the norm, where it has one.
        tau: :math:`\tau`, the weight of the prior, in the unit of :math:`A^H A`; float, 0-d tensor or
            parameter. A float is a setting and not in the `state_dict`; a tensor or parameter is.
        minibatch_size: Blocks per iteration (views, coils, illuminations); None for all of them.
        variance_reduction: Let each minibatch correct the last full gradient (taken every
            ``solver.check_every`` iterations, see `Fidelity`), so that its noise vanishes at the fixed point
            and the solve converges like one with all blocks. False: the minibatch's gradient itself, as ODER
            was published, whose noise is a floor under the error; the solver's `tail` then lowers it.
        solver: `Nesterov`, `Picard` or `Anderson` (no minibatches).
        differentiation: `Implicit`, `JacobianFree` or `Unrolled`.
        nonnegative: Project on :math:`x \ge 0`; real images only.
        generator: Source of the minibatches; None for the default one of torch.
        on_failure: Where an image does not converge: ``"warn"``, ``"raise"`` or ``"ignore"``. Divergence and
            NaN always raise.
        cuda_graph: On a GPU, capture the iterations of each solve, forward and adjoint, as CUDA graphs and replay
            them: the same bits, with one launch an iteration. It pays where launching an iteration's kernels
            takes as long as running them, as with small images and light denoisers. Each solve captures anew, and
            memory for one iteration is set aside for good. Solves fall back to one launch for each kernel, and
            say why by a `NotCapturedWarning`, once, and in ``Solution.fallback_reason``: for images on a CPU,
            minibatches drawn by a generator of the CPU or by an operator of somebody else, measurements spread
            over processes, a denoiser (or what else is called) that waits for the device, and where `Unrolled`
            records gradients.

    Raises:
        TypeError: For an argument of the wrong type.
        ValueError: For a value that makes no sense, a minibatch larger than the operator's blocks, or a step
            size left to an operator that does not know its norm.

    Example:
        >>> import torch
        >>> from oder_fast.operators import ParallelBeamCT
        >>> ct = ParallelBeamCT(image_size=16, angles=12)
        >>> model = DEQRED(ct, torch.nn.Identity(), tau=1.0, solver=Nesterov(tolerance=1e-3))
        >>> model(ct(torch.ones(1, 16, 16))).shape
        torch.Size([1, 16, 16])

    References:
        Liu, Xu, Gan, Shoushtari, Kamilov, "Online deep equilibrium learning for regularization by denoising",
        NeurIPS 2022. Romano, Elad, Milanfar, "The little engine that could: regularization by denoising
        (RED)", SIAM J. Imaging Sciences 10 (2017).
    """

    step_size: float | Tensor | None
    tau: float | Tensor

    def __init__(
        self,
        operator: Any,
        denoiser: Callable[[Tensor], Tensor],
        *,
        tau: float | Tensor,
        step_size: float | Tensor | None = None,
        minibatch_size: int | None = None,
        variance_reduction: bool = True,
        solver: Solver[Any] | None = None,
        differentiation: Differentiation | None = None,
        nonnegative: bool = False,
        generator: torch.Generator | None = None,
        on_failure: Policy = "warn",
        cuda_graph: bool = False,
    ) -> None:
        super().__init__()
        solver = Nesterov() if solver is None else solver
        differentiation = Implicit() if differentiation is None else differentiation
        for name, value, kind in (
            ("solver", solver, Solver),
            ("differentiation", differentiation, Differentiation),
        ):
            if not isinstance(value, kind):
                raise TypeError(f"DEQRED: {name} must be a {kind.__name__}, got {value!r}")
        if not callable(denoiser):
            raise TypeError(f"DEQRED: denoiser must be callable, got {type(denoiser).__name__}")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"DEQRED: generator must be a torch.Generator, got {type(generator).__name__}")
        if not isinstance(cuda_graph, bool):
            raise TypeError(f"DEQRED: cuda_graph must be True or False, got {type(cuda_graph).__name__}")
        if on_failure not in POLICIES:
            raise ValueError(f"DEQRED: on_failure must be one of {POLICIES}, got {on_failure!r}")
        self.operator = operator
        self.denoiser = denoiser
        if not (hasattr(operator, "gradient") or (hasattr(operator, "A") and hasattr(operator, "A_adjoint"))):
            raise TypeError(
                f"DEQRED: operator must have gradient(x, y, blocks), or A(x) and A_adjoint(y); "
                f"{type(operator).__name__} has neither"
            )
        _check_minibatch("minibatch_size", minibatch_size, operator, solver)
        if isinstance(differentiation, Implicit):
            _check_adjoint(differentiation, solver, minibatch_size, operator)
        _check_scalar("tau", tau, zero=True)
        if step_size is None:
            if not hasattr(operator, "norm_squared"):
                raise ValueError(f"DEQRED: {type(operator).__name__} has no norm_squared(): give step_size")
            self._norm_squared = _norm_squared(operator, minibatch_size, differentiation)
            self.step_size = None
        else:
            _check_scalar("step_size", step_size, zero=False)
            self._set_scalar("step_size", step_size)
        self._set_scalar("tau", tau)
        self.minibatch_size = minibatch_size
        self.variance_reduction = variance_reduction
        self.solver = solver
        self.differentiation = differentiation
        self.nonnegative = nonnegative
        self.generator = generator
        self.on_failure: Policy = on_failure
        self.cuda_graph = cuda_graph
        self._memory = AdjointMemory()
        self._told: set[str] = set()

    def _set_scalar(self, name: str, value: float | Tensor) -> None:
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            self.register_buffer(name, kept(value))
        else:
            setattr(self, name, value)

    def current_step_size(self) -> float | Tensor:
        r"""Return the step size given, or :math:`1 / (\|A\|^2 + 2 \tau)` for the present tau.

        With a nonexpansive denoiser, `x - D(x)` changes at most twice as fast as `x`.
        """
        if self.step_size is not None:
            return self.step_size
        if isinstance(self.tau, Tensor):
            return 1 / (self._norm_squared + 2 * self.tau.detach())
        return 1 / (self._norm_squared + 2 * self.tau)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_memory"] = AdjointMemory()
        state["_told"] = set()
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
            f"step_size={_number(self.current_step_size()):.4g}, tau={_number(self.tau):.4g}, "
            f"minibatch_size={self.minibatch_size}, nonnegative={self.nonnegative},\n"
            f"solver={self.solver},\ndifferentiation={self.differentiation}"
        )

    @overload
    def forward(
        self, y: Tensor, x0: Tensor | None = None, *, return_solution: Literal[False] = False
    ) -> Tensor: ...

    @overload
    def forward(self, y: Tensor, x0: Tensor | None = None, *, return_solution: Literal[True]) -> Solution: ...

    def forward(
        self, y: Tensor, x0: Tensor | None = None, *, return_solution: bool = False
    ) -> Tensor | Solution:
        """Solve for the fixed points of measurements `y`.

        Args:
            y: Measurements, shape ``(B, *data_shape)``.
            x0: Start, shape ``(B, *image_shape)``; by default ``operator.initial(y)``, projected where asked.
            return_solution: Return the `Solution` instead of its value.

        Returns:
            Images, shape ``(B, *image_shape)``, differentiable once (any number of times with `Unrolled`) in
            the denoiser's weights, `step_size`, `tau` and `y`; or the `Solution`.

        Raises:
            TypeError: For a dtype that does not fit.
            ValueError: For a shape or device that does not fit, an empty batch, NaN or infinity in `y` or
                `x0`.
            DivergenceError: Where the residual becomes NaN or infinite, or grows far beyond its start.
            NotConvergedError: Where an image did not converge and `on_failure` is ``"raise"``.
        """
        if _exporting():
            return self._iterate(y, x0)
        solution: Solution = self._solve(y, x0)
        # Past nn.Module's own two frames.
        tell(solution.fallback_reason, self._told, stacklevel=5)
        solution.require(self.on_failure, stacklevel=5)
        return solution if return_solution else solution.value

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile the denoiser, in place, by `torch.compile`; the loop around it looks at values and stays as it is.

        ``torch.compile(model)`` of the whole works, and compiles what surrounds the model, not the solve.
        """
        if isinstance(self.denoiser, nn.Module):
            self.denoiser.compile(*args, **options)
        else:
            self.denoiser = torch.compile(self.denoiser, *args, **options)

    @_uncompiled
    def _solve(self, y: Tensor, x0: Tensor | None) -> Solution:
        with self._problem(y, x0) as (red, start):
            execution = graph_execution(start, self._told) if self.cuda_graph else EAGER
            return self.differentiation.solve(red, start, self.solver, self._memory, execution)

    def _iterate(self, y: Tensor, x0: Tensor | None) -> Tensor:
        with self._problem(y, x0) as (red, start), torch.no_grad(), red.solving():
            return self.solver.iterate(red, start)

    @contextmanager
    def _problem(self, y: Tensor, x0: Tensor | None) -> Iterator[tuple[RED, Tensor]]:
        """Give the map and the start, the denoiser frozen."""
        with self._agreement() as same:
            self._check("y", y, getattr(self.operator, "data_shape", None))
            _check_scale(y)
            y = kept(y)
            with _full_precision(y.device):
                data = self._prepare(y)
            start = None if x0 is None else kept(self._check_start(x0, y))
            same.update(self._settings(y, x0))
        autocast = _Autocast(y.device)
        with _full_precision(y.device), frozen(self.denoiser) as denoiser:
            if start is None:
                start = self._check_start(self._initial(y), y)
            fidelity = Fidelity(
                self.operator, data, self.minibatch_size, self.variance_reduction, self.generator
            )
            step_size, tau = (self._scalar(v, y.device) for v in (self.current_step_size(), self.tau))
            yield RED(fidelity, denoiser, step_size, tau, self.nonnegative, autocast), start

    def _agreement(self) -> AbstractContextManager[dict[str, object]]:
        """Return a context of what may fail, for all processes together where the measurements are spread over some."""
        if hasattr(self.operator, "agreement"):
            together: AbstractContextManager[dict[str, object]] = self.operator.agreement()
            return together
        return nullcontext({})

    def _settings(self, y: Tensor, x0: Tensor | None) -> dict[str, object]:
        """Tell what must be the same in all processes."""
        module = self.denoiser if isinstance(self.denoiser, nn.Module) else nn.Identity()
        return {
            "the number of images": y.shape[0],
            "the precision of y": y.real.dtype,
            "y.requires_grad": y.requires_grad,
            "whether gradients are recorded": torch.is_grad_enabled(),
            "x0": x0,
            "the denoiser's weights": [*module.parameters(), *module.buffers()],
            "step_size": self.current_step_size(),
            "tau": self.tau,
            "minibatch_size": self.minibatch_size,
            "variance_reduction": self.variance_reduction,
            "solver": self.solver,
            "differentiation": self.differentiation,
            "nonnegative": self.nonnegative,
        }

    def _prepare(self, y: Tensor) -> Tensor:
        """Bring the data into the form that the operator's gradients take."""
        names = ["prepare_full_batch"] * (self.minibatch_size is None) + ["prepare"]
        name = next((name for name in names if hasattr(type(self.operator), name)), None)
        return y if name is None else getattr(self.operator, name)(y)

    def _initial(self, y: Tensor) -> Tensor:
        """Return the operator's start."""
        for name in ("initial", "A_adjoint"):
            if hasattr(self.operator, name):
                start: Tensor = getattr(self.operator, name)(y)
                return start
        raise ValueError(f"DEQRED: {type(self.operator).__name__} has no initial(y): give x0")

    def _check_start(self, start: Tensor, y: Tensor) -> Tensor:
        """Return the start, checked, projected where asked."""
        self._check("x0", start, getattr(self.operator, "image_shape", None))
        if start.shape[0] != y.shape[0]:
            raise ValueError(f"DEQRED: x0 must hold as many images as y ({y.shape[0]}), got {start.shape[0]}")
        if start.device != y.device or start.real.dtype != y.real.dtype:
            raise ValueError(
                f"DEQRED: x0 must have the device and precision of y ({y.device}, {y.dtype}), "
                f"got {start.device}, {start.dtype}"
            )
        if self.nonnegative:
            if start.is_complex():
                raise ValueError(f"DEQRED: nonnegative needs real images, got {start.dtype}")
            start = start.clamp(min=0)
        return start

    def _scalar(self, value: float | Tensor, device: torch.device) -> Tensor:
        if isinstance(value, Tensor):
            return value
        return torch.tensor(value, dtype=torch.float64, device=device)

    def _check(self, name: str, value: Tensor, shape: tuple[int, ...] | None) -> None:
        if not isinstance(value, Tensor):
            raise TypeError(f"DEQRED: {name} must be a torch.Tensor, got {type(value).__name__}")
        if not (value.is_floating_point() or value.is_complex()):
            raise TypeError(f"DEQRED: {name} must be floating-point or complex, got {value.dtype}")
        if shape is not None and (value.ndim != len(shape) + 1 or tuple(value.shape[1:]) != tuple(shape)):
            wanted = ", ".join(map(str, ("B", *shape)))
            raise ValueError(f"DEQRED: {name} must have shape ({wanted}), got {tuple(value.shape)}")
        if value.ndim < 3:
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
        if _exporting():
            return
        finite = value.detach().isfinite()
        if not bool(finite.all()):
            index = tuple(int(i) for i in (~finite).nonzero()[0])
            raise ValueError(f"DEQRED: {name} must be finite, got {value[index].item()} at index {index}")


@dataclass
class RED(FixedPointMap):
    """The map of `DEQRED`."""

    fidelity: Fidelity
    denoiser: Callable[[Tensor], Tensor]
    step_size: Tensor
    tau: Tensor
    nonnegative: bool
    autocast: _Autocast

    advice = (
        "lower step_size or tau, try Anderson() or Picard(), or take a denoiser that contracts (spectral norms, "
        "more training)"
    )

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        """Whether minibatches are drawn from this map."""
        return self.fidelity.stochastic

    @property
    def variance_reduced(self) -> bool:  # type: ignore[override]
        """Whether their noise vanishes at the fixed point."""
        return self.fidelity.variance_reduction

    @property
    def requires_grad(self) -> bool:  # type: ignore[override]
        """Whether the weights, the data or a parameter need a gradient; assumed of a mere function."""
        if not isinstance(self.denoiser, nn.Module):
            return True
        tensors = (self.fidelity.y, self.step_size, self.tau, *self.denoiser.parameters())
        return any(t.requires_grad for t in tensors)

    def __call__(self, point: Tensor) -> Tensor:
        """Return ``T(point)``."""
        return self.step(point).image

    def step(self, point: Tensor, previous: Tensor | None = None, momentum: Tensor | None = None) -> Step:
        """Apply the map and extrapolate, the gradient fused with both where the operator can."""
        update = self.fidelity.red_update(
            point,
            self.denoise(point),
            self.step_size,
            self.tau,
            previous=previous,
            momentum=momentum,
            nonnegative=self.nonnegative,
        )
        return Step(update.image, update.extrapolated, self.agree(update.reductions))

    @property
    def hidden(self) -> Hidden:  # type: ignore[override]
        """The full gradient and where it was last taken, and how minibatches are drawn."""
        return self.fidelity

    def agree(self, reductions: Tensor) -> Tensor:
        """Return the reductions that decide in all processes."""
        return self.fidelity.agree(reductions)

    def denoise(self, image: Tensor) -> Tensor:
        """Call the denoiser on the image as channels, in the precision that autocast asks for."""
        channels = as_channels(image)
        with self.autocast.resume():
            denoised = self.denoiser(channels)
        if not isinstance(denoised, Tensor) or denoised.shape != channels.shape:
            got = tuple(denoised.shape) if isinstance(denoised, Tensor) else type(denoised).__name__
            raise ValueError(
                f"DEQRED: denoiser must return the shape it got, {tuple(channels.shape)}, got {got}"
            )
        if denoised.dtype != channels.dtype:
            denoised = denoised.to(channels.dtype)
        return from_channels(denoised, image)

    def draw(self) -> RED:
        """Return the map of a fresh minibatch."""
        return _changed(self, fidelity=self.fidelity.draw()) if self.stochastic else self

    def select(self, images: Tensor) -> RED:
        """Return the map of some images."""
        return replace(self, fidelity=self.fidelity.select(images))

    @contextmanager
    def solving(self) -> Iterator[None]:
        """Forget what autocast has cast in a solve without gradients."""
        yield
        if self.autocast.enabled:
            torch.clear_autocast_cache()

    def linearize(self, point: Tensor, minibatch_size: int | str | None) -> Linearization:
        """Linearize the denoiser once; the data fidelity is linear, and the projection a mask."""
        size = self.fidelity.minibatch_size if minibatch_size == "same" else minibatch_size
        assert not isinstance(size, str)
        point = point.detach()
        mask = (point > 0).to(point.dtype) if self.nonnegative else None
        with torch.enable_grad(), _eager():
            leaf = point.detach().requires_grad_()
            with Rematerialized():
                denoised = self.denoise(leaf)
            # Only the derivatives of the output count: it need not be right in what has none.
            step_size, tau = (v.to(point.real.dtype) for v in (self.step_size, self.tau))
            prior = tau * (point - denoised)
            if step_size.requires_grad or self.fidelity.y.requires_grad:
                prior = prior + self.fidelity.gradient(point)
            output = point - step_size * prior
            if mask is not None:
                output = output * mask
        transposed = TransposedRED(
            self.fidelity.homogeneous(size),
            denoised,
            leaf,
            self.step_size.detach(),
            self.tau.detach(),
            mask,
            self.advice,
        )
        return Linearization(output, transposed)


@dataclass
class TransposedRED(FixedPointMap):
    r"""The transposed derivative of the RED map, the denoiser linearized at `leaf`.

    .. math:: T'^H v = u - \gamma (A^H A u + \tau (u - D'^H u)), \quad u = v \text{ on the active set, else }
    0
    """

    fidelity: Fidelity
    denoised: Tensor
    leaf: Tensor
    step_size: Tensor
    tau: Tensor
    mask: Tensor | None
    advice: str

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        """Whether minibatches are drawn from this map."""
        return self.fidelity.stochastic

    @property
    def variance_reduced(self) -> bool:  # type: ignore[override]
        """Whether their noise vanishes at the fixed point."""
        return self.fidelity.variance_reduction

    @property
    def hidden(self) -> Hidden:  # type: ignore[override]
        """The full gradient and where it was last taken, and how minibatches are drawn."""
        return self.fidelity

    def __call__(self, point: Tensor) -> Tensor:
        """Return ``T'^H point``."""
        u = point if self.mask is None else point * self.mask
        with _full_precision(u.device):
            return self.fidelity.red_update(
                u, vjp(self.denoised, self.leaf, u), self.step_size, self.tau
            ).image

    def agree(self, reductions: Tensor) -> Tensor:
        """Return the reductions that decide in all processes."""
        return self.fidelity.agree(reductions)

    def draw(self) -> TransposedRED:
        """Return the map of a fresh minibatch."""
        return _changed(self, fidelity=self.fidelity.draw()) if self.stochastic else self


@dataclass
class Fidelity(Hidden):
    r"""The data fidelity's part of a RED step: of all blocks, or of a minibatch.

    Serves three kinds of operator: one with a fused ``red_update``, one with ``gradient(x, y, blocks)``, one
    with ``A`` and ``A_adjoint``; `y` is what the operator's ``prepare``, where it has one, made of the data.
    With variance reduction, a minibatch `B` corrects the last full gradient,

    .. math:: \nabla g(\tilde x) + \nabla g_B(x) - \nabla g_B(\tilde x)
        = \nabla g(\tilde x) + A_B^H A_B (x - \tilde x),

    at the price of the minibatch's gradient alone; its noise vanishes as `x` and the anchor :math:`\tilde
    x`, where the full gradient was last taken, come together.
    """

    operator: Any
    y: Tensor
    minibatch_size: int | None
    variance_reduction: bool
    generator: torch.Generator | None
    zero_data: bool = False
    blocks: Tensor | None = None
    anchor: tuple[Tensor, Tensor] | None = None

    @property
    def stochastic(self) -> bool:
        """Whether there are minibatches to draw."""
        return self.minibatch_size is not None and self.blocks is None

    @property
    def carried(self) -> tuple[Tensor, ...]:
        """The anchor and the full gradient there."""
        return self.anchor or ()

    @carried.setter
    def carried(self, tensors: tuple[Tensor, ...]) -> None:
        self.anchor = (tensors[0], tensors[1]) if tensors else None

    @property
    def generators(self) -> tuple[torch.Generator, ...]:  # type: ignore[override]
        """Of the minibatches."""
        return (self.generator,) if self.stochastic and self.generator is not None else ()

    @property
    def obstacle(self) -> str | None:  # type: ignore[override]
        """Why a step cannot be captured in a CUDA graph."""
        kind = type(self.operator)
        if hasattr(kind, "agree"):
            return "the measurements are spread over processes, which exchange gradients in each iteration"
        if not self.stochastic:
            return None
        if self.generator is not None and self.generator.device.type != self.y.device.type:
            return f"minibatches are drawn by a generator on the {self.generator.device}; give one on the GPU"
        if not kind.draw_blocks.__module__.startswith(f"{__package__}.operators"):
            return f"{kind.__name__}.draw_blocks may draw by other means than torch's on the GPU, which alone repeat"
        return None

    def gradient(self, x: Tensor, *, zero_data: bool = False) -> Tensor:
        """Return the gradient of all blocks or of the minibatch, of zero data where asked."""
        zero_data = zero_data or self.zero_data
        y: Tensor | None = self.y
        if zero_data:
            # Our own operators take None for zeros; others get zeros that take no memory.
            own = hasattr(self.operator, "red_update")
            y = None if own else self.y.detach().new_zeros(()).expand_as(self.y)
        if not hasattr(self.operator, "gradient"):
            gradient: Tensor = self.operator.A_adjoint(self.operator.A(x) - y)
        elif self.blocks is None:
            gradient = self.operator.gradient(x, y, **self._options)
        else:
            gradient = self.operator.gradient(x, y, self.blocks, **self._options)
        return gradient

    @property
    def _options(self) -> dict[str, bool]:
        return {"prepared": True} if hasattr(type(self.operator), "prepare") else {}

    def red_update(
        self, x: Tensor, denoised: Tensor, step_size: Tensor, tau: Tensor, **options: Any
    ) -> ops.RedUpdate:
        """Take one RED step."""
        anchored = self.variance_reduction and self.minibatch_size is not None
        if hasattr(self.operator, "red_update") and not anchored:
            y = None if self.zero_data else self.y
            update: ops.RedUpdate = self.operator.red_update(
                x, y, self.blocks, denoised, step_size, tau, **options, **self._options
            )
            return update
        if anchored and self.blocks is not None:
            assert self.anchor is not None
            there, gradient = self.anchor
            gradient = gradient + self.gradient(x - there, zero_data=True)
        else:
            gradient = self.gradient(x)
            if anchored:
                self.anchor = (x, gradient)
        return ops.red_update(x, gradient, denoised, step_size, tau, **options)

    def agree(self, reductions: Tensor) -> Tensor:
        """Return the reductions that decide, where the measurements are spread over processes."""
        # Of a module hasattr looks long for what is not there.
        agree = getattr(type(self.operator), "agree", None)
        return reductions if agree is None else agree(self.operator, reductions)

    def draw(self) -> Fidelity:
        """Return the data fidelity of a fresh minibatch."""
        blocks: Tensor = self.operator.draw_blocks(self.minibatch_size, self.generator)
        return _changed(self, blocks=blocks)

    def homogeneous(self, minibatch_size: int | None) -> Fidelity:
        """Return the data fidelity of zero data."""
        return replace(
            self, y=self.y.detach(), minibatch_size=minibatch_size, zero_data=True, blocks=None, anchor=None
        )

    def select(self, images: Tensor) -> Fidelity:
        """Return the data fidelity of some images."""
        images = images.to(self.y.device)
        anchor = self.anchor and (
            self.anchor[0].index_select(0, images),
            self.anchor[1].index_select(0, images),
        )
        operator = self.operator.select(images) if hasattr(self.operator, "select") else self.operator
        return replace(self, operator=operator, y=self.y.index_select(0, images), anchor=anchor)


def _changed(original: T, **fields: Any) -> T:
    """Return a copy with other fields, as `dataclasses.replace` does, but in less than a small operator takes."""
    changed = object.__new__(type(original))
    vars(changed).update(vars(original), **fields)
    return changed


def as_channels(image: Tensor) -> Tensor:
    """View images ``(B, H, W)`` or ``(B, C, H, W)`` as real ``(B, C', H, W)``."""
    if image.is_complex():
        pairs = torch.view_as_real(image.resolve_conj())
        # (B, H, W, 2) permuted is channels-last: no copy.
        return pairs.permute(0, 3, 1, 2) if image.ndim == 3 else pairs.permute(0, 1, 4, 2, 3).flatten(1, 2)
    return image.unsqueeze(1) if image.ndim == 3 else image


def from_channels(channels: Tensor, like: Tensor) -> Tensor:
    """View what `as_channels` made as images like `like` again."""
    if like.is_complex():
        if like.ndim == 3:
            return torch.view_as_complex(channels.permute(0, 2, 3, 1).contiguous())
        return torch.view_as_complex(
            channels.reshape(like.shape[0], -1, 2, *like.shape[2:]).permute(0, 1, 3, 4, 2).contiguous()
        )
    return channels.squeeze(1) if like.ndim == 3 else channels


class _Autocast:
    """The autocast that the caller had on, for the denoiser alone."""

    def __init__(self, device: torch.device) -> None:
        self.device_type = device.type
        self.enabled = torch.is_autocast_enabled(device.type)
        self.dtype = torch.get_autocast_dtype(device.type)

    def resume(self) -> AbstractContextManager[Any]:
        if not self.enabled:
            return nullcontext()
        # A weight cast and kept without a graph would lose the gradient of an evaluation that wants one.
        return torch.autocast(self.device_type, self.dtype, cache_enabled=not torch.is_grad_enabled())


def _exporting() -> bool:
    # What `torch.compiler.is_exporting` returns: compilers before torch 2.13 take that for true whenever they trace it,
    # and torch 2.6 has neither.
    return bool(getattr(torch.compiler, "_is_exporting_flag", False))


def _eager() -> AbstractContextManager[Any]:
    """Run compiled denoisers as they were written: their backward passes run once only, the adjoint's many times."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def _full_precision(device: torch.device) -> AbstractContextManager[Any]:
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def _check_scale(y: Tensor) -> None:
    """Refuse data whose squares, as norms have them, do not fit the dtype."""
    if _exporting():
        return
    largest = y.detach().abs().flatten(1).amax(1)
    span = torch.finfo(y.real.dtype).max ** 0.3
    bad = ((largest > span) | ((largest < 1 / span) & (largest > 0))).nonzero()
    if len(bad):
        image = int(bad[0])
        raise ValueError(
            f"DEQRED: y of image {image} has the largest magnitude {float(largest[image]):.3g}; {y.dtype} is for "
            f"{1 / span:.0e} to {span:.0e}: give it in another unit"
        )


def _check_adjoint(differentiation: Implicit, solver: Solver[Any], size: int | None, operator: Any) -> None:
    own = differentiation.minibatch_size
    adjoint_size = size if own == "same" else own
    assert not isinstance(adjoint_size, str)
    adjoint_solver = differentiation.solver or solver
    _check_minibatch("differentiation.minibatch_size", adjoint_size, operator, adjoint_solver)


def _check_minibatch(name: str, size: int | None, operator: Any, solver: Solver[Any]) -> None:
    if size is None:
        return
    if not solver.takes_minibatches:
        raise ValueError(f"DEQRED: {type(solver).__name__} takes no minibatches, but {name} is {size}")
    if not (hasattr(operator, "n_blocks") and hasattr(operator, "draw_blocks")):
        raise ValueError(
            f"DEQRED: {name} needs an operator with n_blocks and draw_blocks(size, generator), "
            f"got {type(operator).__name__}"
        )
    if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= operator.n_blocks:
        raise ValueError(
            f"DEQRED: {name} must be a number from 1 to {operator.n_blocks} blocks, got {size!r}"
        )


def _norm_squared(operator: Any, size: int | None, differentiation: Differentiation) -> float:
    """Return the operator's norm squared, or what it says takes its place with the minibatches of either pass."""
    sizes = [size] if size is not None else []
    if isinstance(differentiation, Implicit) and isinstance(differentiation.minibatch_size, int):
        sizes.append(differentiation.minibatch_size)
    if sizes and hasattr(operator, "minibatch_norm_squared"):
        return float(operator.minibatch_norm_squared(min(sizes)))
    return float(operator.norm_squared())


def _check_scalar(name: str, value: float | Tensor, *, zero: bool) -> None:
    if isinstance(value, Tensor):
        if value.ndim != 0 or not value.is_floating_point():
            raise ValueError(
                f"DEQRED: {name} must be a float or a 0-d floating-point tensor, got {value.dtype} "
                f"of shape {tuple(value.shape)}"
            )
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"DEQRED: {name} must be a float or a 0-d tensor, got {type(value).__name__}")
    number = _number(value)
    if not math.isfinite(number) or number < 0 or (number == 0 and not zero):
        raise ValueError(
            f"DEQRED: {name} must be finite and {'at least' if zero else 'above'} 0, got {number}"
        )


def _number(value: float | Tensor) -> float:
    return float(value.detach()) if isinstance(value, Tensor) else float(value)
