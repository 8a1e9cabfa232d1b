"""What an iteration of a solve costs beyond its operator, its RED step and its denoiser: Python, and tiny tensors.

An image of 16 x 16 pixels, 12 views, a denoiser of one convolution: little else is left to pay for. The solves test
every iteration that they can, on a tolerance that none reaches.
"""

from __future__ import annotations

import statistics
import time

import pytest
import torch

from gpu import needs_gpu, time_in_turn
from oder_fast import DEQRED, Anderson, DnCNN, Implicit, Nesterov, ParallelBeamCT, Picard, ops

pytestmark = pytest.mark.filterwarnings("ignore::oder_fast.NotConvergedWarning")

ITERATIONS, ROUNDS = 400, 21


def denoiser():
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(1, 1, 3, padding=1, bias=False)
    with torch.no_grad():
        conv.weight.mul_(0.9 / conv.weight.abs().sum())
    return conv


class Solve:
    def __init__(self, solver, minibatch, variance_reduction):
        self.ct, self.denoiser = ParallelBeamCT(16, 12), denoiser()
        self.y = self.ct(torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(0)))
        self.minibatch, self.reduced = minibatch, variance_reduction
        self.momentum = torch.full((1,), 0.3, dtype=torch.float64) if solver is Nesterov else None
        fixed = solver(max_iterations=ITERATIONS, tolerance=1e-30)
        self.model = DEQRED(
            self.ct,
            self.denoiser,
            tau=1.0,
            minibatch_size=minibatch,
            variance_reduction=variance_reduction,
            solver=fixed,
            differentiation=Implicit(solver=fixed),
            on_failure="ignore",
        )
        self.start = torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(1))

    def forward(self):
        with torch.no_grad():
            self.model(self.y, self.start)

    def forward_alone(self):
        """The calls that an iteration is made of."""
        x = self.start
        step, tau = (torch.tensor(v, dtype=torch.float64) for v in (1e-2, 1.0))
        options = {"previous": x, "momentum": self.momentum} if self.momentum is not None else {}
        with torch.no_grad():
            for k in range(ITERATIONS):
                denoised = self.denoiser(x[:, None])[:, 0]
                blocks = None
                if self.minibatch is not None and k % 10:
                    blocks = self.ct.draw_blocks(self.minibatch)
                if self.minibatch is not None and self.reduced:
                    gradient = self.ct.gradient(x, self.y if blocks is None else None, blocks)
                    ops.red_update(x, gradient, denoised, step, tau, **options)
                else:
                    self.ct.red_update(x, self.y, blocks, denoised, step, tau, **options)


@pytest.mark.parametrize(
    ("solver", "what", "minibatch", "variance_reduction"),
    [
        (Nesterov, "all views", None, True),
        (Picard, "all views", None, True),
        (Anderson, "all views", None, True),
        (Nesterov, "3 views a step", 3, True),
        (Picard, "3 views a step", 3, True),
        (Nesterov, "3 views a step, as published", 3, False),
        (Picard, "3 views a step, as published", 3, False),
    ],
)
def test_overhead(report, one_thread, solver, what, minibatch, variance_reduction):
    solve = Solve(solver, minibatch, variance_reduction)
    report.benchmark.pedantic(lambda: None)
    wholes, beyond = [], []
    for _ in range(ROUNDS):
        times = []
        for run in (solve.forward, solve.forward_alone):
            start = time.perf_counter()
            run()
            times.append((time.perf_counter() - start) / ITERATIONS)
        wholes.append(times[0])
        # Of two runs side by side: the machine's speed changes more than this in a minute.
        beyond.append(times[0] - times[1])
    report.add(
        "an iteration",
        "cpu",
        f"{solver.__name__}, {what}",
        statistics.median(wholes),
        note=f"{statistics.median(beyond) * 1e6:.0f} us beyond the operator, the step and the denoiser",
    )


@needs_gpu
@pytest.mark.parametrize("minibatch", [None, 10])
@pytest.mark.parametrize("size", [64, 256, 512])
def test_gpu_graphs(report, size, minibatch):
    """A solve and its gradient, launched kernel by kernel and by CUDA graphs."""
    torch.manual_seed(0)
    ct, network = ParallelBeamCT(size, 60).cuda(), DnCNN(depth=5, width=32).cuda()
    y = ct(torch.rand(1, size, size, device="cuda"))
    solver = Nesterov(100, 1e-30)

    def solve(cuda_graph):
        generator = torch.Generator("cuda").manual_seed(0)
        model = DEQRED(
            ct,
            network,
            tau=0.1 * ct.norm_squared(),
            minibatch_size=minibatch,
            solver=solver,
            generator=generator,
            on_failure="ignore",
            cuda_graph=cuda_graph,
        )
        network.zero_grad()
        solution = model(y, return_solution=True)
        solution.value.square().mean().backward()
        assert solution.fallback_reason is None
        return [solution.value.detach(), *(p.grad for p in network.parameters())]

    eager, graphs = solve(False), solve(True)
    assert torch.equal(eager[0], graphs[0])
    report.benchmark.pedantic(lambda: None)
    candidates = {"by CUDA graphs": lambda _: solve(True), "kernel by kernel": lambda _: solve(False)}
    times = time_in_turn(candidates, 1, eager=candidates)
    report.add(
        "a solve and its gradient",
        "cuda",
        f"by CUDA graphs, {size}x{size}, {'all' if minibatch is None else minibatch} of 60 views",
        times.pop("by CUDA graphs"),
        peers=times,
        note="100 + 100 iterations, DnCNN of 5 layers",
    )
