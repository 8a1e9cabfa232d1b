"""What an iteration, and a whole solve, cost as the number of measurements grows.

A CT slice of 256 x 256 pixels seen from 60 to 960 views, and the denoiser of `oder_fast.pretrained("ct")`. Timed in
turns on one thread: an iteration of ODER with 30 views, one of RED with all, and three solves to within 1 % of the
fixed point: RED by gradient steps, ODER with variance reduction, and the proximal form.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .._torch import Autocast
from ..data import add_gaussian_noise
from ..denoisers.call import ImageDenoiser
from ..deqred import DEQRED
from ..fixed_point import Anderson, Nesterov, Picard, Solver
from ..operators import ParallelBeamCT
from ..pretrained import pretrained
from ..red import GradientStep, ProximalStep
from .report import Claim, Report, new_figure, power_law

SIZE, SNR, MINIBATCH = 256, 50.0, 30
VIEWS = (60, 120, 240, 480, 960)
ITERATIONS = (4, 24)
"""Of the two solves whose times are subtracted."""

REPEATS, MOST = 3, 600
NEAR, EXACT = 1e-2, 1e-5
"""Relative distance from the fixed point, and that of the point which counts as it."""

TOLERANCES = (1e-2, 3e-3, 1e-3, 3e-4)
"""By which solves may end, the largest first; the first whose result is near enough is timed."""

CHECK_EVERY = 10


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class _Scan:
    """One number of views: the data, the fixed point, and what is timed."""

    def __init__(self, prior: DEQRED, truth: Tensor, views: int, seed: int) -> None:
        self.prior, self.views = prior, views
        self.ct = ParallelBeamCT(SIZE, views)
        self.y = add_gaussian_noise(self.ct(truth), SNR, torch.Generator().manual_seed(seed))
        exact = self._model(ProximalStep(), Anderson(200, EXACT))
        self.fixed_point = exact(self.y, self.ct)
        self.seed = seed

    def _model(self, step: ProximalStep | GradientStep, solver: Solver[Any]) -> DEQRED:
        return DEQRED(
            self.prior.denoiser,
            tau=self.prior.tau,
            step=step,
            solver=solver,
            nonnegative=self.prior.nonnegative,
            generator=torch.Generator().manual_seed(1),
            on_failure="ignore",
        )

    def iteration(self, minibatch: int | None) -> float:
        """Return the seconds of an iteration of gradient steps."""
        step = GradientStep(minibatch_size=minibatch, variance_reduction=False)
        few, many = (self._model(step, Picard(n, check_every=None, tail=None)) for n in ITERATIONS)
        times = [
            _seconds(lambda: many(self.y, self.ct)) - _seconds(lambda: few(self.y, self.ct))
            for _ in range(REPEATS)
        ]
        return statistics.median(times) / (ITERATIONS[1] - ITERATIONS[0])

    def solve(
        self, step: ProximalStep | GradientStep, solver: Callable[[float], Solver[Any]]
    ) -> dict[str, float]:
        """Return seconds, calls and distance of the solve that ends first and is near the fixed point."""
        for tolerance in TOLERANCES:
            start = time.perf_counter()
            solution = self._model(step, solver(tolerance))(self.y, self.ct, return_solution=True)
            seconds = time.perf_counter() - start
            distance = float((solution.value - self.fixed_point).norm() / self.fixed_point.norm())
            if distance <= NEAR:
                break
        return {
            "seconds": seconds,
            "denoiser_calls": solution.denoiser_calls,
            "operator_calls": solution.operator_calls,
            "distance": distance,
        }

    def denoising(self) -> float:
        """Return the seconds of a call of the denoiser."""
        denoise = ImageDenoiser(self.prior.denoiser, Autocast(self.y.device))
        return statistics.median(_seconds(lambda: denoise(self.fixed_point)) for _ in range(2 * REPEATS))


SOLVES: dict[str, tuple[ProximalStep | GradientStep, Callable[[float], Solver[Any]]]] = {
    "RED, gradient form": (GradientStep(), lambda tolerance: Nesterov(MOST, tolerance)),
    "ODER, variance-reduced": (
        GradientStep(minibatch_size=MINIBATCH),
        lambda tolerance: Nesterov(MOST, tolerance, CHECK_EVERY),
    ),
    "RED, proximal form": (ProximalStep(), lambda tolerance: Anderson(100, tolerance)),
}


def run(seed: int = 0) -> Report:
    """Do it all.

    Args:
        seed: Of noise and minibatches.

    Returns:
        A row for each number of views.
    """
    from pydicom import examples

    start = time.perf_counter()
    image = torch.from_numpy(examples.ct.pixel_array.astype("float32"))
    truth = torch.nn.functional.interpolate(
        (image / image.max())[None, None], (SIZE, SIZE), mode="bilinear", antialias=True
    )[0]
    rows: list[dict[str, Any]] = []
    with _one_thread(), torch.no_grad():
        prior = pretrained("ct")
        for views in VIEWS:
            scan = _Scan(prior, truth, views, seed)
            row: dict[str, Any] = {
                "views": views,
                "denoiser call, seconds": scan.denoising(),
                "ODER iteration, seconds": scan.iteration(min(MINIBATCH, views)),
                "RED iteration, seconds": scan.iteration(None),
            }
            for name, (step, solver) in SOLVES.items():
                row |= {f"{name}: {key}": value for key, value in scan.solve(step, solver).items()}
            rows.append(row)
            print(f"oder-fast: {views} views: done", file=sys.stderr, flush=True)
    return Report("cost", rows, _claims(rows), _figure(rows), _remarks(rows, time.perf_counter() - start))


def _claims(rows: list[dict[str, Any]]) -> list[Claim]:
    views = [float(row["views"]) for row in rows]
    flat = [row["ODER iteration, seconds"] for row in rows]
    # What the denoiser takes does not depend on the views.
    operator = [row["RED iteration, seconds"] - row["denoiser call, seconds"] for row in rows]
    fast = "RED, proximal form: seconds"
    claims = [
        Claim(
            "time of an ODER iteration over the number of views, exponent", power_law(views, flat), -0.1, 0.1
        ),
        Claim(
            "time of a RED iteration, without the denoiser, over the number of views, exponent",
            power_law(views[1:], operator[1:]),
            0.8,
            1.2,
        ),
    ]
    for name in list(SOLVES)[:2]:
        ratios = [row[f"{name}: seconds"] / row[fast] for row in rows]
        claims.append(
            Claim(f"time of {name} over that of the proximal form, to 1 %, smallest", min(ratios), 1.0)
        )
    for name in SOLVES:
        farthest = max(row[f"{name}: distance"] for row in rows)
        claims.append(Claim(f"{name}, relative distance from the fixed point, largest", farthest, high=NEAR))
    return claims


def _remarks(rows: list[dict[str, Any]], seconds: float) -> list[str]:
    first, last = rows[0], rows[-1]

    def speak(row: dict[str, Any]) -> str:
        return ", ".join(
            f"{name} {row[f'{name}: seconds']:.2f} s ({row[f'{name}: denoiser_calls']:.0f} calls of the denoiser)"
            for name in SOLVES
        )

    return [
        f"To 1 % of the fixed point with {first['views']} views: {speak(first)}.",
        f"With {last['views']} views: {speak(last)}.",
        f"{SIZE} x {SIZE} pixels, {MINIBATCH} views a step in ODER, one thread; {seconds:.0f} s in all. "
        "Timings depend on the machine and on what else it does.",
    ]


def _figure(rows: list[dict[str, Any]]) -> Any:
    figure = new_figure(11, 4.6)
    iterations, solves = figure.subplots(1, 2)
    views = [row["views"] for row in rows]
    for key, marker in (
        ("RED iteration, seconds", "s"),
        ("ODER iteration, seconds", "o"),
        ("denoiser call, seconds", "."),
    ):
        iterations.plot(views, [1e3 * row[key] for row in rows], marker + "-", label=key.split(",")[0])
    for name, marker in zip(SOLVES, "so^", strict=True):
        solves.plot(views, [row[f"{name}: seconds"] for row in rows], marker + "-", label=name)
    iterations.set(ylabel="milliseconds", title="One iteration")
    solves.set(ylabel="seconds", title="To 1 % of the fixed point", yscale="log")
    for axis in (iterations, solves):
        axis.set(xlabel="views", xscale="log")
        axis.set_xticks(VIEWS, [str(n) for n in VIEWS])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend()
    return figure
