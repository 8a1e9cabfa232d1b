"""Layers of a network that are taken together where one kernel computes both."""

from __future__ import annotations

import math
import warnings
from contextlib import suppress

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as of_all

from ..ops import BackendUnavailableError, faces, group_norm_prelu
from ..ops.group_norm_prelu import FACES

# Numbers of an image's features from which one kernel is taken: by count the passes over memory that it saves then cost
# more than its launch. Of one image, so that no image's bits depend on how many others there are.
FEWEST = 2**21
# Why the kernel cannot be had on this machine, once that is known.
_broken: list[str] = []


class FusedSequential(nn.Sequential):
    """Call modules one after the other, `GroupNorm` followed by `PReLU` by `group_norm_prelu`.

    That is where there is a kernel for it and features are large: elsewhere, where a transform or forward-mode
    derivatives ask for torch's functions, under torch.compile, which fuses by itself, and where one of the two carries
    hooks or was replaced, each module is called as `torch.nn.Sequential` does.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return what the last module makes of the input."""
        modules, compiling = list(self), torch.compiler.is_compiling()
        while modules:
            module, *modules = modules
            following = modules[0] if modules else None
            if (
                not compiling
                and isinstance(module, nn.GroupNorm)
                and isinstance(following, nn.PReLU)
                and _is_just(module, nn.GroupNorm)
                and _is_just(following, nn.PReLU)
                and _has_kernel(input)
            ):
                input = _group_norm_prelu(module, following, input)
                modules = modules[1:]
            else:
                input = module(input)
        return input


def _group_norm_prelu(norm: nn.GroupNorm, prelu: nn.PReLU, features: Tensor) -> Tensor:
    """Call the operator; where Triton is installed and cannot compile, the two modules from then on."""
    try:
        return group_norm_prelu(features, norm.num_groups, norm.weight, norm.bias, prelu.weight, norm.eps)
    except (TypeError, ValueError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        said, *_ = str(error).strip().splitlines() or [type(error).__name__]
        _broken.append(said)
        warnings.warn(
            f"group_norm_prelu: {said}; the U-Net takes torch's own two layers instead", stacklevel=2
        )
        result: Tensor = prelu(norm(features))
        return result


def _is_just(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling the module is `kind`'s forward and nothing else."""
    return (
        type(module) is kind
        and "forward" not in vars(module)
        and not any(getattr(module, name) for name in HOOKS)
        and not any(getattr(of_all, f"_global{name}") for name in HOOKS)
    )


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _has_kernel(features: Tensor) -> bool:
    if (
        _broken
        or type(features) is not Tensor
        or features.ndim != 4
        or math.prod(features.shape[1:]) < FEWEST
    ):
        return False
    if torch._C._get_tracing_state() is not None:
        return False
    if forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    with suppress(BackendUnavailableError):
        return faces.resolve("auto", features.device, features.dtype, FACES) != "reference"
    return False
