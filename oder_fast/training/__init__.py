"""Training from a configuration: on noise, then through the fixed point; checkpoints, and what is done with them."""

from .._extras import EXTRAS, needs

needs("oder_fast.training", *EXTRAS["train"])

from .checkpoints import CheckpointError, load_checkpoint
from .configuration import Configuration, ConfigurationError, read_configuration
from .losses import l1_loss, mse_loss, ssim_loss
from .model import load_model, make_model
from .processes import LostProcessError
from .trainer import Outcome, RunError, Trainer

__all__ = [
    "CheckpointError",
    "Configuration",
    "ConfigurationError",
    "LostProcessError",
    "Outcome",
    "RunError",
    "Trainer",
    "l1_loss",
    "load_checkpoint",
    "load_model",
    "make_model",
    "mse_loss",
    "read_configuration",
    "ssim_loss",
]
