"""Keep a denoiser the same map for the length of a solve, and cheap to call many times."""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

CHANGING = (_NormBase, _DropoutNd, _SpectralNorm, nn.RReLU, nn.MultiheadAttention, nn.RNNBase)
# Hooks that compute a weight before each call and set it in the module.
WEIGHTS = (SpectralNorm, WeightNorm, BasePruningMethod)

# What holds no modules, and is met often.
PLAIN = (type(None), bool, int, float, str, type, Tensor, nn.Parameter)

D = TypeVar("D", bound=Callable[..., Any])


@contextmanager
def frozen(denoiser: D) -> Iterator[D]:
    """Give a denoiser that stays one and the same map, whatever its training mode and whoever else uses it.

    A fixed point is defined only for a map that stays the same from call to call. In the denoiser given, batch and
    instance normalization use their running statistics, dropout is off, and each weight that is computed from
    others, as by a spectral norm, is computed once, on entry. A spectral norm in training mode takes its one power
    iteration before that.

    What is given is a shallow copy: its modules are new, with the parameters, buffers and hooks of the old ones,
    which stay as they are. So several threads can solve with one denoiser. Computed weights carry the graph to their
    parameters if gradients are recorded on entry. The copy may be kept and called after the context, as backward
    passes do. Attributes that a module sets in itself meanwhile are set in the denoiser at the end of the context. A
    denoiser in which nothing has to be frozen is given itself.

    Args:
        denoiser: Module, or a callable that holds modules: a partial, a method, a function by its closure, another
            object by its attributes. Modules in global variables are not seen, and neither is a functional dropout
            that reads the flag of its own module.

    Yields:
        The denoiser to call.

    Example:
        >>> import torch
        >>> drop = torch.nn.Dropout(0.5)
        >>> with frozen(drop) as same:
        ...     same(torch.ones(3))
        tensor([1., 1., 1.])
        >>> drop.training
        True
    """
    copies = _Copies()
    frozen_denoiser = cast("D", copies.of(denoiser))
    if not copies.differ():
        yield denoiser
        return
    copies.freeze()
    try:
        yield frozen_denoiser
    finally:
        copies.write_back()


class _Copies:
    """Shallow copies of all modules that a denoiser is made of, those first that others are made of."""

    def __init__(self) -> None:
        self.pairs: list[tuple[Any, Any]] = []
        self.given: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self.substitution = _Substitution(self._of_module)

    def of(self, denoiser: Callable[..., Any]) -> Callable[..., Any]:
        """Return a denoiser made of copies."""
        owner = denoiser.__self__ if isinstance(denoiser, types.MethodType) else denoiser
        plain = type(owner).__new__ is object.__new__ and hasattr(owner, "__dict__")
        if plain and not isinstance(owner, nn.Module):
            self._of_object(owner, type(owner))
        return cast("Callable[..., Any]", self.substitution(denoiser))

    def _of_module(self, module: nn.Module) -> Any:
        if isinstance(module, torch.jit.ScriptModule):
            # In C++, and without anything that is frozen here.
            return module
        parametrized = parametrize.is_parametrized(module)
        return self._of_object(
            module, parametrize.type_before_parametrizations(module) if parametrized else type(module)
        )

    def _of_object(self, original: Any, kind: type) -> Any:
        duplicate: Any = object.__new__(kind)
        self.substitution.known[id(original)] = duplicate
        attributes = dict(vars(original))
        vars(duplicate).update((name, self.substitution(value)) for name, value in attributes.items())
        if isinstance(original, nn.Module):
            vars(duplicate)["_modules"] = dict(duplicate._modules)
        self.pairs.append((original, duplicate))
        return duplicate

    def _modules(self) -> list[tuple[nn.Module, Any]]:
        return [pair for pair in self.pairs if isinstance(pair[0], nn.Module)]

    def differ(self) -> bool:
        """Whether any module has, or would have in training mode, to differ from its original."""
        return any(
            parametrize.is_parametrized(module) or weight_hooks(module) or isinstance(module, CHANGING)
            for module, _ in self._modules()
        )

    def freeze(self) -> None:
        """Switch off what changes the map, and compute weights."""
        with torch.no_grad():
            for module, _ in self._modules():
                _power_iteration(module)
        for module, duplicate in self._modules():
            if isinstance(module, CHANGING) or weight_hooks(module):
                vars(duplicate)["training"] = False
        for module, duplicate in self._modules():
            if parametrize.is_parametrized(module):
                weights = {
                    name: weight() for name, weight in duplicate._modules.pop("parametrizations").items()
                }
                vars(duplicate)["_parameters"] = {**duplicate._parameters, **weights}
            if weight_hooks(module):
                hooks = duplicate._forward_pre_hooks
                vars(duplicate)["_forward_pre_hooks"] = type(hooks)(
                    (key, hook) for key, hook in hooks.items() if not isinstance(hook, WEIGHTS)
                )
                for hook in weight_hooks(module):
                    hook(duplicate, ())
        self.given = [(dict(vars(d)), dict(vars(d).get("_modules", {}))) for _, d in self.pairs]

    def write_back(self) -> None:
        """Set in the originals what has been set in the copies."""
        back = _Substitution(lambda module: module)
        back.known.update((id(duplicate), original) for original, duplicate in self.pairs)
        for (original, duplicate), (attributes, children) in zip(self.pairs, self.given, strict=True):
            _carry_over(attributes, vars(duplicate), vars(original), back)
            if isinstance(original, nn.Module):
                _carry_over(children, duplicate._modules, original._modules, back)


