"""NumPy's numbers and arrays as arguments."""

from __future__ import annotations

import functools
import types
from typing import Any, TypeVar, cast

import numpy as np
import torch

T = TypeVar("T")
# torch has no wider numbers.
_NARROWED: dict[Any, Any] = {
    np.dtype(np.longdouble): np.dtype(np.float64),
    np.dtype(np.clongdouble): np.dtype(np.complex128),
}


def from_numpy(value: Any) -> Any:
    """Return a tensor for an array, a number of Python's for one of NumPy's or an array of no axes, else the value.

    An array of any strides, byte order or alignment is copied, also from lists and tuples. What is no number stays as
    it is, and so do masked arrays, whose mask would be lost.
    """
    if type(value) in (list, tuple):
        return type(value)(map(from_numpy, value))
    if not isinstance(value, (np.ndarray, np.generic)) or isinstance(value, np.ma.MaskedArray):
        return value
    if value.dtype.kind not in "biufc":
        return value
    dtype = value.dtype.newbyteorder("=")
    array = np.array(value, _NARROWED.get(dtype, dtype), order="C")
    return torch.from_numpy(array) if value.ndim else array.item()


def takes_numpy(thing: T) -> T:
    """Let a function, or the constructor and all public methods of a class, take NumPy's numbers and arrays."""
    if isinstance(thing, type):
        for name, method in list(vars(thing).items()):
            if isinstance(method, types.FunctionType) and (name == "__init__" or not name.startswith("_")):
                setattr(thing, name, takes_numpy(method))
        return thing
    function: Any = thing

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*map(from_numpy, args), **{name: from_numpy(v) for name, v in kwargs.items()})

    return cast("T", call)
