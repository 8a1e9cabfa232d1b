"""Fast fixed points of regularization by denoising, and training of the denoiser through them."""

import json
from importlib import metadata
from pathlib import Path
from typing import Any

from . import ops
from . import viz as viz
from .choice import Choice, choose_tau, choose_weight
from .denoisers import (
    BM3D,
    AtNoiseLevel,
    DnCNN,
    DRUNet,
    SliceDnCNN,
    TotalVariation,
    UNet,
    bound_lipschitz,
    estimate_lipschitz,
)
from .deqred import DEQRED
from .diagnosis import diagnose
from .fixed_point import (
    Anderson,
    DivergenceError,
    FixedPointError,
    Implicit,
    JacobianFree,
    Nesterov,
    NotConvergedError,
    NotConvergedWarning,
    Picard,
    Solution,
    Unrolled,
)
from .operators import (
    CartesianMRI,
    DiffractionTomography,
    MeasurementOperator,
    MeasurementParallel,
    ParallelBeamCT,
    as_operator,
)
from .pretrained import model_card, pretrained
from .published import oder
from .red import GradientStep, ProximalStep

__version__ = metadata.version("oder-fast")

__all__ = [
    "BM3D",
    "DEQRED",
    "Anderson",
    "AtNoiseLevel",
    "CartesianMRI",
    "Choice",
    "DRUNet",
    "DiffractionTomography",
    "DivergenceError",
    "DnCNN",
    "FixedPointError",
    "GradientStep",
    "Implicit",
    "JacobianFree",
    "MeasurementOperator",
    "MeasurementParallel",
    "Nesterov",
    "NotConvergedError",
    "NotConvergedWarning",
    "ParallelBeamCT",
    "Picard",
    "ProximalStep",
    "SliceDnCNN",
    "Solution",
    "TotalVariation",
    "UNet",
    "Unrolled",
    "as_operator",
    "bound_lipschitz",
    "build_info",
    "choose_tau",
    "choose_weight",
    "diagnose",
    "estimate_lipschitz",
    "model_card",
    "oder",
    "pretrained",
]


def build_info() -> dict[str, Any]:
    """Tell what was built and what runs here.

    Returns:
        A dictionary of ``version``; ``backends``, for each backend ``"available"`` or the reason why it is not;
        ``cpu``, whether the C++ kernels were built or the reason why not, by which compiler, with OpenMP (several
        threads) or without, for which instruction sets, and the one in use; ``cuda``, whether the CUDA kernels were
        built, by which compiler, for which architectures, or the reason why not.

    Example:
        >>> build_info()["backends"]["reference"]
        'available'
    """
    recorded = Path(__file__).with_name("_build_info.json")
    built: dict[str, dict[str, Any]] = (
        json.loads(recorded.read_text()) if recorded.exists() else {"cpu": {}, "cuda": {"built": False}}
    )
    built["cpu"]["isa"] = ops.backends.cpu_isa()
    return {"version": __version__, "backends": ops.available(), **built}
