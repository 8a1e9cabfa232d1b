"""Graphs of denoisers that keep no more than they need: what is cheap is computed again in the backward pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils.weak import WeakIdKeyDictionary

DEPTH = 4
"""Layers that are computed again for one gradient at most: each layer of a long chain would compute all before it."""


class Rematerialized(TorchFunctionMode):
    """Record a graph for many vjps in the image and one in the weights, in which cheap layers are computed again.

    Layers of a network keep their input for the gradients of their weights and for their own derivative: the
    same features before and after each normalization and activation, and once more where they are
    concatenated. Inside this context a convolution whose input comes from another through group normalization,
    activation, concatenation or pooling keeps what that can be computed again from; it is where gradients in
    weights are asked for. For vjps in the image such an activation keeps one byte a feature.

    Values and gradients are those of the plain graph to rounding, second derivatives included. Layers between
    which nothing is gained (convolutions with ReLU alone), that are not known here, or that run under a
    checkpoint, a transform or a function mode besides this one do as they always do.

    Example:
        >>> import torch
        >>> from oder_fast.denoisers import UNet
        >>> network, image = UNet(channels=(4, 8)), torch.ones(1, 1, 8, 8, requires_grad=True)
        >>> with Rematerialized():
        ...     output = network(image).sum()
        >>> (gradient,) = torch.autograd.grad(output, image)

    References:
        Chen, Xu, Zhang, Guestrin, "Training deep nets with sublinear memory cost", arXiv:1604.06174 (2016).
    """

    def __init__(self) -> None:
        super().__init__()
        self._recipes: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.memory: dict[torch.dtype, Tensor] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        rule = _RULES.get(func)
        if rule is not None and set(types) <= {Tensor, nn.Parameter} and _records_plainly():
            # What a rule cannot take is left to the function itself, its errors too.
            with suppress(TypeError, ValueError, RuntimeError):
                result = rule(self, *args, **(kwargs or {}))
                if result is not None:
                    return result
        return func(*args, **(kwargs or {}))

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        self._recipes.clear()

    def recipe(self, tensor: Tensor) -> Recipe:
        """Return how to compute a tensor again; where nothing better is known, it is kept."""
        recipe: Recipe | None = self._recipes.get(tensor)
        return recipe if recipe is not None and recipe.holds(tensor) else Recipe(tensor, None, (tensor,), 0)

    def remember(self, tensor: Tensor, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Note that `function` of `inputs`, each computed again, is `tensor`; return it."""
        recipes = [self.recipe(t) for t in inputs]
        depth = 1 + max(r.depth for r in recipes)
        if depth > DEPTH or not tensor.requires_grad:
            return tensor
        parts = [(r.function, len(r.kept)) for r in recipes]
        device = tensor.device.type
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            autocast = lambda: torch.autocast(device, dtype, cache_enabled=False)  # noqa: E731

        def compute(*kept: Tensor) -> Tensor:
            remaining = iter(kept)
            arguments = [_compute(f, islice(remaining, n)) for f, n in parts]
            with autocast():
                return function(*arguments)

        self._recipes[tensor] = Recipe(tensor, compute, tuple(t for r in recipes for t in r.kept), depth)
        return tensor


class Recipe:
    """How a tensor is computed again, from others that are kept; without a function it is kept itself."""

    def __init__(
        self, tensor: Tensor, function: Callable[..., Tensor] | None, kept: tuple[Tensor, ...], depth: int
    ) -> None:
        self.function = function
        self.kept = kept
        self.depth = depth
        self._versions = [_version(t) for t in (tensor, *kept)]

    def holds(self, tensor: Tensor) -> bool:
        """Whether nothing was changed in place since."""
        return self._versions == [_version(t) for t in (tensor, *self.kept)]


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _compute(function: Callable[..., Tensor] | None, kept: Iterable[Tensor]) -> Tensor:
    if function is not None:
        return function(*kept)
    (tensor,) = kept
    return tensor


