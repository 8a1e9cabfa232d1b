"""Models that come with the package, trained through the fixed point."""

from __future__ import annotations

import io
import json
from importlib import resources
from typing import Any, Literal, get_args

import numpy as np
import torch

from .denoisers import KINDS
from .deqred import DEQRED

Name = Literal["ct", "mri", "idt"]


def model_card(name: Name) -> dict[str, Any]:
    """Return what is known of a model: its network, data and their licence, its training, and how well it does.

    Raises:
        ValueError: For a name of which there is no model.
    """
    card: dict[str, Any] = json.loads(_file(name, "json"))
    return card


def pretrained(name: Name, *, tau: float | None = None, **options: Any) -> DEQRED:
    r"""Return a model whose denoiser was trained through the fixed point.

    Images are in any unit: networks have no biases, so that they commute with a scale. Those of ``"ct"`` are
    attenuations, 0 in air; those of ``"mri"`` complex; those of ``"idt"`` contrasts of cells in a medium, of any number
    of slices and any size: see `SliceDnCNN`. `tau` grows with the amplitude of the noise, and for ``"ct"`` as 1 / size;
    `choose_tau` finds it from the data. `model_card` and docs/models.md tell what the models were trained and tested
    with.

    Args:
        name: ``"ct"``, ``"mri"`` or ``"idt"``.
        tau: In units of :math:`\|A\|^2`; by default that of the training.
        options: Of `DEQRED`.

    Returns:
        The model in evaluation mode, float32, on the CPU.

    Raises:
        ValueError: For a name of which there is no model.

    Example:
        >>> from oder_fast import ParallelBeamCT, pretrained
        >>> from oder_fast.data import shepp_logan
        >>> ct = ParallelBeamCT(image_size=64, angles=40)
        >>> model = pretrained("ct")
        >>> model(ct(shepp_logan(64)[None]), ct).shape
        torch.Size([1, 64, 64])
    """
    card = model_card(name)
    denoiser = KINDS[card["denoiser"]["kind"]](**card["denoiser"]["options"])
    with np.load(io.BytesIO(_file(name, "npz")), allow_pickle=False) as arrays:
        state = {key: torch.from_numpy(arrays[key].astype(np.float32)) for key in arrays.files}
    denoiser.load_state_dict(state)
    options = {"nonnegative": card["nonnegative"], **options}
    return DEQRED(denoiser, tau=card["tau"] if tau is None else tau, **options).eval()


def _file(name: str, suffix: str) -> bytes:
    if name not in get_args(Name):
        raise ValueError(f"pretrained: name must be {' or '.join(map(repr, get_args(Name)))}, got {name!r}")
    return resources.files(__package__).joinpath("weights", f"{name}.{suffix}").read_bytes()
