"""The fast form: calls of denoiser and operator to given distances from the fixed point, gradients, and seconds.

With the denoisers that the three demos train (``oder-fast demo --train``): of a folder named by ODER_FAST_DEMOS, with ct, mri and
idt in it, or trained here, which takes minutes each. Fixed points are solved for to 1e-6 in double precision by the
proximal form, and the gradient form's residual there is checked first.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from oder_fast import (
    DEQRED,
    Anderson,
    CartesianMRI,
    DnCNN,
    GradientStep,
    Implicit,
    Nesterov,
    ParallelBeamCT,
    TotalVariation,
)
from oder_fast._demo import ct as ct_demo
from oder_fast._demo import idt as idt_demo
from oder_fast._demo import mri as mri_demo
from oder_fast.data import add_gaussian_noise, birdcage_maps, psnr, random_ellipses, random_lines
from peers import SIZE, VIEWS, Deepinv, Old, Problem, distance

pytestmark = pytest.mark.filterwarnings("ignore::oder_fast.NotConvergedWarning", "ignore::UserWarning")

DISTANCES = (1e-2, 3e-3, 1e-3)
TRACE: list[tuple[object, torch.Tensor]] = []


class Traces:
    """Keeps what a solver's iterations give."""

    def step(self, fixed_point_map, state, progress, blocks):
        state, step = super().step(fixed_point_map, state, progress, blocks)
        TRACE.append((fixed_point_map.calls(), step.image))
        return state, step


@dataclass(frozen=True)
class Traced(Traces, Anderson):
    """Anderson, its images kept."""


@dataclass(frozen=True)
class TracedNesterov(Traces, Nesterov):
    """Nesterov, its images kept."""


def double(thing):
    """A copy in double precision."""
    if isinstance(thing, torch.Tensor):
        return thing.to(torch.complex128 if thing.is_complex() else torch.float64)
    return copy.deepcopy(thing).to(torch.float64)


@dataclass
class Case:
    """A denoiser, an operator and data."""

    name: str
    denoiser: torch.nn.Module
    operator: object
    y: torch.Tensor
    truth: torch.Tensor
    tau: float
    nonnegative: bool = False

    def model(self, **options):
        options = {
            "tau": self.tau,
            "nonnegative": self.nonnegative,
            "on_failure": "ignore",
            "normalize": False,
            **options,
        }
        return DEQRED(self.denoiser, **options)

    def reference(self):
        """The fixed point in double precision, seen to be that of both forms."""
        exact = Case(
            self.name,
            double(self.denoiser),
            double(self.operator),
            double(self.y),
            self.truth,
            self.tau,
            self.nonnegative,
        )
        solver = Anderson(400, 1e-6, memory=10)
        with torch.no_grad():
            solution = exact.model(solver=solver)(exact.y, exact.operator, return_solution=True)
            gradient_form = exact.model(step=GradientStep(), solver=Anderson(1, 1e-30))
            there = gradient_form(exact.y, exact.operator, solution.value, return_solution=True)
        # A step of the gradient form is a few thousandths of a step of the proximal form.
        assert float(there.residual) < 1e-6, there
        return solution.value.to(self.truth.dtype)

    def calls(self, reference, solver, distances=DISTANCES, **options):
        """Calls of denoiser and operator at which each distance is reached; None where it is not."""
        TRACE.clear()
        with torch.no_grad():
            self.model(solver=solver, **options)(self.y, self.operator)
        found = [(calls, distance(image, reference)) for calls, image in TRACE]
        return [
            next(((c.denoiser, c.operator) for c, d in found if d <= wanted), None) for wanted in distances
        ]


