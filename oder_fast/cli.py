"""The command oder-fast."""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from . import __version__, build_info
from ._extras import EXTRAS, MissingPackageError, needs

SETTING = re.compile(r"[A-Za-z_][\w.]*=")
"""A setting of a configuration, as training.steps=500."""

MEASURED = ("theory", "cost")
"""What oder-fast reproduce measures without images of the user's."""

EVERY_PACKAGE = tuple(dict.fromkeys(module for modules in EXTRAS.values() for module in modules))
"""Of the commands that read and write files of any kind: they say at once what is missing, not after an hour."""


def _whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        if most is not None and value > most:
            raise argparse.ArgumentTypeError(f"must be at most {most}, got {text}")
        return value

    return read


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return Path(text)


def _decibels(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text!r}")
    return value


def _noise(text: str) -> float:
    value = _decibels(text)
    if not -100 <= value <= 300:
        raise argparse.ArgumentTypeError(f"must lie in -100..300, got {text}")
    return value


def _scale(text: str) -> str | tuple[float, float]:
    if text in ("slice", "none"):
        return text
    low, colon, high = text.partition(":")
    if not colon:
        raise argparse.ArgumentTypeError(f"must be slice, none or LOW:HIGH, got {text!r}")
    return _decibels(low), _decibels(high)


def _counter(text: str) -> tuple[str, int]:
    name, equals, number = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"must be NAME=NUMBER, as contrast=1, got {text!r}")
    return name, _whole_number(0)(number)


def _acceleration(text: str) -> float:
    value = _decibels(text)
    if not 1 <= value <= 16:
        raise argparse.ArgumentTypeError(f"must lie in 1..16, got {text}")
    return value