def _records_plainly() -> bool:
    """Whether a graph is recorded, by autograd alone, and what runs is what is called.

    A checkpoint inside the denoiser counts what is saved, and runs its part again outside of the mode. Where torch
    is too old to tell of one, the graph is left as it is. Another function mode may change the arguments.
    """
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore_tracing: "unknown")
    alone = hooks(False) is None and torch._C._functorch.peek_interpreter_stack() is None
    modes = _get_current_function_mode_stack()
    own = all(isinstance(mode, DeviceContext) for mode in modes)
    return torch.is_grad_enabled() and alone and own and forward_ad._current_level < 0


# ------------------------------------------------------------------ the two parts of a layer's derivative


class _Layer(ABC):
    """A layer with a derivative of its own."""

    read: ClassVar[int] = 1
    """Number of parameters, from the first on, that the derivative in the parameters reads."""

    @abstractmethod
    def evaluate(self, features: Tensor, *parameters: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the output, and what `vjp` needs."""

    @abstractmethod
    def vjp(self, gradient: Tensor, *saved: Tensor) -> Tensor:
        """Return the vjp in the features."""

    def parameter_gradients(
        self, gradient: Tensor, features: Tensor | None, read: tuple[Tensor, ...], wanted: list[bool]
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients in the parameters; there are features where one is wanted in what is read."""
        return ()


class _InFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layer: _Layer, features: Tensor, *parameters: Tensor) -> Tensor:
        output, saved = layer.evaluate(features, *parameters)
        ctx.layer, ctx.count = layer, len(parameters)
        ctx.save_for_backward(*saved)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return None, ctx.layer.vjp(gradient, *ctx.saved_tensors), *[None] * ctx.count