def demo(kind):
    """The denoiser that a demo trained, and the arrays it wrote."""
    folder = Path(os.environ.get("ODER_FAST_DEMOS") or Path(tempfile.gettempdir()) / "oder-fast-demos") / kind
    if not (folder / "denoiser.pt").exists():
        train = ["--train"] if kind == "ct" else []
        command = [sys.executable, "-m", "oder_fast.cli", "demo", kind, *train, "--output", str(folder)]
        subprocess.run(command, check=True)
    saved = torch.load(folder / "denoiser.pt", weights_only=True)
    with np.load(folder / "arrays.npz") as arrays:
        return saved, {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def network_of(saved, kind=DnCNN):
    network = kind(**saved["arguments"])
    network.load_state_dict(saved["state_dict"])
    return network.eval()


def ct_case(nonnegative=False):
    saved, arrays = demo("ct")
    truth, y = arrays["truth"][None], arrays["sinogram"][None]
    ct = ParallelBeamCT(tuple(truth.shape[1:]), y.shape[1], y.shape[2])
    tau = ct_demo.TAU_PER_VIEW * ct.n_blocks / ct.norm_squared()
    return Case(
        f"CT {truth.shape[1]}x{truth.shape[2]}, {y.shape[1]} views{', x >= 0' * nonnegative}",
        network_of(saved),
        ct,
        y,
        truth,
        tau,
        nonnegative,
    )


def mri_case():
    saved, arrays = demo("mri")
    mri = CartesianMRI(arrays["coil_maps"], arrays["mask"])
    truth, y = arrays["truth"][None], arrays["kspace"][None]
    name = f"MRI {truth.shape[1]}x{truth.shape[2]}, {y.shape[1]} coils, R = 4"
    return Case(name, network_of(saved), mri, y, truth, mri_demo.TAU)


def idt_case():
    saved, arrays = demo("idt")
    settings = SimpleNamespace(
        slices=arrays["truth"].shape[0],
        size=arrays["truth"].shape[1],
        illuminations=arrays["intensities"].shape[0],
    )
    operator = idt_demo._microscope(settings, "auto")
    truth, y = arrays["truth"][None] / idt_demo.UNIT, arrays["intensities"][None] / idt_demo.UNIT
    name = f"IDT {tuple(truth.shape[1:])}, {y.shape[1]} illuminations"
    return Case(
        name,
        network_of(saved, idt_demo.AboveBackground),
        operator,
        y,
        truth.to(torch.complex64),
        idt_demo.TAU,
    )


DEMOS = {"ct": ct_case, "ct, x >= 0": lambda: ct_case(True), "mri": mri_case, "idt": idt_case}


def told(calls):
    return ", ".join("-" if c is None else f"{c[0]} ({c[1]:.0f})" for c in calls)


@pytest.mark.parametrize("name", DEMOS)
def test_calls(report, one_thread, name):
    """Denoiser calls, and in brackets operator calls, to 1e-2, 3e-3 and 1e-3 of the fixed point."""
    case = DEMOS[name]()
    reference = case.reference()
    report.benchmark.pedantic(lambda: None)
    fast = case.calls(reference, Traced(60, 1e-30))
    slow = case.calls(reference, TracedNesterov(600, 1e-30), step=GradientStep())
    start = time.perf_counter()
    with torch.no_grad():
        solution = case.model()(case.y, case.operator, return_solution=True)
    seconds = time.perf_counter() - start
    show = torch.abs if case.truth.is_complex() else lambda image: image
    ends = [psnr(show(image[0]), show(case.truth[0])) for image in (solution.value, reference)]
    report.add(
        "fixed point",
        "cpu",
        case.name,
        seconds,
        note=f"to 1e-2, 3e-3, 1e-3: {told(fast)}; gradient form, Nesterov: {told(slow)}; the default settings end after "
        f"{solution.denoiser_calls} ({solution.operator_calls:.0f}), {distance(solution.value, reference):.1e} away (told: "
        f"{float(solution.distance):.1e}), {ends[0] - ends[1]:+.3f} dB from the fixed point's {ends[1]:.2f} dB",
    )


def gradient_in_image(case, image):
    return (image - case.truth.to(image.dtype)) / image.numel()


def weights_gradient(case, solver, adjoint, **options):
    model = case.model(solver=solver, differentiation=Implicit(adjoint), **options)
    model.zero_grad()
    solution = model(case.y, case.operator, return_solution=True)
    (solution.value - case.truth).abs().square().mean().backward()
    return torch.cat([p.grad.flatten() for p in case.denoiser.parameters()]), solution


@pytest.mark.parametrize("name", DEMOS)
def test_gradient(report, one_thread, name):
    """Products with the denoiser's transposed derivative to 10 % and 1 %, and the error of the weights' gradient."""
    case = DEMOS[name]()
    exact = Case(
        case.name,
        double(case.denoiser),
        double(case.operator),
        double(case.y),
        double(case.truth),
        case.tau,
        case.nonnegative,
    )
    precise = Anderson(400, 1e-6, memory=10)
    reference, _ = weights_gradient(exact, precise, precise)
    # The adjoint equation at one and the same image: its right-hand side is the error of that image.
    forward = Anderson(400, 1e-4, memory=8)
    u = weights_gradient(case, forward, Anderson(400, 1e-6, memory=10))[1].adjoint[-1].value
    TRACE.clear()
    weights_gradient(case, forward, Traced(80, 1e-30, memory=8))
    found = [(calls, distance(image, u)) for calls, image in TRACE]
    to = [next(((c.denoiser, c.operator) for c, d in found if d <= wanted), None) for wanted in (0.1, 0.01)]
    start = time.perf_counter()
    gradient, solution = weights_gradient(case, None, None)
    seconds = time.perf_counter() - start
    adjoint = solution.adjoint[-1]
    report.benchmark.pedantic(lambda: None)
    report.add(
        "gradient",
        "cpu",
        case.name,
        seconds,
        note=f"products to 10 %, 1 %: {told(to)}; the default settings take {solution.denoiser_calls} + "
        f"{adjoint.denoiser_calls} products, error of the weights' gradient {distance(gradient, reference):.1e}",
    )


def test_mri_total_variation(report, one_thread):
    """160 x 160, 8 coils, R = 4, total variation."""
    g = torch.Generator().manual_seed(0)
    x = random_ellipses(1, 160, g).to(torch.complex64)
    mri = CartesianMRI(
        birdcage_maps(8, (160, 160)), random_lines(160, 4, 0.08, torch.Generator().manual_seed(0))
    )
    y = add_gaussian_noise(mri(x), 40, g) * mri.mask[:, None]
    case = Case(
        "MRI 160x160, 8 coils, R = 4, total variation", TotalVariation(0.01, 1000, 1e-4), mri, y, x, 0.02
    )
    reference = case.reference()
    report.benchmark.pedantic(lambda: None)
    note = f"to 1e-2, 3e-3, 1e-3: {told(case.calls(reference, Traced(60, 1e-30)))}"
    report.add("fixed point", "cpu", case.name, None, note=note)


# ------------------------------------------------------------------ seconds, against 0.1 and deepinv

WANTED, MOST, ROUNDS = 1e-2, 10, 3


def iterations_to(problem, reference, solve):
    """The fewest iterations that come so near, or None."""
    with torch.no_grad():
        return next((n for n in range(1, MOST) if distance(solve(n)(), reference) <= WANTED), None)


@pytest.mark.parametrize("nonnegative", [False, True])
def test_solve_seconds(report, one_thread, deepinv, nonnegative):
    """A solve to 1e-2 of the fixed point: each method in as many iterations as it takes, of which none is tested."""
    problem = Problem(nonnegative)
    solves, notes, old = {}, [], None
    start = distance(problem.start, problem.image)
    ways = {"ours": (problem.image, lambda n: problem.ours(solver=Anderson(n, 1e-30)))}
    if deepinv is not None and not nonnegative:
        for name, our_operator in (("deepinv HQS", False), ("deepinv HQS, our operator", True)):
            # Of 3 to 200 steps of its inner solve the quickest to 1e-2; relative to the data, 1e-3 ends too early.
            peer = Deepinv(deepinv, problem, our_operator, inner=1e-4, inner_steps=10)
            ways[name] = (peer.fixed_point(), lambda n, peer=peer: peer.model("HQS", n))
            if not our_operator:
                notes.append(f"its fixed point is {distance(ways[name][0], problem.image):.3f} away")
    for name, (reference, solve) in ways.items():
        n = iterations_to(problem, reference, solve)
        notes.append(f"{name} {n} iterations")
        if n is not None:
            solves[name] = solve(n)
    times = {name: [] for name in solves}
    if "ODER_FAST_01" in os.environ:
        old = Old(problem)
        n = old("iterations", WANTED, 300)
        notes.append(f"0.1 {n}")
    with old or nullcontext(), torch.no_grad():
        for _ in range(ROUNDS):
            for name, solve in solves.items():
                begin = time.perf_counter()
                solve()
                times[name].append(time.perf_counter() - begin)
            if old:
                times.setdefault("0.1", []).append(old("solve", n))
    report.benchmark.pedantic(lambda: None)
    best = {name: min(seconds) for name, seconds in times.items()}
    ours = best.pop("ours")
    note = (
        f"from {start:.3f}; {', '.join(notes)}; one call of the denoiser {problem.denoiser_seconds():.3f} s"
    )
    name = f"CT {SIZE}x{SIZE}, {VIEWS} views, U-Net" + ", x >= 0" * nonnegative
    report.add("solve to 1e-2", "cpu", name, ours, peers=best, note=note)
