"""Training loops: on noise, and through the fixed point; long runs from a configuration, and what they leave."""

from .checkpoints import CheckpointError, load_checkpoint
from .configuration import Configuration, ConfigurationError, read_configuration
from .loops import train_denoiser, train_fixed_point
from .losses import l1_loss, mse_loss, ssim_loss
from .model import FixedPointModel, load_model
from .processes import LostProcessError
from .reconstruction import InputError, Report, reconstruct_files
from .trainer import Outcome, RunError, Trainer

__all__ = [
    "CheckpointError",
    "Configuration",
    "ConfigurationError",
    "FixedPointModel",
    "InputError",
    "LostProcessError",
    "Outcome",
    "Report",
    "RunError",
    "Trainer",
    "l1_loss",
    "load_checkpoint",
    "load_model",
    "mse_loss",
    "read_configuration",
    "reconstruct_files",
    "ssim_loss",
    "train_denoiser",
    "train_fixed_point",
]
