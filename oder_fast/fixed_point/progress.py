"""How far each image of a batch has come in a solve."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .maps import Calls, FixedPointMap, Step, per_image
from .solution import Solution, fit_contraction

# No transient makes a step this many times longer than the first one and than the image.
DIVERGENCE = 1e3
# Contraction is the largest seen in as many iterations.
WINDOW = 5
# Moves of as many roundings of the image are taken for moves.
ROUNDING = 8

Numbers = NDArray[np.float64]


class Progress:
    """The best iterate of each image, its residual, and which images are done; numbers of images are on the host.

    Attributes:
        accuracy: The last relative residual of each image, ``(B,)``; 1 of those that are done; None at the start.
        residual: The least relative residual of each image.
        change: The squared norm of that residual.
        value: The image that it belongs to.
        n_done: How many images have converged or diverged.
        short: Evaluations that fell short of the accuracy asked for, and the error of the last such one.
    """

    def __init__(self, start: Tensor, tolerance: float, fixed_point_map: FixedPointMap) -> None:
        self.batch = start.shape[0]
        self.tolerance, self.gain, self.agree = tolerance, fixed_point_map.gain, fixed_point_map.agree
        self.smallest = ROUNDING * max(torch.finfo(start.dtype).eps, fixed_point_map.rounding)
        self.accuracy: Tensor | None = None
        self.residual = self.distance = self.change = np.full(self.batch, np.inf)
        self.value = start
        self.converged = self.diverged = np.zeros(self.batch, bool)
        self.iterations = np.zeros(self.batch, np.int64)
        self.n_done = 0
        self.short = (0, 0.0)
        self._limit: Numbers | None = None
        self._last: tuple[Tensor, Tensor] | None = None
        self._rates: list[Numbers] = []
        self._rows: list[tuple[int, Numbers]] = []

    @np.errstate(divide="ignore", invalid="ignore", over="ignore")
    def record(self, iteration: int, point: Tensor, step: Step, *, only: bool = False) -> None:
        """Take an evaluation of the whole map into account.

        Args:
            iteration: Its number.
            point: Where the map was evaluated.
            step: What it gave.
            only: Whether its value replaces all before, as a mean of noisy iterates does.
        """
        change, norm, _ = host(step.reductions).T
        if self._limit is None:
            self._limit = DIVERGENCE**2 * np.maximum(change, norm)
        residual = np.where(change == 0, change, np.sqrt(change / norm))
        live = ~(self.converged | self.diverged)
        wrong = live & ~((change <= self._limit) & np.isfinite(norm))
        amplification = self._amplification(point.detach(), step.image.detach(), np.sqrt(norm))
        error = 0.0 if step.error is None else host(step.error)
        distance = (residual + error) * amplification
        if step.error is not None:
            self.short = self.short[0] + 1, float(np.max(error))
        right = live & ~wrong & (distance <= self.tolerance)
        better = live & ~wrong & ((residual <= self.residual) | right | only)
        if better.all():
            self.value = step.image
        elif better.any():
            self.value = torch.where(mask(better, step.image), step.image, self.value)
        self.residual = np.where(better, residual, self.residual)
        self.change = np.where(better, change, self.change)
        self.distance = np.where(better, distance, self.distance)
        self.iterations = np.where(live, iteration, self.iterations)
        self._rows.append((iteration, np.where(live, residual, np.nan)))
        self.converged, self.diverged = self.converged | right, self.diverged | wrong
        done = self.converged | self.diverged
        self.accuracy = torch.from_numpy(np.where(done, 1.0, residual)).to(point.device)
        self.n_done = int(done.sum())

    def close(self, iteration: int, step: Step) -> None:
        """Take the last evaluation as the result, untested but for that it is finite."""
        self.value = step.image
        self.iterations = np.full_like(self.iterations, iteration)
        self.diverged = ~np.isfinite(host(step.reductions)[:, 1])

    def freeze(self, point: Tensor) -> Tensor:
        """Return the next points, where an image is done its value."""
        if self.n_done == 0:
            return point
        return torch.where(mask(self.converged | self.diverged, point), self.value.detach(), point)

    def _amplification(self, point: Tensor, image: Tensor, size: Numbers) -> Numbers:
        """Return how many residuals away the fixed point is: 1 / (1 - contraction), by what was seen last."""
        amplification = np.full(self.batch, self.gain)
        if self._last is not None:
            differences = (new - old for new, old in zip((point, image), self._last, strict=True))
            norms = torch.stack([torch.linalg.vector_norm(d.flatten(1), dim=1) for d in differences])
            moved, led = host(self.agree(norms.double()))
            # Moves within rounding tell nothing new.
            told = moved > self.smallest * size
            last = self._rates[-1] if self._rates else np.zeros(self.batch)
            self._rates = [*self._rates[1 - WINDOW :], np.where(told, led / moved, last)]
            worst = np.max(self._rates, 0)
            amplification = np.maximum(np.where(worst < 1, 1 / (1 - worst), np.inf), self.gain)
        self._last = point, image
        return amplification

    def solution(self, calls: Calls, describe: Callable[[Solution], str]) -> Solution:
        """Return what has been found; diverged images are NaN."""
        value = self.value
        if self.diverged.any():
            value = torch.where(mask(self.diverged, value), torch.nan, value)
        table = torch.from_numpy(np.reshape([row for _, row in self._rows], (-1, self.batch)))
        at = torch.tensor([iteration for iteration, _ in self._rows], dtype=torch.int64)
        found = Solution(
            value,
            torch.from_numpy(self.iterations),
            table,
            at,
            torch.from_numpy(self.converged),
            torch.from_numpy(self.diverged),
            fit_contraction(table, at),
            torch.from_numpy(self.distance),
            "",
            calls.denoiser,
            calls.operator,
        )
        return replace(found, message=describe(found))


def host(numbers: Tensor) -> NDArray[Any]:
    """Return a few numbers for decisions, on the host."""
    array: NDArray[Any] = numbers.detach().cpu().numpy()
    return array


def mask(images: NDArray[np.bool_], like: Tensor) -> Tensor:
    """Return which images are meant, to be broadcast over them."""
    return per_image(torch.from_numpy(images).to(like.device), like)
