"""Graphs of denoisers that keep no more than they need: what is cheap is computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary


class Rematerialized(TorchFunctionMode):
    """Record a graph for many vjps in the image and one in the weights, in which cheap layers are computed again.

    Layers of a network keep their input for the gradients of their weights and for their own derivative: the
    same features before and after each normalization and activation, and once more where they are
    concatenated. Inside this context, convolutions keep what their input can be computed again from, which are
    outputs of other convolutions, through activations, normalizations, concatenation and pooling; that happens
    only where gradients in weights are asked for. For vjps in the image an activation keeps one byte a feature.

    Values and gradients are those of the plain graph to rounding, second derivatives included. A layer that is
    not known here, or that runs under a checkpoint or a transform of the denoiser's own, does as it always does.

    Example:
        >>> import torch
        >>> conv, image = torch.nn.Conv2d(1, 1, 3), torch.ones(1, 1, 5, 5, requires_grad=True)
        >>> with Rematerialized():
        ...     output = conv(image).sum()
        >>> (gradient,) = torch.autograd.grad(output, image)

    References:
        Chen, Xu, Zhang, Guestrin, "Training deep nets with sublinear memory cost", arXiv:1604.06174 (2016).
    """

    def __init__(self) -> None:
        super().__init__()
        self._recipes: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        rule = _RULES.get(func)
        if rule is not None and set(types) <= {Tensor, nn.Parameter} and _records_plainly():
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
        return recipe if recipe is not None and recipe.holds(tensor) else Recipe(tensor, None, (tensor,))

    def remember(self, tensor: Tensor, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Note that `function` of `inputs`, each computed again, is `tensor`; return it."""
        recipes = [self.recipe(t) for t in inputs]
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

        self._recipes[tensor] = Recipe(tensor, compute, tuple(t for r in recipes for t in r.kept))
        return tensor


class Recipe:
    """How a tensor is computed again, from others that are kept; without a function it is kept itself."""

    def __init__(
        self, tensor: Tensor, function: Callable[..., Tensor] | None, kept: tuple[Tensor, ...]
    ) -> None:
        self.function = function
        self.kept = kept
        self._versions = [t._version for t in (tensor, *kept)]

    def holds(self, tensor: Tensor) -> bool:
        """Whether nothing was changed in place since."""
        return self._versions == [t._version for t in (tensor, *self.kept)]


def _compute(function: Callable[..., Tensor] | None, kept: Iterable[Tensor]) -> Tensor:
    if function is not None:
        return function(*kept)
    (tensor,) = kept
    return tensor


def _records_plainly() -> bool:
    """Whether a graph is recorded, by autograd alone.

    A checkpoint inside the denoiser counts what is saved, and runs its part again outside of the mode. Where torch
    is too old to tell of one, the graph is left as it is.
    """
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore_tracing: "unknown")
    alone = hooks(False) is None and torch._C._functorch.peek_interpreter_stack() is None
    return torch.is_grad_enabled() and alone


# ------------------------------------------------------------------ the two parts of a layer's derivative


