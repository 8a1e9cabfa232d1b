"""What an outer iteration of a solve costs beyond its operator and its denoiser: Python, and tiny tensors.

An image of 16 x 16 pixels, 12 views, a denoiser of one convolution: little else is left to pay for. The solves test
every iteration that they can, on a tolerance that none reaches. Calls are timed where they are made, within the solve: of
the denoiser, of the kernels, and of the data fidelity as a whole, which has the inner solve too. All by the clock of the
thread, so that what else runs on the machine is not counted.
"""

from __future__ import annotations

import statistics
import time

import pytest
import torch

from oder_fast import DEQRED, Anderson, GradientStep, Nesterov, ParallelBeamCT, Picard, ProximalStep

ITERATIONS, ROUNDS = 20, 31


class Watch:
    """Adds up the time of calls, but for calls within such calls."""

    def __init__(self):
        self.seconds, self.inside = 0.0, False

    def __call__(self, function):
        def timed(*args):
            if self.inside:
                return function(*args)
            self.inside, start = True, time.thread_time()
            try:
                return function(*args)
            finally:
                self.seconds += time.thread_time() - start
                self.inside = False

        return timed


class Watched(ParallelBeamCT):
    """A scan whose calls are timed."""

    def __init__(self, *args):
        super().__init__(*args)
        self.kernels, self.calls = Watch(), Watch()

    def least_squares(self, y):
        data_fidelity = super().least_squares(y)
        for name in ("_gradient", "_normal"):
            setattr(data_fidelity, name, self.kernels(getattr(data_fidelity, name)))
        for name in ("adjoint_data", "gradient", "normal", "solve"):
            setattr(data_fidelity, name, self.calls(getattr(data_fidelity, name)))
        return data_fidelity


@pytest.mark.parametrize(
    ("step", "solver", "what"),
    [
        (ProximalStep(), Anderson, "proximal steps"),
        (ProximalStep(minibatch_size=3), Anderson, "proximal steps, 3 views in an inner step"),
        (GradientStep(), Anderson, "gradient steps"),
        (GradientStep(), Nesterov, "gradient steps"),
        (GradientStep(minibatch_size=3), Nesterov, "gradient steps, 3 views each"),
        (
            GradientStep(minibatch_size=3, variance_reduction=False),
            Picard,
            "gradient steps as in ODER, 3 views each",
        ),
    ],
)
def test_overhead(report, one_thread, step, solver, what):
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(1, 1, 3, padding=1, bias=False)
    with torch.no_grad():
        convolution.weight.mul_(0.9 / convolution.weight.abs().sum())
    ct, denoiser = Watched(16, 12), Watch()
    model = DEQRED(
        denoiser(convolution), tau=0.1, step=step, solver=solver(ITERATIONS, 1e-30), on_failure="ignore"
    )
    y, start = ct(torch.rand(1, 16, 16)), torch.rand(1, 16, 16)
    report.benchmark.pedantic(lambda: None)
    rows = []
    for _ in range(ROUNDS):
        ct.kernels.seconds = ct.calls.seconds = denoiser.seconds = 0.0
        begin = time.thread_time()
        with torch.no_grad():
            solution = model(y, ct, start, return_solution=True)
        whole = time.thread_time() - begin
        n = int(solution.iterations.max())
        rest = whole - denoiser.seconds
        rows.append([t / n for t in (whole, rest - ct.calls.seconds, rest - ct.kernels.seconds)])
    whole, beyond, with_inner = map(statistics.median, zip(*rows, strict=True))
    begin = time.thread_time()
    for _ in range(1000):
        torch.add(start, start)
    add = (time.thread_time() - begin) / 1000
    report.add(
        "an iteration",
        "cpu",
        f"{solver.__name__}, {what}",
        whole,
        note=f"{beyond * 1e6:.0f} us beyond the denoiser and the data fidelity, {with_inner * 1e6:.0f} us beyond the "
        f"denoiser and the kernels, where torch.add takes {add * 1e6:.1f}",
    )
