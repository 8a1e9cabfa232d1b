"""The command oder-fast."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


def _number(kind: type[int] | type[float], least: float) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}") from None
        if not (math.isfinite(value) and value >= least):
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        return value

    return read


def _decibel(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number of dB, got {text!r}")
    return value


def _demo(arguments: argparse.Namespace) -> int:
    from . import _demo
    from .fixed_point import DivergenceError

    settings = {name: value for name, value in vars(arguments).items() if name != "run"}
    try:
        _demo.run(_demo.Settings(**settings))
    except _demo.BadInputError as error:
        print(f"oder-fast: {error}", file=sys.stderr)
        return 2
    except (DivergenceError, OSError) as error:
        print(f"oder-fast: {error}", file=sys.stderr)
        return 1
    return 0


def _info(_: argparse.Namespace) -> int:
    from . import build_info

    print(build_info())
    return 0


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"oder-fast {version('oder-fast')}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="oder-fast", description="Fixed points of regularization by denoising, by minibatches, fast."
    )
    parser.add_argument(
        "--version", action=_Version, nargs=0, dest=argparse.SUPPRESS, help="print the version and exit"
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    demo = commands.add_parser(
        "demo",
        help="reconstruct a CT slice from few noisy views",
        description=(
            "Simulate a scan of a CT slice with few views, train a denoiser on noise and then through the "
            "fixed point, reconstruct by filtered back-projection, RED (all views a step) and ODER (a "
            "minibatch of views a step), print a table, and write figure.png, arrays.npz and denoiser.pt."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.set_defaults(run=_demo)
    demo.add_argument(
        "--input",
        type=Path,
        metavar="FILE",
        help="image: DICOM, TIFF, PNG, NPY or NPZ (default: the CT slice of pydicom)",
    )
    demo.add_argument("--array", metavar="NAME", help="array of an NPZ file that holds several")
    demo.add_argument(
        "--output", type=Path, metavar="FOLDER", default=Path("oder-fast-demo"), help="where to write"
    )
    demo.add_argument("--views", type=_number(int, 1), default=48, metavar="N", help="views over 180 degrees")
    demo.add_argument(
        "--minibatch", type=_number(int, 1), metavar="N", help="views a step in ODER (default: a third)"
    )
    demo.add_argument(
        "--snr", type=_decibel, default=50.0, metavar="DB", help="signal-to-noise ratio of the scan"
    )
    demo.add_argument(
        "--steps", type=_number(int, 1), default=1500, metavar="N", help="training steps on noise"
    )
    demo.add_argument(
        "--fixed-point-steps",
        type=_number(int, 0),
        default=20,
        metavar="N",
        help="training steps through the fixed point",
    )
    demo.add_argument("--seed", type=_number(int, 0), default=0, metavar="N", help="same seed, same numbers")
    demo.add_argument(
        "--threads", type=_number(int, 1), metavar="N", help="threads (default: as torch chooses)"
    )
    info = commands.add_parser("info", help="say what was built, and why a face is missing")
    info.set_defaults(run=_info)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 2 for bad input, 130 when interrupted."""
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
    except KeyboardInterrupt:
        print("oder-fast: interrupted; no file was left half-written", file=sys.stderr)
        return 130
    return status


if __name__ == "__main__":
    sys.exit(main())
