"""The denoiser and the fixed point that a configuration describes, and those of a checkpoint."""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..denoisers import KINDS, UNet, frozen
from ..denoisers.call import memory_format
from ..deqred import DEQRED
from ..fixed_point import (
    Anderson,
    Implicit,
    JacobianFree,
    Nesterov,
    NotConvergedWarning,
    Picard,
    Solution,
    Solver,
    Unrolled,
)
from ..fixed_point.differentiation import ADJOINT_SOLVER
from ..red import GradientStep, ProximalStep
from . import configuration as settings
from .checkpoints import CheckpointError, configuration_of, load_checkpoint, read_tensors
from .configuration import Configuration, ConfigurationError
from .scans import Measured, Scan, make_scan

OWN = "own"
"""Kind of a denoiser that was given to `Trainer` as a module."""

SETTLING = 8
"""Power iterations of spectral norms on averaged weights."""

SOLVERS: dict[str, type[Solver[Any]]] = {"nesterov": Nesterov, "picard": Picard, "anderson": Anderson}


def make_denoiser(section: settings.DenoiserSection, channels: int) -> nn.Module:
    """Build the denoiser that the configuration names.

    Args:
        section: Its part of the configuration.
        channels: Of the images; given to the class as `in_channels` where it takes that.

    Raises:
        ConfigurationError: For a kind, class or option that is not known, or weights that do not fit.
    """
    kind = KINDS.get(section.kind) or _import_class(section.kind)
    known = inspect.signature(kind).parameters
    options = dict(section.options)
    if "in_channels" in known:
        options.setdefault("in_channels", channels)
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values())
    for name in options:
        if name not in known and not takes_any:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]}?" if near else f"; it has: {', '.join(known)}"
            raise ConfigurationError(f"denoiser.options: {kind.__name__} has no option {name}{hint}")
    try:
        denoiser = kind(**options)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"denoiser.options: {error}") from error
    if section.weights is not None:
        _load_weights(denoiser, section.weights)
    return denoiser


