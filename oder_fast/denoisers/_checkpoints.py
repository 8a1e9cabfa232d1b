"""Loading of weights that others saved, all of them or none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def load_fitting(
    module: nn.Module,
    state: Mapping[str, Any],
    first: str,
    names: Mapping[str, str] | None = None,
    keep: tuple[str, ...] = (),
) -> None:
    """Load a state dict of the same network whose keys carry a prefix or end in other names.

    Args:
        module: The network.
        state: The state dict.
        first: What a key of the network begins with; what precedes it in `state` is the prefix.
        names: Last part of a key in `state`, and of the module's own.
        keep: Keys of the module that are none of the network's weights; they keep their values.

    Raises:
        ValueError: Where a key is missing, unexpected or of another shape; names each, loads nothing.
    """
    names = names or {}
    found = next((key for key in state if first in key), first)
    prefix = found[: found.index(first)]
    expected = {key: value for key, value in module.state_dict().items() if key not in keep}
    renamed = {}
    problems = []
    for key, value in state.items():
        owner, dot, name = key.removeprefix(prefix).rpartition(".")
        new_key = f"{owner}{dot}{names.get(name, name)}"
        if not key.startswith(prefix) or new_key not in expected:
            problems.append(f"unexpected {key}")
        elif not isinstance(value, Tensor):
            problems.append(f"{key} is no tensor but {type(value).__name__}")
        elif value.shape != expected[new_key].shape:
            problems.append(f"{key} has shape {tuple(value.shape)}, not {tuple(expected[new_key].shape)}")
        renamed[new_key] = value
    problems += [f"missing {key}" for key in expected if key not in renamed]
    if problems:
        raise ValueError(f"{type(module).__name__}: the checkpoint does not fit: " + "; ".join(problems))
    module.load_state_dict(renamed, strict=not keep)
