"""Reconstruct many files by a checkpoint."""

from .jobs import InputError
from .run import Report, reconstruct_files

__all__ = ["InputError", "Report", "reconstruct_files"]
