"""Keep a denoiser the same map for the length of a solve, and cheap to call many times."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

CHANGING = (_NormBase, _DropoutNd, _SpectralNorm, nn.RReLU, nn.MultiheadAttention, nn.RNNBase)


def _legacy_spectral_norms(module: nn.Module) -> list[SpectralNorm]:
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, SpectralNorm)]


def _power_iteration(module: nn.Module) -> None:
    """Take the power iteration that one forward pass in training mode would take."""
    if isinstance(module, parametrize.ParametrizationList):
        if any(isinstance(p, _SpectralNorm) and p.training for p in module):
            module()
    elif module.training:
        for hook in _legacy_spectral_norms(module):
            hook.compute_weight(module, do_power_iteration=True)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Keep `module` one and the same map, whatever its training mode.

    A fixed point is defined only for a map that stays the same from call to call. Inside this context batch
    and instance normalisation use their running statistics, dropout is off, and spectral norms keep their
    estimate of the singular vectors; a spectral norm in training mode takes its one power iteration on entry.
    Only the `training` flags of those submodules are touched, and they are restored on exit; contexts nest.

    Args:
        module: The denoiser. A functional dropout that reads the flag of its own module is not seen.

    Example:
        >>> import torch
        >>> drop = torch.nn.Dropout(0.5)
        >>> with frozen(drop):
        ...     drop(torch.ones(3))
        tensor([1., 1., 1.])
        >>> drop.training
        True
    """
    with torch.no_grad():
        for submodule in module.modules():
            _power_iteration(submodule)
    switched = [
        submodule
        for submodule in module.modules()
        if submodule.training and (isinstance(submodule, CHANGING) or _legacy_spectral_norms(submodule))
    ]
    for submodule in switched:
        submodule.training = False
    try:
        yield
    finally:
        for submodule in switched:
            submodule.training = True


def folded() -> AbstractContextManager[None]:
    """Compute every parametrized weight once, at its first use inside the context, and keep it until its end.

    With spectral normalization this folds the norm into the weight once per solve instead of once per call.
    One context must not serve both a solve without gradients and a differentiable evaluation: the weight kept
    from the former has no graph, and the gradient would silently be lost. Open one for each.

    Returns:
        A context manager; in effect for all modules, as `torch.nn.utils.parametrize.cached` is.
    """
    context: AbstractContextManager[None] = parametrize.cached()
    return context
