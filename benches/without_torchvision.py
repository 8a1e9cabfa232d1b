"""deepinv where torchvision is not, as beside a build of torch that no torchvision was compiled for."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from unittest.mock import MagicMock


class _WithoutTorchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands in for torchvision, which deepinv imports but does not use here, and which no CPU build of torch has."""

    def find_spec(self, name, path=None, target=None):
        return (
            importlib.machinery.ModuleSpec(name, self, is_package=True)
            if name.split(".")[0] == "torchvision"
            else None
        )

    def create_module(self, spec):
        module = MagicMock()
        module.__path__, module.__spec__, module.__name__ = [], spec, spec.name
        return module

    def exec_module(self, module):
        pass


def import_deepinv():
    """Return deepinv, or None; with what it needs but torchvision, as CONTRIBUTING.md has it."""
    if "deepinv" in sys.modules:
        return sys.modules["deepinv"]
    finder = _WithoutTorchvision()
    sys.meta_path.insert(0, finder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("deepinv")
    except ImportError:
        return None
    finally:
        sys.meta_path.remove(finder)
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
