"""The fast form: calls of denoiser and operator to given distances from the fixed point, gradients, and seconds.

With the denoisers that the three demos train (``oder-fast demo``): of a folder named by ODER_FAST_DEMOS, with ct, mri and
idt in it, or trained here, which takes minutes each. Fixed points are solved for to 1e-6 in double precision by the
proximal form, and the gradient form's residual there is checked first.
"""

from __future__ import annotations

import copy
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from oder_fast import (
    DEQRED,
    Anderson,
    CartesianMRI,
    DiffractionTomography,
    DnCNN,
    GradientStep,
    Implicit,
    Nesterov,
    ParallelBeamCT,
    ProximalStep,
    TotalVariation,
    UNet,
)
from oder_fast.data import add_gaussian_noise, birdcage_maps, psnr, random_ellipses, random_lines, read_image

pytestmark = pytest.mark.filterwarnings("ignore::oder_fast.NotConvergedWarning", "ignore::UserWarning")

DISTANCES = (1e-2, 3e-3, 1e-3)
TRACE: list[tuple[object, torch.Tensor]] = []


@dataclass(frozen=True)
class Traced(Anderson):
    """Anderson, its images kept."""

    def step(self, fixed_point_map, state, progress, blocks):
        state, step = super().step(fixed_point_map, state, progress, blocks)
        TRACE.append((fixed_point_map.calls(), step.image))
        return state, step


@dataclass(frozen=True)
class TracedNesterov(Nesterov):
    """Nesterov, its images kept."""

    def step(self, fixed_point_map, state, progress, blocks):
        state, step = super().step(fixed_point_map, state, progress, blocks)
        TRACE.append((fixed_point_map.calls(), step.image))
        return state, step


def distance(image, reference):
    return float((image - reference).norm() / reference.norm())


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
        options = {"tau": self.tau, "nonnegative": self.nonnegative, "on_failure": "ignore", "normalize": False, **options}
        return DEQRED(self.denoiser, **options)

    def reference(self):
        """The fixed point in double precision, seen to be that of both forms."""
        exact = Case(self.name, double(self.denoiser), double(self.operator), double(self.y), self.truth, self.tau, self.nonnegative)
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
        return [next(((c.denoiser, c.operator) for c, d in found if d <= wanted), None) for wanted in distances]


def trained(kind):
    """The denoiser that a demo trains."""
    folder = os.environ.get("ODER_FAST_DEMOS")
    path = Path(folder or tempfile.gettempdir() + "/oder-fast-demos") / kind
    if not (path / "denoiser.pt").exists():
        subprocess.run([sys.executable, "-m", "oder_fast.cli", "demo", kind, "--output", str(path)], check=True)
    return torch.load(path / "denoiser.pt", weights_only=True), path


def ct_case(views=45):
    from pydicom import examples

    saved, _ = trained("ct")
    network = DnCNN(**saved["arguments"])
    network.load_state_dict(saved["state_dict"])
    image = read_image(examples.get_path("ct")).image
    image = image / image.max()
    ct = ParallelBeamCT(tuple(image.shape), views)
    y = add_gaussian_noise(ct(image[None]), 50, torch.Generator().manual_seed(1))
    return Case("CT 128x128, 45 views, the demo's DnCNN", network.eval(), ct, y, image[None], 1 / 124)


def told(calls):
    return ", ".join("-" if c is None else f"{c[0]} ({c[1]:.0f})" for c in calls)