def _import_class(kind: str) -> type[nn.Module]:
    module, colon, name = kind.partition(":")
    if not colon:
        near = difflib.get_close_matches(kind, KINDS, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigurationError(
            f"denoiser.kind: must be one of {', '.join(KINDS)}, or the class module:Name, got {kind!r}{hint}"
        )
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ConfigurationError(
            f"denoiser.kind: cannot import {kind!r}: {error}; a module in the working folder is found with PYTHONPATH=."
        ) from error
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ConfigurationError(f"denoiser.kind: {kind!r} is no class of torch.nn.Module")
    return found


def _load_weights(denoiser: nn.Module, file: str) -> None:
    """Load a plain `state_dict`, that of a run, of the demo, or of the official code."""
    path = Path(file)
    try:
        saved = read_tensors(path)
    except OSError as error:
        raise ConfigurationError(f"denoiser.weights: cannot read {path}: {error.strerror}") from error
    except CheckpointError as error:
        raise ConfigurationError(f"denoiser.weights: {error}") from error
    if isinstance(saved, dict) and "configuration" in saved:
        whole = averaged_weights(load_checkpoint(path))
        saved = {k.removeprefix("denoiser."): v for k, v in whole.items() if k.startswith("denoiser.")}
    elif isinstance(saved, dict) and "state_dict" in saved:
        saved = saved["state_dict"]
    elif (
        isinstance(denoiser, UNet)
        and isinstance(saved, dict)
        and all(isinstance(name, str) for name in saved)
        and not set(saved) & set(denoiser.state_dict())
    ):
        try:
            denoiser.load_official_state_dict(saved)
        except ValueError as error:
            raise ConfigurationError(f"denoiser.weights: {path}: {error}") from error
        return
    problem = misfit(denoiser.state_dict(), saved)
    if problem:
        raise ConfigurationError(
            f"denoiser.weights: {path} does not fit {type(denoiser).__name__}: {problem}"
        )
    denoiser.load_state_dict(saved)


def misfit(wanted: Mapping[str, Tensor], weights: Any) -> str:
    """Return in a few words why weights do not fit those that are wanted; nothing where they do."""
    if not isinstance(weights, Mapping):
        return f"it holds a {type(weights).__name__}, not weights by name"
    missing = [name for name in wanted if name not in weights]
    unknown = [name for name in weights if name not in wanted]
    problems = [
        f"{len(names)} {what} ({', '.join(map(str, names[:2]))}{', ...' if len(names) > 2 else ''})"
        for names, what in ((missing, "weights missing"), (unknown, "unknown"))
        if names
    ]
    for name in wanted.keys() & weights.keys():
        there = weights[name]
        if not _is_plain(there):
            problems.append(f"{name} is no dense tensor")
        elif there.shape != wanted[name].shape:
            problems.append(f"{name} is {tuple(there.shape)}, not {tuple(wanted[name].shape)}")
        elif there.is_complex() and not wanted[name].is_complex():
            problems.append(f"{name} is complex")
        else:
            continue
        break
    return "; ".join(problems)


def _is_plain(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and not (value.is_nested or value.is_quantized or value.is_meta)
    )


class TrainedTau(DEQRED):
    r"""`DEQRED` with a trained :math:`\tau`, kept above 0 by its logarithm."""

    @property
    def tau(self) -> Tensor:
        r"""The prior's weight, in units of :math:`\|A\|^2`."""
        return self.log_tau.exp()

    @tau.setter
    def tau(self, value: float | Tensor) -> None:
        self.log_tau = nn.Parameter(torch.tensor(math.log(value)))


def make_model(denoiser: nn.Module, section: settings.RED, nonnegative: bool) -> DEQRED:
    """Build the fixed point that the configuration describes, for images in the denoiser's unit.

    Args:
        denoiser: Module from ``(B, C, H, W)`` to the same; brought to the memory layout that it is fast in.
        section: Its part of the configuration.
        nonnegative: Whether images are kept at 0 or above where the section does not say.
    """
    layout = memory_format(denoiser)
    if layout is not None:
        denoiser.to(memory_format=layout)  # type: ignore[call-overload]
    step: ProximalStep | GradientStep = ProximalStep(section.minibatch_size)
    if section.step == "gradient":
        reduced = section.variance_reduction is not False
        step = GradientStep(section.step_size, section.minibatch_size, reduced)
    kind = TrainedTau if section.train_tau else DEQRED
    model = kind(
        denoiser,
        tau=section.tau,
        step=step,
        solver=None if section.solver is None else SOLVERS[section.solver](),
        nonnegative=nonnegative if section.nonnegative is None else section.nonnegative,
        normalize=False,
    )
    model.solver = _limited(model.solver, section.max_iterations, section.tolerance)
    if section.differentiation == "jacobian_free":
        model.differentiation = JacobianFree()
    elif section.differentiation == "unrolled":
        model.differentiation = Unrolled()
    elif section.adjoint_iterations is not None or section.adjoint_tolerance is not None:
        stochastic = isinstance(step, GradientStep) and step.minibatch_size is not None
        adjoint = model.solver if stochastic else ADJOINT_SOLVER
        adjoint = _limited(adjoint, section.adjoint_iterations, section.adjoint_tolerance)
        model.differentiation = Implicit(adjoint)
    return model


def _limited(solver: Solver[Any], max_iterations: int | None, tolerance: float | None) -> Solver[Any]:
    return replace(
        solver,
        max_iterations=max_iterations or solver.max_iterations,
        tolerance=tolerance or solver.tolerance,
    )


def solve(model: DEQRED, measured: Measured, generator: torch.Generator) -> Solution:
    """Solve for what was measured, without warnings: how far a solve came stands in the solution.

    Args:
        model: The fixed point.
        measured: Of one or several images.
        generator: Of the minibatches.

    Raises:
        DivergenceError: Where the solves of all images diverge.
    """
    step, most = model.step, measured.operator.n_blocks
    model.generator = generator
    if step.minibatch_size is not None and step.minibatch_size > most:
        # Scans of fewer coils.
        model.step = replace(step, minibatch_size=most)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotConvergedWarning)
            solution: Solution = model(measured.data, measured.operator, return_solution=True)
    finally:
        model.step = step
    return solution