def _said(error: Exception) -> str:
    """Return the message of an error; that of a file names the file, not a number of the system."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return str(error)


def _demo(arguments: argparse.Namespace) -> int:
    needs("demo", *EVERY_PACKAGE)
    from ._demo import common, ct, idt, mri
    from .fixed_point import FixedPointError
    from .training import RunError

    settings = {
        name: value for name, value in vars(arguments).items() if name not in ("run", "what", "defaults")
    }
    for name, value in arguments.defaults.items():
        if not settings.get("train", True) and settings[name] is not None:
            print(f"oder-fast: --{name.replace('_', '-')} is for --train", file=sys.stderr)
            return 2
        settings[name] = value if settings[name] is None else settings[name]
    try:
        if arguments.what == "ct":
            ct.run(ct.Settings(**settings))
        elif arguments.what == "mri":
            mri.run(mri.Settings(**settings))
        else:
            idt.run(idt.Settings(input=None, array=None, **settings))
    except common.BadInputError as error:
        print(f"oder-fast: {_said(error)}", file=sys.stderr)
        return 2
    except FixedPointError as error:
        print(f"oder-fast: {error}; here: raise --minibatch or --steps", file=sys.stderr)
        return 1
    except (OSError, RunError) as error:
        print(f"oder-fast: {_said(error)}", file=sys.stderr)
        return 1
    return 0


def _train(arguments: argparse.Namespace) -> int:
    needs("train", *EXTRAS["train"])
    from .training import ConfigurationError, LostProcessError, RunError, Trainer, read_configuration

    overrides = [*arguments.settings, *arguments.more]
    if arguments.output is not None:
        overrides.append(f"output={json.dumps(str(arguments.output))}")
    try:
        trainer = Trainer(read_configuration(arguments.configuration, overrides))
        outcome = trainer.fit(resume=arguments.resume)
    except (ConfigurationError, LostProcessError, RunError, ValueError, OSError) as error:
        print(f"oder-fast: {_said(error)}", file=sys.stderr)
        return 1 if isinstance(error, LostProcessError | RunError) else 2
    if int(os.environ.get("RANK", "0")) == 0:
        known = outcome.best is not None and math.isfinite(outcome.psnr)
        best = f"; the best ({outcome.psnr:.2f} dB) is {outcome.best}" if known else ""
        print(
            f"Ended: {outcome.reason}. Wrote {outcome.last}{best}; see {outcome.last.parent / 'report.html'}"
        )
        if outcome.reason.startswith("SIG"):
            print("Go on with the same command and --resume", file=sys.stderr)
    return {"SIGINT": 130, "SIGTERM": 143}.get(outcome.reason, 0)


def _reconstruct(arguments: argparse.Namespace) -> int:
    needs("reconstruct", *EVERY_PACKAGE)
    from .reconstruction import reconstruct_files
    from .reconstruction.jobs import escaped
    from .training import RunError

    options = {name: value for name, value in vars(arguments).items() if name != "run"}
    options["select"] = dict(arguments.select) or None
    try:
        report = reconstruct_files(**options)
    except RunError as error:
        print(f"oder-fast: {_said(error)}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"oder-fast: {_said(error)}", file=sys.stderr)
        return 2
    done, skipped = len(report.done), len(report.skipped)
    before = f", {skipped} were done before" if skipped else ""
    print(
        f"Reconstructed {done} of {done + skipped + len(report.failed)} files{before}. Wrote {arguments.output}"
    )
    if report.quality:
        q = report.quality
        print(
            f"PSNR {q['psnr']:.2f} dB (start {q['psnr_start']:.2f}), SSIM {q['ssim']:.3f} (start "
            f"{q['ssim_start']:.3f}), means of the files in {arguments.output / 'quality.csv'}"
        )
    if report.not_converged:
        print(
            f"oder-fast: {len(report.not_converged)} did not converge (raise --max-iterations or --tolerance): "
            f"{', '.join(map(escaped, report.not_converged))}",
            file=sys.stderr,
        )
    for name, note in report.notes.items():
        print(f"oder-fast: {name}: {note}", file=sys.stderr)
    for name, reason in report.failed.items():
        print(f"oder-fast: failed: {escaped(name)}: {escaped(reason)}", file=sys.stderr)
    return 1 if report.failed else 0


def _print_tree(tree: Mapping[str, Any], indent: str = "") -> None:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            print(f"{indent}{key}:")
            _print_tree(value, indent + "  ")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
            print(f"{indent}{key}: {text}")


def _reproduce(arguments: argparse.Namespace) -> int:
    what, data = arguments.what, arguments.data
    trains = what not in MEASURED
    needs("reproduce", *EXTRAS["train"], *(["pydicom"] if what == "cost" else []))
    from .reproduce import EXPERIMENTS, applications
    from .training import RunError

    if trains != (data is not None):
        text = f"{what} needs --data FOLDER" if trains else f"--data is not for {what}"
        print(f"oder-fast: reproduce: {text}", file=sys.stderr)
        return 2
    try:
        # Before anything long starts.
        arguments.output.mkdir(parents=True, exist_ok=True)
        if trains:
            report = applications.run(what, data, arguments.output, arguments.scale, arguments.seed)
        else:
            report = EXPERIMENTS[what](arguments.seed)
        print("\n".join(report.lines()))
        print("Wrote " + ", ".join(map(str, report.write(arguments.output))))
    except KeyboardInterrupt:
        print("oder-fast: interrupted; the same command goes on", file=sys.stderr)
        return 130
    except RunError as error:
        print(f"oder-fast: {error}", file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:
        print(f"oder-fast: {_said(error)}", file=sys.stderr)
        return 2
    return 0 if all(claim.holds for claim in report.claims) else 1


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
        help="reconstruct a CT or MR slice, or a volume of cells, from few noisy measurements",
        epilog="oder-fast demo [options] is oder-fast demo ct [options].",
    )
    _add_demos(demo.add_subparsers(required=True, metavar="what", dest="what"))
    train = commands.add_parser(
        "train",
        help="train a denoiser on noise and through the fixed point",
        description=(
            "Train as the configuration says: a denoiser on noise, then through the fixed point. Writes checkpoints, "
            "training.csv, validation.csv, tensorboard/, images/ and report.html to the output folder. Several "
            "processes: torchrun --nproc-per-node N -m oder_fast.cli train ..."
        ),
    )
    train.add_argument("configuration", type=_path, metavar="FILE", help="YAML or TOML file")
    train.add_argument(
        "settings", nargs="*", metavar="KEY=VALUE", help="wins over the file's, as training.steps=500"
    )
    train.add_argument("--set", dest="more", nargs="*", default=[], help=argparse.SUPPRESS)
    train.add_argument("--output", type=_path, metavar="FOLDER", help="where to write (default: the file's)")
    train.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint in the output folder"
    )
    train.set_defaults(run=_train)
    _add_reconstruct(commands)
    reproduce = commands.add_parser(
        "reproduce",
        help="measure what the paper claims",
        description=(
            "Measure what the paper claims: print PASS or FAIL for each claim with the number measured, and write a "
            "table (CSV), a figure and these lines. theory: the floor that minibatches leave under the error of image "
            "and gradient, against its bound (two minutes). cost: a gradient and a solve as the number of views grows "
            "(a minute or two; timings, so on a quiet machine). ct, mri, idt: all methods side by side, trained on "
            "images of yours (less than an hour on two cores)."
        ),
        epilog="Exit status: 0 all claims hold, 1 some do not, 2 bad input, 130 interrupted: the same command goes on.",
    )
    reproduce.add_argument("what", choices=(*MEASURED, "ct", "mri", "idt"))
    reproduce.add_argument(
        "--data",
        type=_path,
        metavar="FOLDER",
        help="for ct, mri and idt: holds train, validation and test with images (idt: volumes); folders in test are "
        "patients",
    )
    reproduce.add_argument(
        "--scale", choices=("cpu", "gpu"), default="cpu", help="how much is trained (default: cpu)"
    )
    reproduce.add_argument(
        "--output",
        type=_path,
        metavar="FOLDER",
        default=Path("oder-fast-reproduce"),
        help="where to write (default: oder-fast-reproduce)",
    )
    reproduce.add_argument(
        "--seed", type=_whole_number(0, 2**32), metavar="N", default=0, help="(default: 0)"
    )
    reproduce.set_defaults(run=_reproduce)
    info = commands.add_parser("info", help="say what was built, and why a backend is missing")
    info.set_defaults(run=_info)
    return parser


def _add_reconstruct(commands: Any) -> None:
    to = commands.add_parser(
        "reconstruct",
        help="reconstruct files by a checkpoint of oder-fast train",
        description=(
            "Reconstruct sinograms, k-space or intensities, or with --simulate images that are measured first, and "
            "write the images to the output folder, in the tree of the folders given. What failed is listed at the "
            "end (failed.txt). The same command goes on with a run that was broken off."
        ),
        epilog="Exit status: 0 all done, 1 some failed, 2 bad input before the start, 130 interrupted.",
    )
    to.add_argument(
        "checkpoint", type=_path, metavar="CHECKPOINT", help="as best.pt in the folder of the run"
    )
    to.add_argument(
        "inputs",
        type=_path,
        nargs="+",
        metavar="INPUT",
        help="files or folders: NPY, NPZ, TIFF, HDF5 (fastMRI, ISMRMRD), MATLAB; with --simulate DICOM, PNG, NIfTI",
    )
    to.add_argument("--output", type=_path, metavar="FOLDER", required=True, help="where to write")
    to.add_argument(
        "--format",
        choices=("dicom", "tiff", "png", "npy", "npz", "nifti"),
        help="of what is written (default: npy for complex images, else tiff)",
    )
    to.add_argument(
        "--part", choices=("magnitude", "phase", "real", "imaginary"), help="of complex images, to be written"
    )
    to.add_argument(
        "--simulate",
        action="store_true",
        help="inputs are images: measure them as the run does, and compare (quality.csv)",
    )
    to.add_argument(
        "--image-size",
        type=_whole_number(1),
        nargs=2,
        metavar=("H", "W"),
        help="of the images of sinograms or intensities (default: that of the run's validation images; of a scan of a "
        "beamline its bins)",
    )
    to.add_argument(
        "--scale",
        type=_scale,
        metavar="SCALE",
        help="how values come to the model's unit: slice, none, or the window LOW:HIGH (default: the run's)",
    )
    to.add_argument(
        "--denoiser",
        metavar="MODULE:NAME",
        help="class to import, of a checkpoint whose denoiser is not of this package",
    )
    to.add_argument("--array", metavar="NAME", help="array of NPZ, HDF5 and MATLAB files that hold several")
    to.add_argument(
        "--select",
        type=_counter,
        action="append",
        default=[],
        metavar="NAME=N",
        help="contrast, phase, set, average or repetition of ISMRMRD files (default: each contrast, phase and set)",
    )
    to.add_argument("--maps", type=_path, metavar="FILE", help="coil maps (default: estimated by ESPIRiT)")
    to.add_argument(
        "--normalize", action="store_true", help="divide intensities by their background, and subtract 1"
    )
    to.add_argument("--tolerance", type=_decibels, metavar="X", help="of the solver (default: the run's)")
    to.add_argument("--max-iterations", type=_whole_number(1), metavar="N", help="(default: the run's)")
    to.add_argument(
        "--minibatch",
        type=_whole_number(0),
        metavar="N",
        help="views, coils or illuminations a step; 0 for all (default: the run's)",
    )
    to.add_argument(
        "--batch", type=_whole_number(1), metavar="N", default=4, help="images solved together (default: 4)"
    )
    to.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1... (default: auto)")
    to.add_argument("--threads", type=_whole_number(1), metavar="N", help="of the CPU (default: torch's)")
    to.add_argument(
        "--workers", type=_whole_number(1), metavar="N", default=2, help="threads that read (default: 2)"
    )
    to.add_argument(
        "--overwrite",
        action="store_true",
        help="do again what is done, and what another checkpoint or other settings made",
    )
    to.set_defaults(run=_reconstruct)


def _add_demos(demos: Any) -> None:
    ct = demos.add_parser(
        "ct",
        help="CT, from few views",
        description=(
            "Simulate a scan of a CT slice with few views, reconstruct by filtered back-projection, total variation, "
            "RED (all views a step) and ODER (a minibatch of views a step), print a table, and write figure.png, "
            "arrays.npz and denoiser.pt."
        ),
    )
    mri = demos.add_parser(
        "mri",
        help="parallel MRI, from few lines of k-space",
        description=(
            "Simulate an MR scan of a slice with 8 coils and few lines of k-space, reconstruct by zero filling, total "
            "variation, RED (all coils a step) and ODER (a minibatch of coils a step), print a table, and write "
            "figure.png, arrays.npz and denoiser.pt."
        ),
    )
    idt = demos.add_parser(
        "idt",
        help="intensity diffraction tomography of cells",
        description=(
            "Simulate images of cells in a microscope under light from many sides, reconstruct the refractive index by "
            "Tikhonov, total variation, RED (all illuminations a step) and ODER (a minibatch of illuminations a step), "
            "print a table, and write figure.png, arrays.npz and denoiser.pt."
        ),
    )

    def option(
        to: argparse.ArgumentParser,
        name: str,
        read: Callable[[str], Any],
        metavar: str,
        text: str,
        default: Any = None,
    ) -> None:
        shown = text if default is None else f"{text} (default: {default})"
        to.add_argument(name, type=read, metavar=metavar, help=shown, default=default)

    formats = "DICOM, TIFF, PNG, NPY or NPZ image"
    option(ct, "--input", _path, "FILE", f"{formats} (default: the CT slice of pydicom)")
    option(mri, "--input", _path, "FILE", f"{formats}, or NIfTI (default: the MR slice of matplotlib)")
    mri.add_argument("--phantom", action="store_true", help="image a brain-like phantom instead")
    option(mri, "--slice", _whole_number(0), "N", "slice of a NIfTI volume (default: the middle one)")
    option(
        mri, "--size", _whole_number(16, 2**14), "N", "longest side in pixels; larger images are reduced", 128
    )
    for demo in (ct, mri):
        option(demo, "--array", str, "NAME", "array of an NPZ file that holds several")
    for demo, folder in (
        (ct, "oder-fast-demo"),
        (mri, "oder-fast-demo-mri"),
        (idt, "oder-fast-demo-idt"),
    ):
        option(demo, "--output", _path, "FOLDER", "where to write", Path(folder))
    option(ct, "--views", _whole_number(2, 2**16), "N", "views, spread over 180 degrees", 45)
    option(ct, "--minibatch", _whole_number(1), "N", "views a step in ODER (default: a third of the views)")
    option(ct, "--snr", _noise, "DB", "signal-to-noise ratio of the scan", 50.0)
    option(mri, "--acceleration", _acceleration, "R", "all lines of k-space over the sampled ones", 4.0)
    mri.add_argument(
        "--estimate-maps",
        action="store_true",
        help="estimate the coil maps by ESPIRiT, not take them as known",
    )
    option(mri, "--minibatch", _whole_number(1), "N", "of the 8 coils a step in ODER", 2)
    option(mri, "--snr", _noise, "DB", "signal-to-noise ratio of fully sampled k-space", 30.0)
    option(idt, "--size", _whole_number(16, 2**14), "N", "rows and columns", 96)
    option(idt, "--slices", _whole_number(2, 2**10), "N", "slices, 2 um apart", 6)
    option(idt, "--illuminations", _whole_number(1, 2**16), "N", "directions of the light", 64)
    option(
        idt, "--minibatch", _whole_number(1), "N", "illuminations a step in ODER (default: an eighth of all)"
    )
    option(idt, "--snr", _noise, "DB", "signal-to-noise ratio of what light scatters", 10.0)
    idt.add_argument(
        "--beam-propagation",
        action="store_true",
        help="measure by beam propagation, not by the model that reconstructs",
    )
    for demo in (ct, mri, idt):
        demo.add_argument(
            "--train",
            action="store_true",
            help="train a denoiser, for some minutes, in place of the one that comes with the package",
        )
    for demo, steps, through in ((ct, 1200, 60), (mri, 600, 60), (idt, 600, 100)):
        option(demo, "--steps", _whole_number(1), "N", f"training steps on noise (default: {steps})")
        option(
            demo,
            "--fixed-point-steps",
            _whole_number(0),
            "N",
            f"training steps through the fixed point (default: {through})",
        )
        demo.set_defaults(defaults={"steps": steps, "fixed_point_steps": through})
        option(demo, "--seed", _whole_number(0, 2**32), "N", "the same seed gives the same numbers", 0)
        option(demo, "--threads", _whole_number(1), "N", "threads; more pay where the cores are idle", 1)
        demo.set_defaults(run=_demo)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 2 for bad input, 130 when interrupted."""
    given = list(sys.argv[1:] if argv is None else argv)
    # The first demo had no name; its options stay where they were.
    if (
        given[:1] == ["demo"]
        and (len(given) == 1 or given[1].startswith("-"))
        and not {"-h", "--help"} & {*given}
    ):
        given.insert(1, "ct")
    if given[:1] == ["train"]:
        # Settings may stand before and after options, which argparse's positional arguments may not.
        settings = [k for k in range(1, len(given)) if SETTING.match(given[k]) and given[k - 1] != "--output"]
        given = [a for k, a in enumerate(given) if k not in settings] + [
            "--set",
            *(given[k] for k in settings),
        ]
    arguments = _parser().parse_args(given)
    # Names of folders may hold what an output cannot show.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status: int = arguments.run(arguments)
    except MissingPackageError as error:
        print(f"oder-fast: {_said(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = "; the same command goes on from here" if given[:1] == ["reconstruct"] else ""
        print(f"\noder-fast: interrupted; no file was left half-written{again}", file=sys.stderr)
        return 130
    return status


if __name__ == "__main__":
    sys.exit(main())
