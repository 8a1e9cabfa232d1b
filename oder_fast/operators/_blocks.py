"""What the operators share about minibatches of their blocks."""

from __future__ import annotations

import math

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


def left_out(
    operator: str, what: str, n: int, share: float, generator: torch.Generator | None = None
) -> Tensor:
    """Draw the measurements that are left out: one of each of as many equal runs, so that no gap is wide.

    Args:
        operator: Who is asked.
        what: Of which there are `n`.
        n: Number of measurements.
        share: Of them; at least one is left out, and never all.
        generator: Source of randomness.

    Returns:
        Sorted int64 indices on the CPU.
    """
    check_share(operator, share)
    if n < 2:
        raise ValueError(f"{operator}: nothing can be left out of {n} {what}; at least 2 are needed")
    size = min(max(1, round(share * n)), n - 1)
    ends = torch.arange(size + 1) * n // size
    device = "cpu" if generator is None else generator.device
    places = torch.rand(size, generator=generator, device=device).cpu()
    return ends[:-1] + (places * ends.diff()).long()


def check_share(operator: str, share: float) -> None:
    """Check the share of the measurements that is left out."""
    if isinstance(share, bool) or not isinstance(share, int | float):
        raise TypeError(f"{operator}: the share left out must be a float, got {type(share).__name__}")
    if not (math.isfinite(share) and 0 < share < 1):
        raise ValueError(f"{operator}: the share left out must be above 0 and below 1, got {share}")