def autocast(stage: settings.Stage, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context in which the denoiser computes in the precision of a stage."""
    return nullcontext() if stage.precision == "float32" else torch.autocast(device.type, torch.bfloat16)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load averaged weights, and let spectral norms settle on them: their vectors are those of the last step's.

    Raises:
        RuntimeError: Where they do not fit.
    """
    model.load_state_dict(weights)
    training = model.training
    model.train()
    for _ in range(SETTLING):
        # Each entry takes one power iteration.
        with frozen(model):
            pass
    model.train(training)


def averaged_weights(state: dict[str, Any]) -> dict[str, Tensor]:
    """Return the weights of a checkpoint to reconstruct with: the moving average where there is one."""
    weights: dict[str, Tensor] = {**state["model"], **(state["ema"] or {})}
    return weights


def load_model(
    path: str | Path, denoiser: nn.Module | str | None = None
) -> tuple[DEQRED, Scan, Configuration, dict[str, Any]]:
    """Return what a checkpoint of `oder-fast train` reconstructs with.

    A checkpoint imports nothing: only the denoisers of this package are built from its name for them.

    Args:
        path: The checkpoint, such as ``best.pt`` in the run's folder.
        denoiser: Where the denoiser is not of this package: the class ``"module:Name"`` that the run's configuration
            named, which is imported; or a module of the same architecture, whose weights are replaced.

    Returns:
        The model in evaluation mode, the scan, the configuration, and the checkpoint's other contents.

    Raises:
        OSError: Where the file is missing.
        CheckpointError: For a damaged file, or one that asks for more memory than it stores.
        ConfigurationError: For a denoiser that cannot be built here, or weights of another architecture.
    """
    path = Path(path)
    state = load_checkpoint(path)
    configuration = configuration_of(state, path)
    scan = make_scan(configuration.operator)
    try:
        scan.check(tuple(state["image_shape"]), scan.is_complex)
    except ValueError as error:
        raise CheckpointError(f"{path}: image_shape: {error}") from error
    if not isinstance(denoiser, nn.Module):
        denoiser = _own_denoiser(path, configuration.denoiser, scan.channels, denoiser)
    model = make_model(denoiser, configuration.red, scan.nonnegative)
    problem = misfit(model.state_dict(), averaged_weights(state))
    if problem:
        raise ConfigurationError(f"{path}: its weights do not fit the denoiser: {problem}")
    load_weights(model, averaged_weights(state))
    return model.eval(), scan, configuration, state


def _own_denoiser(
    path: Path, section: settings.DenoiserSection, channels: int, named: str | None
) -> nn.Module:
    """Return a checkpoint's denoiser, without its weights; the class of a user's own where it is named."""
    # The weights come from the checkpoint.
    section = section.model_copy(update={"weights": None})
    if section.kind in KINDS and named is None:
        _require_stored(path, section, channels)
    elif named is None and section.kind == OWN:
        raise ConfigurationError(
            f"{path}: its denoiser is a module that Trainer was given; give load_model one of the same architecture, "
            "or name the class to import (--denoiser module:Name)"
        )
    elif named is None:
        raise ConfigurationError(
            f"{path}: its denoiser, {section.kind}, is not of this package, and a checkpoint imports nothing; name the "
            f"class to import it (--denoiser {section.kind}), or give load_model a module"
        )
    elif section.kind not in (OWN, named):
        raise ConfigurationError(f"{path}: its denoiser is {section.kind!r}, not {named!r}")
    else:
        section = section.model_copy(update={"kind": named})
    return make_denoiser(section, channels)


def _require_stored(path: Path, section: settings.DenoiserSection, channels: int) -> None:
    """Check that a file is as large as the weights that its configuration asks for."""
    options = section.options
    if "spectral_norm" in inspect.signature(KINDS[section.kind]).parameters:
        # Its vectors are small against the weights, and take time.
        options = options | {"spectral_norm": False}
    with torch.device("meta"):
        bare = make_denoiser(section.model_copy(update={"options": options}), channels)
    size = sum(p.numel() * p.element_size() for p in bare.parameters())
    if size > path.stat().st_size:
        raise CheckpointError(
            f"{path}: its configuration asks for a denoiser of {size / 2**20:.0f} MiB, which it does not store"
        )
