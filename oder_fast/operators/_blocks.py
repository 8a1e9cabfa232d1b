"""What the operators share about minibatches of their blocks."""

from __future__ import annotations

import torch
from torch import Tensor


def check_size(operator: str, what: str, size: int, n: int) -> None:
    """Check the number of blocks of a minibatch."""
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"{operator}: the size of a minibatch must be an int, got {type(size).__name__}")
    if not 1 <= size <= n:
        raise ValueError(f"{operator}: a minibatch must have 1 to {n} {what}, got {size!r}")


def draw(n: int, size: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Draw blocks without replacement, each as likely as any other: sorted int64 indices on `device`."""
    source = device if generator is None else generator.device
    drawn = torch.randperm(n, generator=generator, device=source)[:size]
    return drawn.sort().values.to(device, non_blocking=True)


def expected_smoothness(n: int, size: int, norm_squared: float, largest: float) -> float:
    r"""Return what takes the place of :math:`\|A\|^2` in steps of minibatches drawn without replacement.

    .. math:: \frac{n (b - 1)}{b (n - 1)} \|A\|^2 + \frac{n - b}{b (n - 1)} n \max_i \|A_i\|^2

    Args:
        n: Number of blocks.
        size: Of them in a minibatch.
        norm_squared: Of all.
        largest: The largest norm squared of one block.

    References:
        Gower, Loizou, Qian, Sailanbayev, Shulgin, Richtarik, "SGD: general analysis and improved rates", ICML
        2019.
    """
    if size == n:
        return norm_squared
    return n * ((size - 1) * norm_squared + (n - size) * largest) / (size * (n - 1))
