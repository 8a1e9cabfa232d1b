"""A training step through the fixed point on a GPU, at the paper's CT setting.

512 x 512 pixels, 90 views, 725 bins, 30 views a gradient step, the official U-Net; 30 iterations forward and 30 in the
adjoint solve, no test of convergence; Adam. The denoiser alone, called as often, is what no method is spared. On an H200 the operator's
floor is 60 times 5.0 us (bench_radon.py), 0.3 ms in all: of a step that takes far longer, nothing.
"""

from __future__ import annotations

import copy

import pytest
import torch
from cases import relative_error

from bench_training import ADJOINT, FORWARD, denoiser_alone
from gpu import needs_gpu, time_in_turn
from oder_fast import DEQRED, GradientStep, Implicit, Nesterov, ParallelBeamCT, UNet
from oder_fast.data import add_gaussian_noise, random_ellipses

pytestmark = [
    needs_gpu,
    # The solves are stopped short of their tolerance on purpose.
    pytest.mark.filterwarnings("ignore::oder_fast.NotConvergedWarning", "ignore::UserWarning"),
]

SIZE, BINS, VIEWS, MINIBATCH, ITERATIONS = 512, 725, 90, 30, 30
SHARE = 0.002


class Step:
    """A training step with the operator on one backend or another, from the same weights with the same minibatches."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(0)
        self.unet = UNet().to("cuda", memory_format=torch.channels_last)
        # With the vectors of the spectral norms, which a step moves.
        self.weights = copy.deepcopy(self.unet.state_dict())
        self.ct = ParallelBeamCT(SIZE, VIEWS, BINS).cuda()
        truth = random_ellipses(1, SIZE, generator)
        self.y = add_gaussian_noise(self.ct(truth.cuda()).cpu(), 50, generator).cuda()
        self.truth = truth.cuda()
        self.start = self.ct.fbp(self.y).clamp(min=0)
        self.optimizer = torch.optim.Adam(self.unet.parameters(), 1e-4)

    def run(self, backend: str, iterations: int = ITERATIONS) -> None:
        self.ct.backend = backend
        solver = Nesterov(iterations, 1e-4, check_every=None)
        model = DEQRED(
            self.unet,
            tau=SHARE,
            step=GradientStep(minibatch_size=MINIBATCH, variance_reduction=False),
            solver=solver,
            differentiation=Implicit(solver=solver),
            nonnegative=True,
            generator=torch.Generator("cuda").manual_seed(0),
            on_failure="ignore",
        )
        self.step(model)

    def run_proximal(self) -> None:
        self.ct.backend = "auto"
        self.step(
            DEQRED(
                self.unet,
                tau=SHARE,
                solver=FORWARD,
                differentiation=Implicit(ADJOINT),
                nonnegative=True,
                on_failure="ignore",
            )
        )

    def step(self, model: DEQRED) -> None:
        self.optimizer.zero_grad()
        (model(self.y, self.ct, self.start) - self.truth).square().mean().backward()
        self.optimizer.step()

    def gradient(self, backend: str, iterations: int) -> torch.Tensor:
        """The gradient that a step takes, the weights put back."""
        self.run(backend, iterations)
        self.unet.load_state_dict(self.weights)
        return torch.cat([p.grad.flatten() for p in self.unet.parameters()])


def test_gpu_step(report, monkeypatch):
    step = Step()
    # Rounding to TF32 would make of the last bit of an operator something that can be seen.
    with monkeypatch.context() as exact:
        exact.setattr(torch.backends.cudnn, "allow_tf32", False)
        gradients = {backend: step.gradient(backend, 5) for backend in ("cuda", "triton", "reference")}
    errors = {
        backend: relative_error(gradients[backend], gradients["reference"]) for backend in ("cuda", "triton")
    }
    assert max(errors.values()) < 1e-3, errors
    report.benchmark.pedantic(lambda: None)
    candidates = {
        backend: lambda _, backend=backend: step.run(backend) for backend in ("cuda", "triton", "reference")
    }
    candidates["by proximal steps, 10 + 20 at most"] = lambda _: step.run_proximal()
    candidates["the denoiser alone"] = lambda _: denoiser_alone(step.unet, step.start, step.optimizer)
    torch.cuda.reset_peak_memory_stats()
    times = time_in_turn(candidates, 1, eager=candidates, rounds=3)
    memory = torch.cuda.max_memory_allocated() / 2**20
    ours = times.pop("cuda")
    times["torch, view by view"] = times.pop("reference")
    report.add(
        "training step",
        "cuda",
        f"CT {SIZE}x{SIZE}, {MINIBATCH} of {VIEWS} views, {ITERATIONS} + {ITERATIONS} iterations",
        ours,
        peers=times,
        error=errors["cuda"],
        note=f"{ours / times['the denoiser alone']:.3f} of what the denoiser alone takes; peak memory of all {memory:.0f} MiB",
    )