class _Layer:
    """A layer with a derivative of its own."""

    def evaluate(self, features: Tensor, *parameters: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the output, and what `vjp` needs."""
        raise NotImplementedError

    def vjp(self, gradient: Tensor, *saved: Tensor) -> Tensor:
        """Return the vjp in the features."""
        raise NotImplementedError

    def parameter_gradients(
        self, gradient: Tensor, features: Tensor, parameters: tuple[Tensor, ...], wanted: list[bool]
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients in the parameters, None where they are not wanted."""
        raise NotImplementedError


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
        ctx.layer, ctx.function, ctx.count = layer, recipe.function, len(parameters)
        # What is kept must be no argument: it would lead to the image, and the node run for that.
        ctx.save_for_backward(*parameters, *recipe.kept)
        return output.new_zeros(()).expand(output.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        parameters, kept = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        features = _compute(ctx.function, kept)
        wanted = list(ctx.needs_input_grad[3:])
        return None, None, None, *ctx.layer.parameter_gradients(gradient, features, parameters, wanted)


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, nothing: Tensor) -> Tensor:
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient


def _apply(layer: _Layer, recipe: Recipe, features: Tensor, *parameters: Tensor) -> Tensor:
    output: Tensor = _InFeatures.apply(layer, features, *parameters)  # type: ignore[no-untyped-call]
    if not any(p.requires_grad for p in parameters):
        return output
    with torch.no_grad():
        shape = output.detach()
    nothing = _InParameters.apply(layer, recipe, shape, *parameters)  # type: ignore[no-untyped-call]
    joined: Tensor = _Join.apply(output, nothing)  # type: ignore[no-untyped-call]
    return joined


# ------------------------------------------------------------------ convolutions


@dataclass
class _Convolution(_Layer):
    function: Callable[..., Tensor]
    shape: torch.Size
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int

    def evaluate(self, features: Tensor, *parameters: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.function(features, *parameters), parameters[:1]

    def vjp(self, gradient: Tensor, *saved: Tensor) -> Tensor:
        (weight,) = saved
        lost = [0] * len(self.stride)
        if not self.transposed:
            sizes = zip(
                self.shape[2:], weight.shape[2:], self.stride, self.padding, self.dilation, strict=True
            )
            lost = [(n + 2 * p - d * (k - 1) - 1) % s for n, k, s, p, d in sizes]
        # Under autocast the gradient has its dtype, the weight its own.
        features: Tensor = torch.ops.aten.convolution(
            gradient,
            weight.to(gradient.dtype),
            None,
            self.stride,
            self.padding,
            self.dilation,
            not self.transposed,
            lost,
            self.groups,
        )
        return features

    def parameter_gradients(
        self, gradient: Tensor, features: Tensor, parameters: tuple[Tensor, ...], wanted: list[bool]
    ) -> tuple[Tensor | None, ...]:
        weight, *bias = parameters
        _, *gradients = torch.ops.aten.convolution_backward(
            gradient,
            features.to(gradient.dtype),
            weight.to(gradient.dtype),
            list(bias[0].shape) if bias else None,
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            self.groups,
            [False, *wanted, *[False] * (1 - len(bias))],
        )
        return tuple(gradients[: len(parameters)])


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
        options = {
            "dilation": 1,
            "groups": 1,
            "output_padding": 0,
            **dict(zip(names, others, strict=False)),
            **named,
        }
        dilation, output_padding = each(options["dilation"]), each(options["output_padding"])
        if isinstance(padding, str) or input.ndim != dimensions + 2 or input.is_complex():
            return None
        if any(o >= s for o, s in zip(output_padding, each(stride), strict=True)):
            return None
        parameters = (weight,) if bias is None else (weight, bias)

        def call(features: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            return function(features, weight, bias, stride, padding, *others, **named)

        layer = _Convolution(
            call,
            input.shape,
            each(stride),
            each(padding),
            dilation,
            transposed,
            output_padding,
            options["groups"],
        )
        return _apply(layer, graph.recipe(input), input, *parameters)

    return rule


# ------------------------------------------------------------------ activations


@dataclass
class _Rectifier(_Layer):
    """ReLU with a slope, a constant or trainable, for what is not positive."""

    function: Callable[..., Tensor]
    slope: float
    signs: bool

    def evaluate(self, features: Tensor, *parameters: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        # Features that can be computed again are not kept for their signs; one byte each spares computing them.
        kept = features > 0 if self.signs else features
        return self.function(features, *parameters), (kept, *parameters)

    def vjp(self, gradient: Tensor, *saved: Tensor) -> Tensor:
        features, *slope = saved
        positive = features if self.signs else features > 0
        each = _per_channel(slope[0], gradient) if slope else self.slope
        # A third of the time of `where` and of the derivative of `prelu`, which are not vectorized.
        return positive.to(gradient.dtype).mul_(1 - each).add_(each).mul_(gradient)

    def parameter_gradients(
        self, gradient: Tensor, features: Tensor, parameters: tuple[Tensor, ...], wanted: list[bool]
    ) -> tuple[Tensor | None, ...]:
        (slope,) = parameters
        product = gradient * features.clamp(max=0)
        channels = [0, *range(2, product.ndim)] if slope.numel() > 1 else list(range(product.ndim))
        return (product.sum(channels).reshape(slope.shape),)


def _per_channel(slope: Tensor, like: Tensor) -> Tensor:
    return slope.reshape(-1, *[1] * (like.ndim - 2)).to(like.dtype)


def _prelu(graph: Rematerialized, input: Tensor, weight: Tensor) -> Tensor | None:
    if input.ndim < 2:
        return None
    recipe = graph.recipe(input)
    layer = _Rectifier(torch.prelu, 0.0, recipe.function is not None)
    return graph.remember(_apply(layer, recipe, input, weight), torch.prelu, input, weight)


def _rectifier(function: Callable[..., Tensor], default: float) -> Callable[..., Any]:
    def rule(
        graph: Rematerialized, input: Tensor, negative_slope: float = default, inplace: bool = False
    ) -> Tensor | None:
        recipe = graph.recipe(input)
        # The output of a ReLU of what has no recipe serves its own derivative and the next layer.
        if inplace or (negative_slope == 0 and recipe.function is None):
            return None

        def call(features: Tensor) -> Tensor:
            return F.relu(features) if function is F.relu else function(features, negative_slope)

        layer = _Rectifier(call, negative_slope, recipe.function is not None)
        return graph.remember(_apply(layer, recipe, input), call, input)

    if function is F.relu:
        return lambda graph, input, inplace=False: rule(graph, input, 0.0, inplace)
    return rule


# ------------------------------------------------------------------ pooling, and what needs a recipe alone


@dataclass
class _MaxPool(_Layer):
    """Max-pooling, of which the indices are kept alone."""

    arguments: tuple[Any, ...]
    shape: torch.Size
    strides: tuple[int, ...]

    def evaluate(self, features: Tensor, *parameters: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        output, indices = torch.ops.aten.max_pool2d_with_indices(features, *self.arguments)
        return output, (indices,)

    def vjp(self, gradient: Tensor, *saved: Tensor) -> Tensor:
        # Of the features it reads the layout alone.
        features = torch.empty_strided(self.shape, self.strides, dtype=gradient.dtype, device=gradient.device)
        result: Tensor = torch.ops.aten.max_pool2d_with_indices_backward(
            gradient, features, *self.arguments, *saved
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
    if input.ndim != 4 or return_indices:
        return None
    pairs = ([v] if isinstance(v, int) else list(v) for v in (kernel_size, stride or [], padding, dilation))
    layer = _MaxPool((*pairs, ceil_mode), input.shape, input.stride())

    def call(features: Tensor) -> Tensor:
        return F.max_pool2d(features, kernel_size, stride, padding, dilation, ceil_mode)

    return graph.remember(_apply(layer, graph.recipe(input), input), call, input)


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
    parts = tuple(tensors)
    return graph.remember(torch.cat(parts, dim), lambda *parts: torch.cat(parts, dim), *parts)


_RULES: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    torch.conv1d: _convolution(torch.conv1d, 1, False),
    torch.conv2d: _convolution(torch.conv2d, 2, False),
    torch.conv3d: _convolution(torch.conv3d, 3, False),
    torch.conv_transpose1d: _convolution(torch.conv_transpose1d, 1, True),
    torch.conv_transpose2d: _convolution(torch.conv_transpose2d, 2, True),
    torch.conv_transpose3d: _convolution(torch.conv_transpose3d, 3, True),
    torch.prelu: _prelu,
    F.leaky_relu: _rectifier(F.leaky_relu, 0.01),
    F.relu: _rectifier(F.relu, 0.0),
    F.max_pool2d: _max_pool2d,
    F.group_norm: _group_norm,
    torch.cat: _cat,
}
