"""How far each image of a batch has come in a solve."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .maps import Calls, FixedPointMap, Step, per_image
from .solution import Solution, fit_contraction

# No transient makes a step this many times longer than the first one and than the image.
DIVERGENCE = 1e3
# Contraction is the largest seen in as many iterations.
WINDOW = 5
# Moves of as many roundings of the image are taken for moves.
ROUNDING = 8


class Progress:
    """The best iterate of each image, its residual, and which images are done.

    Attributes:
        accuracy: The last relative residual of each image, ``(B,)``; 1 of those that are done; None at the start.
        residual: The least relative residual of each image.
        change: The squared norm of that residual.
        value: The image that it belongs to.
        n_done: How many images have converged or diverged.
    """

    def __init__(self, start: Tensor, tolerance: float, fixed_point_map: FixedPointMap) -> None:
        self.batch = start.shape[0]
        self.tolerance, self.gain, self.agree = tolerance, fixed_point_map.gain, fixed_point_map.agree
        self.smallest = ROUNDING * max(torch.finfo(start.dtype).eps, fixed_point_map.rounding)
        unknown = torch.full((self.batch,), torch.inf, dtype=torch.float64, device=start.device)
        self.accuracy: Tensor | None = None
        self.residual, self.distance, self.change = unknown, unknown, unknown
        self.value = start
        self.converged = self.diverged = torch.zeros_like(unknown, dtype=torch.bool)
        self.iterations = torch.zeros_like(unknown, dtype=torch.int64)
        self.n_done = 0
        self._limit: Tensor | None = None
        self._last: tuple[Tensor, Tensor] | None = None
        self._rates: list[Tensor] = []
        self._rows: list[tuple[int, Tensor]] = []

    def record(self, iteration: int, point: Tensor, step: Step, *, only: bool = False) -> None:
        """Take an evaluation of the whole map into account.

        Args:
            iteration: Its number.
            point: Where the map was evaluated.
            step: What it gave.
            only: Whether its value replaces all before, as a mean of noisy iterates does.
        """
        change, norm, _ = step.reductions.detach().unbind(1)
        if self._limit is None:
            self._limit = DIVERGENCE**2 * torch.maximum(change, norm)
        residual = torch.where(change == 0, change, (change / norm).sqrt())
        live = ~(self.converged | self.diverged)
        wrong = live & ~((change <= self._limit) & norm.isfinite())
        distance = residual * self._amplification(point.detach(), step.image.detach())
        right = live & ~wrong & (distance <= self.tolerance)
        better = live & ~wrong & ((residual <= self.residual) | right | only)
        if bool(better.all()):
            self.value = step.image
        elif bool(better.any()):
            self.value = torch.where(per_image(better, step.image), step.image, self.value)
        self.residual = torch.where(better, residual, self.residual)
        self.change = torch.where(better, change, self.change)
        self.distance = torch.where(better, distance, self.distance)
        self.iterations = torch.where(live, iteration, self.iterations)
        self._rows.append((iteration, torch.where(live, residual, torch.nan)))
        self.converged, self.diverged = self.converged | right, self.diverged | wrong
        done = self.converged | self.diverged
        self.accuracy = torch.where(done, 1.0, residual)
        self.n_done = int(done.sum())

    def close(self, iteration: int, step: Step) -> None:
        """Take the last evaluation as the result, untested but for that it is finite."""
        norm = step.reductions[:, 1].detach()
        self.value = step.image
        self.iterations = torch.full_like(self.iterations, iteration)
        self.diverged = ~norm.isfinite()

    def freeze(self, point: Tensor) -> Tensor:
        """Return the next points, where an image is done its value."""
        if self.n_done == 0:
            return point
        done = self.converged | self.diverged
        return torch.where(per_image(done, point), self.value.detach(), point)

    def _amplification(self, point: Tensor, image: Tensor) -> Tensor:
        """Return how many residuals away the fixed point is: 1 / (1 - contraction), by what was seen last."""
        amplification = torch.full_like(self.residual, self.gain)
        if self._last is not None:
            moved, led = (_norm(new - old) for new, old in zip((point, image), self._last, strict=True))
            # Moves within rounding tell nothing new.
            told = moved > self.smallest * _norm(image)
            last = self._rates[-1] if self._rates else torch.zeros_like(moved)
            rate = self.agree(torch.where(told, led / torch.where(told, moved, 1), last))
            self._rates = [*self._rates[1 - WINDOW :], rate]
            worst = torch.stack(self._rates).amax(0)
            amplification = torch.where(worst < 1, 1 / (1 - worst), torch.inf).clamp(min=self.gain)
        self._last = point, image
        return amplification

    def solution(self, calls: Calls, describe: Callable[[Solution], str]) -> Solution:
        """Return what has been found; diverged images are NaN."""
        value = self.value
        if bool(self.diverged.any()):
            value = torch.where(per_image(self.diverged, value), torch.nan, value)
        device = torch.device("cpu")
        residuals = [row for _, row in self._rows] or [self.residual.new_zeros(0, self.batch)]
        table = (torch.stack(residuals) if self._rows else residuals[0]).to(device)
        at = torch.tensor([iteration for iteration, _ in self._rows], dtype=torch.int64)
        found = Solution(
            value,
            self.iterations.to(device),
            table,
            at,
            self.converged.to(device),
            self.diverged.to(device),
            fit_contraction(table, at),
            self.distance.to(device),
            "",
            calls.denoiser,
            calls.operator,
        )
        return replace(found, message=describe(found))


def _norm(images: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(images.flatten(1), dim=1)
    return norms.double()
