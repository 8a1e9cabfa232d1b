"""Keep a denoiser the same map for the length of a solve, and cheap to call many times."""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.lazy import LazyModuleMixin
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
    originals = _held(denoiser)
    modules = [module for module in originals if isinstance(module, nn.Module)]
    if not any(_parametrized(m) or _weight_hooks(m) or isinstance(m, CHANGING) for m in modules):
        yield denoiser
        return
    with torch.no_grad():
        for module in modules:
            _power_iteration(module)
    copies = _copied(originals)
    for module in modules:
        _settle(module, copies[id(module)])
    given = {key: (dict(vars(c)), dict(vars(c).get("_modules", {}))) for key, c in copies.items()}
    try:
        yield _Substitution(copies)(denoiser)
    finally:
        back = {id(copies[id(original)]): original for original in originals}
        for original in originals:
            attributes, children = given[id(original)]
            _carry_over(attributes, vars(copies[id(original)]), vars(original), back)
            if isinstance(original, nn.Module):
                _carry_over(children, copies[id(original)]._modules, original._modules, back)


def _held(denoiser: Callable[..., Any]) -> list[Any]:
    """Return the modules that a denoiser is made of, those first that others are made of, and the object it is."""
    held: list[Any] = []
    # By their ids, which are their own while they live.
    seen: dict[int, Any] = {}
    owner = denoiser.__self__ if isinstance(denoiser, types.MethodType) else denoiser

    def visit(value: Any) -> None:
        if type(value) in PLAIN or id(value) in seen:
            return
        seen[id(value)] = value
        if isinstance(value, nn.Module):
            # A scripted module is in C++, and holds nothing that is frozen here; a lazy one makes itself when called.
            if not isinstance(value, (torch.jit.ScriptModule, LazyModuleMixin)):
                # What hooks know beside the submodules is no part of the denoiser.
                for name, attribute in dict(vars(value)).items():
                    if not name.endswith("_hooks"):
                        visit(attribute)
                held.append(value)
        elif value is owner and type(value).__new__ is object.__new__ and hasattr(value, "__dict__"):
            visit(dict(vars(value)))
            held.append(value)
        else:
            for part in _taken_apart(value)[0]:
                visit(part)

    visit(denoiser)
    return held


def _copied(originals: list[Any]) -> dict[int, Any]:
    """Return shallow copies by the originals' ids, each made of the others."""
    # Parametrized weights are properties of a class that was made for the module; in the copy they are tensors.
    kinds = [
        type(o).__base__ if isinstance(o, nn.Module) and _parametrized(o) else type(o) for o in originals
    ]
    copies: dict[int, Any] = {
        id(o): object.__new__(cast("type", kind)) for o, kind in zip(originals, kinds, strict=True)
    }
    substitution = _Substitution(copies)
    for original in originals:
        attributes = vars(copies[id(original)])
        attributes.update((name, substitution(value)) for name, value in dict(vars(original)).items())
        if isinstance(original, nn.Module):
            attributes["_modules"] = dict(attributes["_modules"])
    return copies


def _settle(module: nn.Module, duplicate: Any) -> None:
    """Switch off in the copy of a module what changes the map, and compute its weights."""
    hooks = _weight_hooks(module)
    if isinstance(module, CHANGING) or hooks:
        vars(duplicate)["training"] = False
    if names := _parametrized(module):
        weights = {name: duplicate.parametrizations[name]() for name in names}
        vars(duplicate)["_parameters"] = {**duplicate._parameters, **weights}
    if hooks:
        others = [(key, hook) for key, hook in duplicate._forward_pre_hooks.items() if hook not in hooks]
        vars(duplicate)["_forward_pre_hooks"] = OrderedDict(others)
        # Later power iterations write into the vectors that the weight's graph keeps.
        buffers = duplicate._buffers.items()
        vars(duplicate)["_buffers"] = {name: None if b is None else b.clone() for name, b in buffers}
        for hook in hooks:
            hook(duplicate, ())


def _carry_over(
    before: dict[str, Any], now: dict[str, Any], target: dict[str, Any], back: dict[int, Any]
) -> None:
    """Do to a dictionary of an original what turned its copy's from `before` into `now`."""
    for name in before.keys() - now.keys():
        target.pop(name, None)
    for name, value in now.items():
        if name not in before or value is not before[name]:
            target[name] = _Substitution(back)(value)


class _Substitution:
    """Put other objects in the place of those that a value holds; a value that holds none is returned itself.

    Looks into containers, weak references, partials, methods, and the closures and defaults of functions.

    Args:
        known: What takes the place of an object, by its id.
    """

    def __init__(self, known: dict[int, Any]) -> None:
        self.known = dict(known)
        # What has been met since: ids are its own while it lives.
        self.met: list[Any] = []

    def __call__(self, value: Any) -> Any:
        """Return the value with other objects in it."""
        if type(value) in PLAIN or (isinstance(value, dict) and not value):
            return value
        if id(value) not in self.known:
            self.met.append(value)
            # Holds until more is known: a value may hold itself.
            self.known[id(value)] = value
            self.known[id(value)] = self._rebuilt(value)
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


def _parametrized(module: nn.Module) -> list[str]:
    """Return the names of the weights that are computed by a parametrization whenever they are read."""
    if not parametrize.is_parametrized(module):
        return []
    names = cast("nn.ModuleDict", module.parametrizations)
    return [name for name in names if isinstance(getattr(type(module), name, None), property)]


def _weight_hooks(module: nn.Module) -> list[Callable[[nn.Module, Any], None]]:
    """Return the hooks of a module that compute a weight before each call."""
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, WEIGHTS)]


def _power_iteration(module: nn.Module) -> None:
    """Take the power iteration that one forward pass in training mode would take."""
    if isinstance(module, parametrize.ParametrizationList):
        if any(isinstance(p, _SpectralNorm) and p.training for p in module):
            module()
    elif module.training:
        for hook in _weight_hooks(module):
            if isinstance(hook, SpectralNorm):
                hook.compute_weight(module, do_power_iteration=True)
