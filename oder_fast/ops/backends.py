"""The backends of the operators: which are here, which one a call runs on, and why one is missing."""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
from collections.abc import Callable
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

BACKENDS = ("auto", "reference", "cpu", "cuda", "triton")
DTYPES = {
    "cpu": (torch.float32, torch.float64, torch.complex64, torch.complex128),
    "cuda": (torch.float32, torch.bfloat16, torch.float16, torch.complex64),
    "triton": (torch.float32, torch.bfloat16, torch.float16, torch.complex64),
}
# The codes that the compiled backends take; complex tensors reach them as pairs of reals.
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
# Best first; the baseline module also tells which of the others this processor can run.
CPU_ISAS = ("avx512", "avx2", "baseline")


class BackendUnavailableError(RuntimeError):
    """A backend that was asked for by name is not here or cannot take these tensors."""


class _Compiled:
    """A compiled backend: passes tensors on as addresses, and the threads or the stream to run on."""

    def __init__(self, module: ModuleType, kind: str) -> None:
        self.module = module
        self.kind = kind

    def launch(self, name: str, like: Tensor, *args: Any) -> None:
        raw = [a.data_ptr() if isinstance(a, Tensor) else 0 if a is None else a for a in args]
        if self.kind == "cuda" and like.is_cuda:
            with torch.cuda.device(like.device):
                getattr(self.module, name)(*raw, torch.cuda.current_stream().cuda_stream)
        else:
            getattr(self.module, name)(*raw, torch.get_num_threads() if self.kind == "cpu" else 0)


class _Triton:
    """The Triton backend: its launchers take the tensors themselves."""

    def __init__(self) -> None:
        self.functions: dict[str, Callable[..., None]] = {}

    def launch(self, name: str, like: Tensor, *args: Any) -> None:
        if not self.functions:  # importing triton takes longer than all the rest
            for module in pkgutil.iter_modules(importlib.import_module("oder_fast.kernels").__path__):
                self.functions |= vars(importlib.import_module(f"oder_fast.kernels.{module.name}"))
        if like.is_cuda:
            with torch.cuda.device(like.device):
                self.functions[name](*args)
        else:
            self.functions[name](*args)


Backend = _Compiled | _Triton


def _import(name: str, absent: str) -> ModuleType | str:
    """Return the module; `absent` where there is none; the reason where it is there and cannot be loaded."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return absent
    except ImportError as error:
        return f"the module {name} cannot be loaded: {error}"


def _load_cpu() -> Backend | str:
    baseline = _import(
        "oder_fast._cpu_baseline",
        "the C++ kernels were not built; oder_fast.build_info() says why; "
        "reinstall with a C++17 compiler on the PATH and without ODER_FAST_CPU=0",
    )
    if isinstance(baseline, str):
        return baseline
    isa = next(isa for isa in CPU_ISAS if isa in baseline.supported_isas())
    return _Compiled(importlib.import_module(f"oder_fast._cpu_{isa}"), "cpu")


def _load_cuda() -> Backend | str:
    module = _import(
        "oder_fast._cuda",
        "the CUDA kernels were not built; oder_fast.build_info() says why, "
        "and ODER_FAST_CUDA=1 at install insists on them",
    )
    if isinstance(module, str):
        return module
    return _Compiled(module, "cuda")


def _find_triton() -> Backend | str:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return _Triton()


_FORCED: list[ModuleType] = []
# Found at import, so that choosing a backend is a look into a table that torch.compile can trace.
_BACKENDS: dict[str, Backend | str] = {"cpu": _load_cpu(), "cuda": _load_cuda(), "triton": _find_triton()}


def _reason_against(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the backend cannot take such tensors; None where it can."""
    found = _BACKENDS[backend]
    if isinstance(found, str):
        return found
    if dtype not in DTYPES[backend]:
        return f"it has no kernel for {dtype}"
    if backend == "cpu" and device.type != "cpu":
        return f"it takes CPU tensors, got {device}"
    if backend == "cuda" and device.type != "cuda" and not _FORCED:
        return f"it takes CUDA tensors, got {device}"
    if backend == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it takes CUDA tensors (CPU tensors only with TRITON_INTERPRET=1), got {device}"
    return None


def named(backend: str) -> Backend:
    """Return a backend that `resolve` has named."""
    found = _BACKENDS[backend]
    if isinstance(found, str):
        raise BackendUnavailableError(f"backend {backend!r} is not available: {found}")
    return found


def launch(name: str, like: Tensor, backend: str, *args: Any) -> None:
    """Launch a kernel on the device of a tensor, for its dtype or that of its real part."""
    named(backend).launch(name, like, DTYPE_CODES[like.real.dtype], *args)


def resolve(
    backend: str, device: torch.device, dtype: torch.dtype, has: tuple[str, ...] = BACKENDS[2:]
) -> str:
    """Return the backend to run on: the named one, or the fastest that is here.

    Args:
        backend: One of `BACKENDS`; ``"auto"`` obeys the environment variable ``ODER_FAST_BACKEND``, unless that names
            a backend which the operator does not have.
        device: Where the tensors are.
        dtype: Of the image.
        has: Backends of the operator besides the reference.

    Raises:
        BackendUnavailableError: If the named backend is missing or cannot take such tensors.
        ValueError: If the name is none of `BACKENDS`.
    """
    if backend == "auto":
        backend = os.environ.get("ODER_FAST_BACKEND", "auto")
        if backend in BACKENDS[2:] and backend not in has:
            backend = "auto"
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "reference":
        return backend
    if backend != "auto":
        reason = (
            _reason_against(backend, device, dtype) if backend in has else "the operator has no such backend"
        )
        if reason is not None:
            raise BackendUnavailableError(f"backend {backend!r} is not available: {reason}")
        return backend
    for candidate in ("cpu",) if device.type == "cpu" else ("cuda", "triton"):
        if candidate in has and _reason_against(candidate, device, dtype) is None:
            return candidate
    return "reference"


def available() -> dict[str, str]:
    """Return, for each backend, ``"available"`` or the reason why it is not."""
    result = {"reference": "available"}
    for backend in ("cpu", "cuda", "triton"):
        found = _BACKENDS[backend]
        result[backend] = found if isinstance(found, str) else "available"
    if result["cuda"] == "available" and not torch.cuda.is_available():
        result["cuda"] = "built, but torch sees no CUDA device"
    return result


def cpu_isa() -> str | None:
    """Return the instruction set that the C++ backend runs on."""
    found = _BACKENDS["cpu"]
    return found.module.__name__.rpartition("_cpu_")[2] if isinstance(found, _Compiled) else None


@contextmanager
def use_module(backend: str, module: ModuleType) -> Iterator[None]:
    """Run a compiled backend on another module: another instruction set, or CUDA kernels built for the host."""
    before = _BACKENDS[backend]
    _BACKENDS[backend] = _Compiled(module, backend)
    _FORCED.append(module)
    try:
        yield
    finally:
        _BACKENDS[backend] = before
        _FORCED.pop()
