"""Fixed points of maps, and gradients through them: solver x differentiation x solution."""

from .differentiation import Differentiation, Implicit, JacobianFree, Unrolled
from .maps import Calls, FixedPointMap, Linearization, Step
from .solution import DivergenceError, FixedPointError, NotConvergedError, NotConvergedWarning, Solution
from .solvers import Anderson, Average, Nesterov, Picard, Solver

__all__ = [
    "Anderson",
    "Average",
    "Calls",
    "Differentiation",
    "DivergenceError",
    "FixedPointError",
    "FixedPointMap",
    "Implicit",
    "JacobianFree",
    "Linearization",
    "Nesterov",
    "NotConvergedError",
    "NotConvergedWarning",
    "Picard",
    "Solution",
    "Solver",
    "Step",
    "Unrolled",
]