def _carry_over(
    before: dict[str, Any], now: dict[str, Any], target: dict[str, Any], back: _Substitution
) -> None:
    """Do to a dictionary what turned `before` into `now`."""
    for name in before.keys() - now.keys():
        target.pop(name, None)
    for name, value in now.items():
        if name not in before or value is not before[name]:
            target[name] = back(value)


class _Substitution:
    """Put other modules in the place of those that a value holds; a value that holds none is returned itself.

    Looks into containers, weak references, partials, methods, and the closures and defaults of functions.

    Args:
        module: Returns what takes the place of a module that is met first.
    """

    def __init__(self, module: Callable[[nn.Module], Any]) -> None:
        self.module = module
        self.known: dict[int, Any] = {}

    def __call__(self, value: Any) -> Any:
        """Return the value with its modules replaced."""
        if type(value) in PLAIN or (isinstance(value, dict) and not value):
            return value
        if id(value) not in self.known:
            # Holds until more is known: values may hold themselves.
            self.known[id(value)] = value
            self.known[id(value)] = (
                self.module(value) if isinstance(value, nn.Module) else self._rebuilt(value)
            )
        return self.known[id(value)]

    def _rebuilt(self, value: Any) -> Any:
        parts, build = _taken_apart(value)
        replaced = [self(part) for part in parts]
        same = all(new is old for new, old in zip(replaced, parts, strict=True))
        return value if same else build(replaced)


def _taken_apart(value: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """Return what a value holds, and how to make another one from other parts."""
    if isinstance(value, dict):
        parts = [part for item in list(value.items()) for part in item]
        return parts, lambda new: _refilled(value, "update", zip(new[::2], new[1::2], strict=True))
    if isinstance(value, tuple):
        return list(value), getattr(value, "_make", type(value))
    if isinstance(value, (list, deque)):
        return list(value), lambda new: _refilled(value, "extend", new)
    if isinstance(value, set):
        return list(value), lambda new: _refilled(value, "update", new)
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords], lambda new: type(value)(new[0], *new[1], **new[2])
    if isinstance(value, types.MethodType):
        return [value.__func__, value.__self__], lambda new: types.MethodType(*new)
    if isinstance(value, weakref.ref):
        return [value()], lambda new: weakref.ref(*new)
    if isinstance(value, types.FunctionType):
        closure = [_content(cell) for cell in value.__closure__ or ()]
        return [value.__defaults__, value.__kwdefaults__, *closure], lambda new: _function(value, *new)
    return [], lambda new: value


def _refilled(container: Any, method: str, contents: Iterable[Any]) -> Any:
    other = copy.copy(container)
    other.clear()
    getattr(other, method)(contents)
    return other


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        # Not assigned yet.
        return None


def _function(
    function: types.FunctionType,
    defaults: tuple[Any, ...] | None,
    keywords: dict[str, Any] | None,
    *closure: Any,
) -> types.FunctionType:
    # A cell that stays the same is shared: functions may assign to it.
    cells = tuple(
        cell if new is _content(cell) else types.CellType(new)
        for cell, new in zip(function.__closure__ or (), closure, strict=True)
    )
    other = types.FunctionType(function.__code__, function.__globals__, function.__name__, defaults, cells)
    other.__kwdefaults__, other.__qualname__ = keywords, function.__qualname__
    other.__dict__.update(function.__dict__)
    return other


def weight_hooks(module: nn.Module) -> list[Callable[[nn.Module, Any], None]]:
    """Return the hooks of a module that compute a weight before each call."""
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, WEIGHTS)]


def _power_iteration(module: nn.Module) -> None:
    """Take the power iteration that one forward pass in training mode would take."""
    if isinstance(module, parametrize.ParametrizationList):
        if any(isinstance(p, _SpectralNorm) and p.training for p in module):
            module()
    elif module.training:
        for hook in weight_hooks(module):
            if isinstance(hook, SpectralNorm):
                hook.compute_weight(module, do_power_iteration=True)
