"""Packages that only parts of oder_fast need, the extras that install them, and what is said where one is missing."""

from importlib.util import find_spec
from typing import Any

EXTRAS = {
    "io": ("pydicom", "h5py", "nibabel", "tifffile", "PIL", "skimage"),
    # Validation measures SSIM and writes images.
    "train": ("pydantic", "yaml", "tensorboard", "tqdm", "matplotlib", "PIL", "skimage"),
}
"""Modules of each extra; `all` is every one of them."""

APART = {"interop": ("deepinv",)}
"""Extras that `all` leaves out: deepinv brings torchvision, of which each build fits one build of torch alone."""

NAMES = {"PIL": "pillow", "skimage": "scikit-image", "yaml": "pyyaml"}
"""Packages that are not called as their modules."""


class MissingPackageError(ImportError):
    """A package that only some of oder_fast needs is not installed."""


def new_axes(what: str) -> Any:
    """Return the axes of a new figure of matplotlib, for something that draws itself.

    Args:
        what: Who asks, as ``"Solution.plot"``.

    Raises:
        MissingPackageError: Where matplotlib is not installed.
    """
    needs(what, "matplotlib")
    from matplotlib.figure import Figure

    return Figure(figsize=(5, 3.5), layout="constrained").add_subplot()


def needs(what: str, *modules: str) -> None:
    """Raise where a module is not installed that something needs; nothing is imported.

    It is called before the import, so that there the types are known and the error is one sentence.

    Args:
        what: Who asks, as ``"reading DICOM"``.
        *modules: Names of modules, as they are imported.

    Raises:
        MissingPackageError: An ImportError of one sentence, with the command that installs what is missing.

    Example:
        >>> needs("reading arrays", "numpy")
    """
    missing = [module for module in modules if find_spec(module) is None]
    if not missing:
        return
    names = [NAMES.get(module, module) for module in missing]
    extras = {**EXTRAS, **APART}
    enough = [extra for extra, those in extras.items() if set(missing) <= set(those)]
    extra = next(iter(enough), "all")
    known = any(module in those for module in missing for those in extras.values())
    target = f"'oder-fast[{extra}]'" if known else " ".join(names)
    raise MissingPackageError(f"{what} needs {', '.join(names)}: pip install {target}")
