"""The command oder-fast."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from . import __version__, build_info


def _whole_number(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        return value

    return read


def _decibels(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text!r}")
    return value


def _demo(arguments: argparse.Namespace) -> int:
    from . import _demo
    from .fixed_point import FixedPointError

    settings = {name: value for name, value in vars(arguments).items() if name != "run"}
    try:
        _demo.run(_demo.Settings(**settings))
    except _demo.BadInputError as error:
        print(f"oder-fast: {error}", file=sys.stderr)
        return 2
    except FixedPointError as error:
        print(f"oder-fast: {error}; here: raise --minibatch or --steps", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"oder-fast: {error}", file=sys.stderr)
        return 1
    return 0


def _print_tree(tree: Mapping[str, Any], indent: str = "") -> None:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            print(f"{indent}{key}:")
            _print_tree(value, indent + "  ")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
            print(f"{indent}{key}: {text}")


def _info(_: argparse.Namespace) -> int:
    _print_tree(build_info())
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="oder-fast", description="Fixed points of regularization by denoising, by minibatches, fast."
    )
    parser.add_argument("--version", action="version", version=f"oder-fast {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    demo = commands.add_parser(
        "demo",
        help="reconstruct a CT slice from few noisy views",
        description=(
            "Simulate a scan of a CT slice with few views, train a denoiser on noise and then through the "
            "fixed point, reconstruct by filtered back-projection, RED (all views a step) and ODER (a "
            "minibatch of views a step), print a table, and write figure.png, arrays.npz and denoiser.pt."
        ),
    )
    demo.set_defaults(run=_demo)

    def option(name: str, read: Callable[[str], Any], metavar: str, text: str, default: Any = None) -> None:
        shown = text if default is None else f"{text} (default: {default})"
        demo.add_argument(name, type=read, metavar=metavar, help=shown, default=default)

    option("--input", Path, "FILE", "DICOM, TIFF, PNG, NPY or NPZ image (default: the CT slice of pydicom)")
    option("--array", str, "NAME", "array of an NPZ file that holds several")
    option("--output", Path, "FOLDER", "where to write", Path("oder-fast-demo"))
    option("--views", _whole_number(1), "N", "views, spread over 180 degrees", 45)
    option("--minibatch", _whole_number(1), "N", "views a step in ODER (default: a third of the views)")
    option("--snr", _decibels, "DB", "signal-to-noise ratio of the scan", 50.0)
    option("--steps", _whole_number(1), "N", "training steps on noise", 1200)
    option("--fixed-point-steps", _whole_number(0), "N", "training steps through the fixed point", 60)
    option("--seed", _whole_number(0), "N", "the same seed gives the same numbers", 0)
    option("--threads", _whole_number(1), "N", "threads; more pay where the cores are idle", 1)
    info = commands.add_parser("info", help="say what was built, and why a face is missing")
    info.set_defaults(run=_info)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 2 for bad input, 130 when interrupted."""
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
    except KeyboardInterrupt:
        print("\noder-fast: interrupted; no file was left half-written", file=sys.stderr)
        return 130
    return status


if __name__ == "__main__":
    sys.exit(main())
