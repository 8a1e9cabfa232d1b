"""What a gradient, and a whole solve, cost as the number of measurements grows.

A CT slice of 128 x 128 pixels seen from 30 to 480 views, and the denoiser of `oder_fast.pretrained("ct")`. Timed on
one thread: a gradient of ODER with 15 views, one of RED with all, and three solves until the denoiser is called within
1 % of the fixed point: RED by gradient steps, ODER with variance reduction, and the proximal form.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import Autocast
from ..data import add_gaussian_noise
from ..data.coils import one_thread
from ..denoisers.call import ImageDenoiser
from ..deqred import DEQRED
from ..fixed_point import Anderson, Nesterov, Solver
from ..operators import ParallelBeamCT
from ..pretrained import pretrained
from ..red import GradientStep, ProximalStep
from ..viz import new_figure
from .report import Claim, Report, power_law

SIZE, SNR, MINIBATCH = 128, 50.0, 15
VIEWS = (30, 60, 120, 240, 480)
TAU = 0.03
"""In units of the norm squared."""

REPEATS, WARM, MOST = 41, 10, 600
NEAR, EXACT, NEVER = 1e-2, 1e-5, 1e-9
"""Relative distance from the fixed point, that of the point which counts as it, and one that no timed solve reaches."""

CHECK_EVERY = 10


def _median(call: Callable[[], object]) -> float:
    """Return the median seconds of a call, after some that do not count."""
    for _ in range(WARM):
        call()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


class _Near(Exception):
    """The iterates have come near the fixed point."""


class _Scan:
    """One number of views: the data, the fixed point, and what is timed."""

    def __init__(self, prior: DEQRED, truth: Tensor, views: int, seed: int) -> None:
        self.ct = ParallelBeamCT(SIZE, views)
        self.y = add_gaussian_noise(self.ct(truth), SNR, torch.Generator().manual_seed(seed))
        assert isinstance(prior.denoiser, nn.Module)
        self.denoiser = prior.denoiser
        self.fixed_point = self._model(ProximalStep(), Anderson(300, EXACT))(self.y, self.ct)

    def _model(self, step: ProximalStep | GradientStep, solver: Solver[Any]) -> DEQRED:
        return DEQRED(
            self.denoiser,
            tau=TAU,
            step=step,
            solver=solver,
            generator=torch.Generator().manual_seed(1),
            on_failure="ignore",
        )

    def gradient(self, minibatch: int | None) -> float:
        """Return the seconds of a gradient of the data fidelity."""
        fidelity = self.ct.least_squares(self.y)
        generator = torch.Generator().manual_seed(2)
        blocks = None if minibatch is None else self.ct.draw_blocks(minibatch, generator)
        return _median(lambda: fidelity.gradient(self.fixed_point, blocks))

    def solve(
        self, step: ProximalStep | GradientStep, solver: Callable[[float], Solver[Any]]
    ) -> dict[str, float]:
        """Return the seconds, and the calls of the denoiser, until it is called near the fixed point; NaN for never."""
        calls, size = 0, NEAR * self.fixed_point.norm()

        def watch(_: Any, arguments: tuple[Tensor, ...]) -> None:
            nonlocal calls
            if (arguments[0][:, 0] - self.fixed_point).norm() <= size:
                raise _Near
            calls += 1

        hook = self.denoiser.register_forward_pre_hook(watch)
        start = time.perf_counter()
        try:
            self._model(step, solver(NEVER))(self.y, self.ct)
        except _Near:
            return {"seconds": time.perf_counter() - start, "denoiser_calls": calls}
        finally:
            hook.remove()
        return {"seconds": math.nan, "denoiser_calls": math.nan}

    def denoising(self) -> float:
        """Return the seconds of a call of the denoiser."""
        denoise = ImageDenoiser(self.denoiser, Autocast(self.y.device))
        return _median(lambda: denoise(self.fixed_point))


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
    with one_thread(), torch.no_grad():
        prior = pretrained("ct")
        for views in VIEWS:
            scan = _Scan(prior, truth, views, seed)
            row: dict[str, Any] = {
                "views": views,
                "denoiser call, seconds": scan.denoising(),
                "ODER gradient, seconds": scan.gradient(MINIBATCH),
                "RED gradient, seconds": scan.gradient(None),
            }
            for name, (step, solver) in SOLVES.items():
                row |= {f"{name}: {key}": value for key, value in scan.solve(step, solver).items()}
            rows.append(row)
            print(f"oder-fast: {views} views: done", file=sys.stderr, flush=True)
    return Report("cost", rows, _claims(rows), _figure(rows), _remarks(rows, time.perf_counter() - start))


def _claims(rows: list[dict[str, Any]]) -> list[Claim]:
    views = [float(row["views"]) for row in rows]
    flat = [row["ODER gradient, seconds"] for row in rows]
    red = [row["RED gradient, seconds"] for row in rows]
    fast = "RED, proximal form: seconds"
    claims = [
        Claim(
            "time of ODER's gradient over the number of views, exponent", power_law(views, flat), -0.15, 0.15
        ),
        Claim("time of RED's gradient over the number of views, exponent", power_law(views, red), 0.75, 1.25),
    ]
    for name in list(SOLVES)[:2]:
        ratios = [row[f"{name}: seconds"] / row[fast] for row in rows]
        claims.append(
            Claim(f"time of {name} over that of the proximal form, to 1 %, smallest", min(ratios), 1.0)
        )
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
        ("RED gradient, seconds", "s"),
        ("ODER gradient, seconds", "o"),
        ("denoiser call, seconds", "."),
    ):
        iterations.plot(views, [1e3 * row[key] for row in rows], marker + "-", label=key.split(",")[0])
    for name, marker in zip(SOLVES, "so^", strict=True):
        solves.plot(views, [row[f"{name}: seconds"] for row in rows], marker + "-", label=name)
    iterations.set(ylabel="milliseconds", title="One gradient, one call of the denoiser", yscale="log")
    solves.set(ylabel="seconds", title="To 1 % of the fixed point", yscale="log")
    for axis in (iterations, solves):
        axis.set(xlabel="views", xscale="log")
        axis.set_xticks(VIEWS, [str(n) for n in VIEWS])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend()
    return figure
