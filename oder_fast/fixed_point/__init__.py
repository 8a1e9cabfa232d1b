"""Fixed points of maps, and gradients through them: solver x differentiation x solution."""

from .differentiation import Differentiation, Implicit, JacobianFree, Unrolled
from .graphs import Execution, NotCapturedWarning
from .maps import FixedPointMap, Linearization, Step
from .solution import DivergenceError, FixedPointError, NotConvergedError, NotConvergedWarning, Solution
from .solvers import Anderson, Average, Decay, Nesterov, Picard, Solver

__all__ = [
    "Anderson",
    "Average",
    "Decay",
    "Differentiation",
    "DivergenceError",
    "Execution",
    "FixedPointError",
    "FixedPointMap",
    "Implicit",
    "JacobianFree",
    "Linearization",
    "Nesterov",
    "NotCapturedWarning",
    "NotConvergedError",
    "NotConvergedWarning",
    "Picard",
    "Solution",
    "Solver",
    "Step",
    "Unrolled",
]
