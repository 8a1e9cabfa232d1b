"""Write a checkpoint of `oder-fast train` as a model that comes with the package.

    python examples/pretrained/export.py runs/ct-2/checkpoint-1-00000300.pt ct --tau 0.004 --card card.json

Writes oder_fast/weights/NAME.npz, half floats, and NAME.json: the card, with the network and tau added.
"""

from __future__ import annotations

import argparse
import inspect
import json
from pathlib import Path

import numpy as np

from oder_fast.training import load_model

WEIGHTS = Path(__file__).parents[2] / "oder_fast" / "weights"


def main() -> None:
    """Do it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("name")
    parser.add_argument("--tau", type=float, required=True, help="in units of the norm squared")
    parser.add_argument("--card", type=Path, required=True, help="JSON: what else is known of the model")
    arguments = parser.parse_args()
    model, _, configuration, _ = load_model(arguments.checkpoint)
    state = {key: value.numpy().astype(np.float16) for key, value in model.denoiser.state_dict().items()}
    options = dict(configuration.denoiser.options)
    if "in_channels" in inspect.signature(type(model.denoiser)).parameters:
        options["in_channels"] = model.denoiser.in_channels
    card = {
        "denoiser": {"kind": configuration.denoiser.kind, "options": options},
        "tau": arguments.tau,
        "nonnegative": False,
        **json.loads(arguments.card.read_text()),
    }
    WEIGHTS.mkdir(exist_ok=True)
    np.savez_compressed(WEIGHTS / f"{arguments.name}.npz", **state)
    (WEIGHTS / f"{arguments.name}.json").write_text(json.dumps(card, indent=2) + "\n")


if __name__ == "__main__":
    main()
