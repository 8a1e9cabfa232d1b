"""Reconstruct many files by a checkpoint."""

from .._extras import EXTRAS, needs

needs("oder_fast.reconstruction", *EXTRAS["train"])

from .jobs import InputError
from .run import Report, reconstruct_files

__all__ = ["InputError", "Report", "reconstruct_files"]