class _InParameters(torch.autograd.Function):
    """Nothing, with the layer's derivative in its parameters: a node of its own, which runs only where asked for."""

    @staticmethod
    def forward(ctx: Any, layer: _Layer, recipe: Recipe, output: Tensor, *parameters: Tensor) -> Tensor:
        read = parameters[: layer.read]
        ctx.layer, ctx.function, ctx.needed = layer, recipe.function, any(p.requires_grad for p in read)
        # What is kept must be no argument: it would lead to the image, and the node run for that.
        ctx.save_for_backward(*read, *(recipe.kept if ctx.needed else ()))
        return output.new_zeros(()).expand(output.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        read, kept = ctx.saved_tensors[: ctx.layer.read], ctx.saved_tensors[ctx.layer.read :]
        features = _compute(ctx.function, kept) if ctx.needed else None
        wanted = list(ctx.needs_input_grad[3:])
        return None, None, None, *ctx.layer.parameter_gradients(gradient, features, read, wanted)


def _apply(layer: _Layer, recipe: Recipe, features: Tensor, *parameters: Tensor) -> Tensor | None:
    if not any(t.requires_grad for t in (features, *parameters)):
        return None
    output: Tensor = _InFeatures.apply(layer, features, *parameters)  # type: ignore[no-untyped-call]
    if not any(p.requires_grad for p in parameters):
        return output
    nothing: Tensor = _InParameters.apply(layer, recipe, output.detach(), *parameters)  # type: ignore[no-untyped-call]
    return output.add_(nothing)


@dataclass
class _Layout:
    """The shape and strides of features, which is all that some derivatives read of them."""

    shape: torch.Size
    strides: tuple[int, ...]
    memory: dict[torch.dtype, Tensor]

    @classmethod
    def of(cls, features: Tensor, graph: Rematerialized) -> _Layout:
        return cls(features.shape, torch.empty_like(features, device="meta").stride(), graph.memory)

    def empty(self, like: Tensor) -> Tensor:
        """Return features of no particular values, all layers' in the same memory.

        Fresh memory each time would push the results into pages not yet touched, which costs more.
        """
        last = sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        memory = self.memory.get(like.dtype)
        if memory is None or memory.numel() <= last or memory.device != like.device:
            memory = torch.empty(last + 1, dtype=like.dtype, device=like.device)
            self.memory[like.dtype] = memory
        return memory.as_strided(self.shape, self.strides)


# ------------------------------------------------------------------ convolutions


@dataclass
class _Convolution(_Layer):
    function: Callable[..., Tensor]
    layout: _Layout
    arguments: tuple[Any, ...]  # of aten::convolution, after the bias

    def evaluate(self, features: Tensor, *parameters: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.function(features, *parameters), parameters[:1]

    def vjp(self, gradient: Tensor, *saved: Tensor) -> Tensor:
        (weight,) = saved
        features: Tensor = self._backward(
            gradient, self.layout.empty(gradient), weight, [True, False, False]
        )[0]
        return features

    def parameter_gradients(
        self, gradient: Tensor, features: Tensor | None, read: tuple[Tensor, ...], wanted: list[bool]
    ) -> tuple[Tensor | None, ...]:
        bias = gradient.sum([0, *range(2, gradient.ndim)]) if wanted[1:] == [True] else None
        weight = None
        if features is not None:
            weight = self._backward(gradient, features.to(gradient.dtype), read[0], [False, True, False])[1]
        return (weight, bias)[: len(wanted)]

    def _backward(self, gradient: Tensor, features: Tensor, weight: Tensor, mask: list[bool]) -> Any:
        # Under autocast the gradient has its dtype, the weight its own.
        return torch.ops.aten.convolution_backward.default(
            gradient, features, weight.to(gradient.dtype), None, *self.arguments, mask
        )


def _convolution(function: Callable[..., Tensor], dimensions: int, transposed: bool) -> Callable[..., Any]:
    def each(value: int | Iterable[int]) -> list[int]:
        values = [value] if isinstance(value, int) else list(value)
        return values * dimensions if len(values) == 1 else values

    def rule(
        graph: Rematerialized,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        *others: Any,
        **named: Any,
    ) -> Tensor | None:
        names = ("output_padding", "groups", "dilation") if transposed else ("dilation", "groups")
        options = {"dilation": 1, "groups": 1, "output_padding": 0}
        options |= dict(zip(names, others, strict=False)) | named
        recipe = graph.recipe(input)
        # Features without a recipe are kept in any case: nothing is gained.
        if recipe.function is None or isinstance(padding, str) or input.ndim != dimensions + 2:
            return None
        if input.is_complex():
            return None
        arguments = (
            each(stride),
            each(padding),
            each(options["dilation"]),
            transposed,
            each(options["output_padding"]),
            options["groups"],
        )

        def call(features: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            return function(features, weight, bias, stride, padding, *others, **named)

        parameters = (weight,) if bias is None else (weight, bias)
        layer = _Convolution(call, _Layout.of(input, graph), arguments)
        return _apply(layer, recipe, input, *parameters)

    return rule


# ------------------------------------------------------------------ activations


@dataclass
class _Rectifier(_Layer):
    """ReLU with a slope, a constant or trainable, for what is not positive."""

    function: Callable[..., Tensor]
    slope: float
    signs: bool

    def evaluate(self, features: Tensor, *parameters: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        kept = features
        # Features that can be computed again are not kept for their signs; one byte each spares computing them.
        if self.signs:
            kept = features > 0 if parameters or self.slope else ~(features <= 0)
        return self.function(features, *parameters), (kept, *parameters)

    def vjp(self, gradient: Tensor, *saved: Tensor) -> Tensor:
        features, *slope = saved
        if slope:
            positive = features if self.signs else features > 0
            each = slope[0].reshape(-1, *[1] * (gradient.ndim - 2)).to(gradient.dtype)
            # Exact at 0 and 1, and a third of the time of `where` and of the derivative of `prelu` on a CPU.
            return torch.lerp(each, torch.ones_like(each), positive.to(gradient.dtype)).mul(gradient)
        if self.slope == 0:
            return gradient.masked_fill(~features, 0)
        features = features.to(gradient.dtype)
        result: Tensor = torch.ops.aten.leaky_relu_backward(gradient, features, self.slope, False)
        return result

    def parameter_gradients(
        self, gradient: Tensor, features: Tensor | None, read: tuple[Tensor, ...], wanted: list[bool]
    ) -> tuple[Tensor | None, ...]:
        assert features is not None
        (parameter,) = read
        product = gradient * features.clamp(max=0)
        channels = [0, *range(2, product.ndim)] if parameter.numel() > 1 else list(range(product.ndim))
        return (product.sum(channels).reshape(parameter.shape),)


def _rectify(
    graph: Rematerialized, function: Callable[..., Tensor], slope: float, input: Tensor, *parameters: Tensor
) -> Tensor | None:
    recipe = graph.recipe(input)
    if recipe.function is None and not parameters:
        # The output of a ReLU serves its own derivative and the next layer.
        return graph.remember(function(input), function, input) if slope else None
    output = _apply(_Rectifier(function, slope, recipe.function is not None), recipe, input, *parameters)
    return None if output is None else graph.remember(output, function, input, *parameters)


def _prelu(graph: Rematerialized, input: Tensor, weight: Tensor) -> Tensor | None:
    return None if input.ndim < 2 else _rectify(graph, torch.prelu, 0.0, input, weight)


def _leaky_relu(
    graph: Rematerialized, input: Tensor, negative_slope: float = 0.01, inplace: bool = False
) -> Tensor | None:
    slope = float(negative_slope)
    return None if inplace or slope == 0 else _rectify(graph, lambda x: F.leaky_relu(x, slope), slope, input)


def _relu(graph: Rematerialized, input: Tensor, inplace: bool = False) -> Tensor | None:
    return None if inplace else _rectify(graph, torch.relu, 0.0, input)


# ------------------------------------------------------------------ pooling, and what needs a recipe alone


@dataclass
class _MaxPool(_Layer):
    """Max-pooling, of which the indices are kept alone."""

    arguments: tuple[Any, ...]
    layout: _Layout

    def evaluate(self, features: Tensor, *parameters: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        output, indices = torch.ops.aten.max_pool2d_with_indices(features, *self.arguments)
        return output, (indices,)

    def vjp(self, gradient: Tensor, *saved: Tensor) -> Tensor:
        result: Tensor = torch.ops.aten.max_pool2d_with_indices_backward(
            gradient, self.layout.empty(gradient), *self.arguments, *saved
        )
        return result


def _max_pool2d(
    graph: Rematerialized,
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | None:
    # Windows that overlap are not cheap.
    if input.ndim != 4 or return_indices or (stride or kernel_size) != kernel_size:
        return None
    pairs = ([v] if isinstance(v, int) else list(v) for v in (kernel_size, stride or [], padding, dilation))
    output = _apply(_MaxPool((*pairs, ceil_mode), _Layout.of(input, graph)), graph.recipe(input), input)

    def call(features: Tensor) -> Tensor:
        return F.max_pool2d(features, kernel_size, stride, padding, dilation, ceil_mode)

    return None if output is None else graph.remember(output, call, input)


def _group_norm(
    graph: Rematerialized,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    if (weight is None) != (bias is None):
        return None
    affine = () if weight is None or bias is None else (weight, bias)

    def call(features: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        return F.group_norm(features, num_groups, weight, bias, eps)

    return graph.remember(call(input, *affine), call, input, *affine)


def _cat(graph: Rematerialized, tensors: Iterable[Tensor], dim: int = 0) -> Tensor:
    tensors = tuple(tensors)
    output = torch.cat(tensors, dim)
    if not output.requires_grad:
        return output
    # The plain graph keeps no part: whatever becomes of one afterwards must not matter.
    parts = [t.clone() if graph.recipe(t).function is None else t for t in tensors]
    return graph.remember(output, lambda *parts: torch.cat(parts, dim), *parts)


_RULES: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.conv1d: _convolution(torch.conv1d, 1, False),
    torch.conv2d: _convolution(torch.conv2d, 2, False),
    torch.conv3d: _convolution(torch.conv3d, 3, False),
    torch.conv_transpose1d: _convolution(torch.conv_transpose1d, 1, True),
    torch.conv_transpose2d: _convolution(torch.conv_transpose2d, 2, True),
    torch.conv_transpose3d: _convolution(torch.conv_transpose3d, 3, True),
    torch.prelu: _prelu,
    F.leaky_relu: _leaky_relu,
    F.relu: _relu,
    torch.relu: _relu,
    F.max_pool2d: _max_pool2d,
    F.group_norm: _group_norm,
    torch.cat: _cat,
}
