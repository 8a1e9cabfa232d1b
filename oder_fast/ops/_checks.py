"""Checks of arguments: each message names the operator, the argument, the rule and what arrived."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd import forward_ad


def tensor(op: str, name: str, value: object, *, ndim: int | None = None) -> None:
    """Check that `value` is a dense tensor, of `ndim` dimensions where given."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be a dense tensor, got {value.layout}")
    if ndim is not None and value.ndim != ndim:
        raise ValueError(f"{op}: {name} must have {ndim} dimensions, got shape {tuple(value.shape)}")


def constant(op: str, name: str, value: Tensor) -> None:
    """Refuse a tangent in what has no derivative: torch would take it for zero."""
    # To ask each tensor costs more than a small operator.
    if (
        forward_ad._current_level >= 0
        and not torch.compiler.is_compiling()
        and forward_ad.unpack_dual(value, level=0).tangent is not None
    ):
        raise RuntimeError(f"{op}: {name} has no derivative; detach it")


def fixed(op: str, name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    """Check that a tensor that is not differentiable is on the device of another."""
    if value.requires_grad:
        raise ValueError(f"{op}: {name} is not differentiable; detach it")
    if value.device != like.device:
        raise ValueError(
            f"{op}: {name} must be on the device of {like_name} ({like.device}), got {value.device}"
        )


def floating(op: str, name: str, value: Tensor, *, allow_complex: bool = False) -> None:
    """Check for a floating-point dtype, or a complex one where allowed."""
    if not (value.is_floating_point() or (allow_complex and value.is_complex())):
        kind = "floating-point or complex" if allow_complex else "floating-point"
        raise TypeError(f"{op}: {name} must be {kind}, got {value.dtype}")


def same(op: str, name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Check that two tensors share dtype and device."""
    if value.dtype != other.dtype:
        raise TypeError(
            f"{op}: {name} must have the dtype of {other_name} ({other.dtype}), got {value.dtype}"
        )
    if value.device != other.device:
        raise ValueError(
            f"{op}: {name} must be on the device of {other_name} ({other.device}), got {value.device}"
        )


def shape(op: str, name: str, value: Tensor, expected: tuple[int, ...], why: str) -> None:
    """Check the shape; `why` says where the expected one comes from."""
    if tuple(value.shape) != expected:
        raise ValueError(f"{op}: {name} must have shape {expected} ({why}), got {tuple(value.shape)}")


def positive(op: str, name: str, value: float) -> None:
    """Check for a finite number above zero."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{op}: {name} must be a finite number above 0, got {value}")


def index(op: str, name: str, value: Tensor, size: int, device: torch.device) -> None:
    """Check the type of an index tensor; its values too where that costs no synchronisation."""
    tensor(op, name, value, ndim=1)
    if value.dtype != torch.int64:
        raise TypeError(f"{op}: {name} must be int64, got {value.dtype}")
    if value.device != device:
        raise ValueError(f"{op}: {name} must be on {device}, got {value.device}")
    if value.shape[0] == 0:
        raise ValueError(f"{op}: {name} must not be empty")
    if value.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (int(v) for v in torch.aminmax(value))
        if low < 0 or high >= size:
            raise ValueError(f"{op}: {name} must lie in 0..{size - 1}, got {low if low < 0 else high}")
