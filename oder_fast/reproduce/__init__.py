"""What the paper claims, measured: each claim with its figure, what was asked of it, and whether it holds."""

from collections.abc import Callable

from .._extras import EXTRAS, needs

needs("oder_fast.reproduce", *EXTRAS["train"])

from . import applications, cost, theory
from .report import Claim, Report

EXPERIMENTS: dict[str, Callable[[int], Report]] = {"theory": theory.run, "cost": cost.run}

__all__ = ["EXPERIMENTS", "Claim", "Report", "applications"]
