"""What a training run is made of, read from YAML or TOML and checked before anything starts."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    NonNegativeFloat,
    PositiveFloat,
    ValidationError,
    model_validator,
)

from .._extras import needs
from ..data.kspace import COUNTERS
from ..denoisers import KINDS


def _named(name: str) -> str:
    if not name or "\0" in name:
        raise ValueError("must be a name, which is not empty and holds no NUL")
    return name


# Every number that becomes work or memory has a bound: a configuration may come from elsewhere, in a checkpoint.
Share = Annotated[float, Field(gt=0, lt=1)]
Length = Annotated[float, Field(ge=1e-12, le=1e12)]
Decibels = Annotated[float, Field(ge=-300, le=300)]
Side = Annotated[int, Field(ge=1, le=2**14)]
Blocks = Annotated[int, Field(ge=1, le=2**16)]
Coils = Annotated[int, Field(ge=1, le=2**10)]
Iterations = Annotated[int, Field(ge=1, le=100_000)]
Threads = Annotated[int, Field(ge=1, le=2**10)]
Count = Annotated[int, Field(ge=1, le=10**9)]
CountFrom0 = Annotated[int, Field(ge=0, le=10**9)]
Name = Annotated[str, AfterValidator(_named)]
Names = Name | Annotated[list[Name], Field(min_length=1)]

MOST_VALUES = 100_000
"""Values in a configuration."""

DEEPEST = 32
"""Sections within sections of a configuration."""

MOST_KEYS = 1000
"""Keys of a section."""

MOST_PROBLEMS = 20
"""Problems that a message lists."""

MOST_PIXELS = 2**26
"""Of an image or volume."""

LARGEST_OPTIONS: Mapping[str, int] = {
    "depth": 256,
    "blocks": 64,
    "width": 4096,
    "channels": 4096,
    "in_channels": 4096,
    "out_channels": 4096,
    "neighbours": 64,
    "dilations": 4096,
}
"""Largest numbers in the options of the denoisers of this package."""

MOST_LEVELS = 8
"""Of the denoisers of this package: each halves the image."""


class ConfigurationError(ValueError):
    """A setting that is unknown, missing, of the wrong type or out of range."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)


class CT(_Section):
    """Parallel-beam CT (`oder_fast.ParallelBeamCT`).

    Attributes:
        angles: Number of views, evenly over 180 degrees; or the angles in radians.
        n_bins: Of the detector; by default as many as see the whole image.
        bin_spacing: Distance of bins, in the unit of `pixel_size`.
        bin_offset: Position of the detector's centre relative to the axis of rotation, in the unit of `pixel_size`.
        pixel_size: Distance of pixels.
        sampling: Of minibatches: ``"uniform"`` or ``"stratified"``.
        snr: Of the simulated scan, in dB; None for no noise.
        photons: Per bin; simulates Poisson noise in place of white noise.
    """

    kind: Literal["ct"] = "ct"
    angles: Blocks | Annotated[list[FiniteFloat], Field(min_length=1, max_length=2**16)] = 90
    n_bins: Blocks | None = None
    bin_spacing: Length | None = None
    bin_offset: FiniteFloat = 0.0
    pixel_size: Length = 1.0
    sampling: Literal["uniform", "stratified"] = "stratified"
    snr: Decibels | None = 50.0
    photons: Annotated[float, Field(gt=0, le=1e12)] | None = None


class MRI(_Section):
    """Parallel MRI (`oder_fast.CartesianMRI`); the data's own coil maps, or a birdcage's.

    Attributes:
        coils: Of the birdcage, for images without maps.
        mask: Of k-space, drawn anew for each image in training.
        acceleration: All samples over the sampled ones.
        center_fraction: Share of the lines that are fully sampled, in the middle (``"lines"`` masks).
        spokes: Of a ``"radial"`` mask.
        snr: Of the simulated scan, in dB; None for no noise. Measured k-space keeps its own noise alone.
    """

    kind: Literal["mri"] = "mri"
    coils: Coils = 8
    mask: Literal["random_lines", "equispaced_lines", "gaussian_lines", "poisson_disc", "radial"] = (
        "random_lines"
    )
    acceleration: Annotated[float, Field(ge=1, le=2**10)] = 4.0
    center_fraction: Share = 0.08
    spokes: Blocks = 32
    snr: Decibels | None = 30.0


class IDT(_Section):
    """Intensity diffraction tomography (`oder_fast.DiffractionTomography`); lengths in micrometres.

    Attributes:
        depths: Of the slices, growing along the light.
        rings: Of LEDs: how many, and the sine of their angle, of each ring.
        pixel_size: Of the camera.
        wavelength: In vacuum.
        numerical_aperture: Of the objective.
        medium_index: Refractive index of the medium.
        magnification: Of the objective.
        thickness: Of a slice; needed for one slice alone.
        axial: ``"exact"`` or ``"vacuum"``.
        contrast_unit: Permittivity contrast that the denoiser sees as 1.
        snr: Of the simulated scan, in dB; None for no noise.
    """

    kind: Literal["idt"] = "idt"
    depths: Annotated[list[FiniteFloat], Field(min_length=1, max_length=2**10)]
    rings: Annotated[list[tuple[Coils, Length]], Field(min_length=1, max_length=2**6)]
    pixel_size: Length
    wavelength: Length
    numerical_aperture: Length
    medium_index: Length
    magnification: Length = 1.0
    thickness: Length | None = None
    axial: Literal["exact", "vacuum"] = "exact"
    contrast_unit: Length = 0.01
    snr: Decibels | None = 20.0


class PhantomsSection(_Section):
    """Synthetic images in place of files.

    Attributes:
        kind: See `oder_fast.data.Phantoms`.
        n: How many to train on.
        size: Rows and columns.
        options: Of the kind.
    """

    kind: Literal["ellipses", "shepp-logan", "shepp-logan-random", "brain", "cells"]
    n: Annotated[int, Field(ge=1, le=10**6)] = 1000
    size: Side = 128
    options: dict[str, Any] = {}


class Data(_Section):
    """Images to train on, and to validate with.

    Attributes:
        train: Folder or files of images (DICOM, TIFF, PNG, NPY, NPZ, NIfTI), or with `kspace` of fully sampled k-space.
        validation: The same; by default `validation_share` of the patients of `train`.
        validation_share: Share of the patients, where there is no `validation`; and of phantoms beyond `n`.
        phantoms: In place of files.
        kspace: Whether files hold k-space.
        scale: How values come to a unit: ``"slice"``, ``"none"`` or the window ``[low, high]``.
        array: Which array of NPZ and MATLAB files.
        select: Counters of ISMRMRD files, as ``{contrast: 1}``: ``contrast``, ``phase``, ``set``, ``average``,
            ``repetition`` (see `oder_fast.data.read_kspace`).
        patch: Train on random squares of this size.
        augment: Flip, turn by right angles and scale the brightness at random.
        cache: Folder in which what was read is kept.
        workers: Processes that load.
    """

    train: Names | None = None
    validation: Names | None = None
    validation_share: Share = 0.1
    phantoms: PhantomsSection | None = None
    kspace: bool = False
    scale: Literal["slice", "none"] | tuple[FiniteFloat, FiniteFloat] = "slice"
    array: Name | None = None
    select: dict[str, CountFrom0] = {}
    patch: Side | None = None
    augment: bool = True
    cache: Name | None = None
    workers: Annotated[int, Field(ge=0, le=2**10)] = 2

    @model_validator(mode="after")
    def _one_source(self) -> Data:
        if (self.train is None) == (self.phantoms is None):
            raise ValueError("needs either train (files) or phantoms")
        if self.phantoms is not None and (self.kspace or self.validation is not None):
            raise ValueError("kspace and validation are for files, not for phantoms")
        unknown = [name for name in self.select if name not in COUNTERS]
        if unknown:
            raise ValueError(f"select takes {', '.join(COUNTERS)}, got {unknown[0]!r}")
        if self.select and not self.kspace:
            raise ValueError("select is for k-space; set kspace: true")
        if self.kspace and self.patch is not None:
            raise ValueError("k-space cannot be cut into patches; drop patch")
        return self


class DenoiserSection(_Section):
    """The denoiser.

    Attributes:
        kind: ``"unet"``, ``"dncnn"``, ``"drunet"``, ``"slice_dncnn"``, or the class ``"module:Name"`` of one's own.
        options: Of its class; the channels are set to those of the images. Those of this package take at most 256
            layers, 64 blocks, 8 levels and 4096 channels.
        weights: File of a `state_dict`, or of a run of this package, to begin from.
    """

    kind: str = "unet"
    options: dict[str, Any] = {}
    weights: Name | None = None

    @model_validator(mode="after")
    def _bounded(self) -> DenoiserSection:
        for name, value in self.options.items() if self.kind in KINDS else ():
            numbers = value if isinstance(value, list | tuple) else [value]
            if len(numbers) > MOST_LEVELS:
                raise ValueError(f"options.{name} must name at most {MOST_LEVELS} levels, got {len(numbers)}")
            most = LARGEST_OPTIONS.get(name)
            if most is None:
                continue
            for number in numbers:
                if not isinstance(number, int) or number > most:
                    raise ValueError(f"options.{name} must be whole and at most {most}, got {_shown(number)}")
        return self


class RED(_Section):
    r"""The fixed point (`oder_fast.DEQRED`).

    Attributes:
        tau: Weight of the prior, in units of :math:`\|A\|^2`.
        train_tau: Whether it is trained with the denoiser.
        step: ``"proximal"``, which converges in about ten calls of the denoiser, or ``"gradient"``, the form in which
            RED and ODER were published.
        step_size: Of gradient steps, in units of :math:`1 / \|A\|^2`; by default that of `oder_fast.GradientStep`.
        minibatch_size: Blocks a step (views, coils, illuminations): of the inner solve in the proximal form, of each
            iteration in the gradient form; None for all.
        variance_reduction: Of the minibatches of gradient steps: true by default; false is ODER as published.
        solver: ``"anderson"``, ``"nesterov"`` or ``"picard"``; by default Picard's iteration where gradient steps take
            minibatches, Anderson's elsewhere.
        max_iterations: Of the forward solve; by default 100, and 1000 where gradient steps take minibatches.
        tolerance: Largest relative distance from the fixed point, estimated; by default 1e-3.
        adjoint_iterations: Of the adjoint solve; by default 100, and those of the forward solve where gradient steps
            take minibatches.
        adjoint_tolerance: Of the adjoint solve; by default 1e-2, and that of the forward solve where gradient steps
            take minibatches.
        differentiation: ``"implicit"``, ``"jacobian_free"`` or ``"unrolled"``.
        nonnegative: Keep images at 0 or above; by default for CT alone.
    """

    tau: PositiveFloat = 0.002
    train_tau: bool = False
    step: Literal["proximal", "gradient"] = "proximal"
    step_size: PositiveFloat | None = None
    minibatch_size: Blocks | None = None
    variance_reduction: bool | None = None
    solver: Literal["anderson", "nesterov", "picard"] | None = None
    max_iterations: Iterations | None = None
    tolerance: PositiveFloat | None = None
    adjoint_iterations: Iterations | None = None
    adjoint_tolerance: PositiveFloat | None = None
    differentiation: Literal["implicit", "jacobian_free", "unrolled"] = "implicit"
    nonnegative: bool | None = None

    @model_validator(mode="after")
    def _go_together(self) -> RED:
        for names, key, wanted in (
            (("step_size", "variance_reduction"), "step", "gradient"),
            (("adjoint_iterations", "adjoint_tolerance"), "differentiation", "implicit"),
        ):
            there = getattr(self, key)
            for name in names:
                if there != wanted and getattr(self, name) is not None:
                    raise ValueError(f"{name} is for {key}: {wanted}, got {key}: {there}")
        if self.solver == "anderson" and self.step == "gradient" and self.minibatch_size is not None:
            raise ValueError(
                "solver: anderson takes no minibatches of gradient steps; take nesterov or picard"
            )
        return self


class Stage(_Section):
    """A stage of training.

    Attributes:
        steps: Of the optimizer, Adam.
        batch_size: Images a step, in each process.
        learning_rate: Of Adam.
        schedule: ``"constant"``, or ``"cosine"``: to zero along half a cosine.
        clip_norm: Largest norm of a gradient; None for no limit.
        ema: Decay of the exponential moving average of the weights, which is what is validated and kept; None for none.
        precision: Of the denoiser; the fixed point and all sums stay in float32. ``"bfloat16"`` is for GPUs, and CPUs
            with instructions for it: on one without (AMD Zen 3) a forward and backward pass of `UNet` took 10 to 30
            times as long as in float32.
        loss: ``"mse"``, ``"l1"`` or ``"ssim"``, or weights of several.
    """

    steps: CountFrom0
    batch_size: Blocks = 8
    learning_rate: PositiveFloat = 1e-4
    schedule: Literal["constant", "cosine"] = "constant"
    clip_norm: PositiveFloat | None = 1.0
    ema: Share | None = 0.999
    precision: Literal["float32", "bfloat16"] = "float32"
    loss: Annotated[dict[Literal["mse", "l1", "ssim"], PositiveFloat], Field(min_length=1)] = {"mse": 1.0}

    @model_validator(mode="before")
    @classmethod
    def _name_of_one_loss(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and isinstance(value.get("loss"), str):
            return {**value, "loss": {value["loss"]: 1.0}}
        return value


class Pretraining(Stage):
    """Stage 1: the denoiser alone, on white noise.

    Attributes:
        sigma: Standard deviation of the noise, or its least and largest, drawn evenly; in the unit of the images.
    """

    steps: CountFrom0 = 10_000
    sigma: PositiveFloat | tuple[NonNegativeFloat, PositiveFloat] = 5 / 255

    @model_validator(mode="after")
    def _least_then_largest(self) -> Pretraining:
        if isinstance(self.sigma, tuple) and self.sigma[0] > self.sigma[1]:
            raise ValueError(f"sigma must be the least and then the largest, got {list(self.sigma)}")
        return self


class Training(Stage):
    """Stage 2: through the fixed point.

    Attributes:
        loss: As of stage 1; besides two that need no truth: ``"splitting"``, the error of measurements left out, and
            ``"sure"``, an unbiased estimate of the error of what is measured. ``"contraction"`` goes with others: a
            penalty where the map contracts less than it should, so that solves take tens of calls and not hundreds.
        share: Share of the measurements that ``"splitting"`` leaves out, drawn anew in each step.
        noise: Standard deviation of white Gaussian noise in the data, for ``"sure"``; of complex noise that of both
            parts together.
        contraction: Contraction factor of the proximal form above which ``"contraction"`` penalizes.
    """

    steps: CountFrom0 = 10_000
    batch_size: Blocks = 1
    loss: Annotated[
        dict[Literal["mse", "l1", "ssim", "splitting", "sure", "contraction"], PositiveFloat],
        Field(min_length=1),
    ] = {"mse": 1.0}  # type: ignore[assignment]
    share: Share = 0.4
    noise: PositiveFloat | None = None
    contraction: Share = 0.9

    @model_validator(mode="after")
    def _go_together(self) -> Training:
        if ("sure" in self.loss) != (self.noise is not None):
            raise ValueError("loss: sure needs the noise, and nothing else does: set training.noise with it")
        if set(self.loss) == {"contraction"}:
            raise ValueError("loss: contraction is a penalty; it goes with another loss")
        return self


class Validation(_Section):
    """How the run is watched.

    Attributes:
        every: Steps from one validation to the next.
        samples: Images, at most.
        images: Of them shown.
        patience: Validations without a better PSNR after which stage 2 ends; None for no end before the last step.
    """

    every: Count = 500
    samples: Count = 20
    images: Annotated[int, Field(ge=0, le=100)] = 4
    patience: Count | None = None


class Checkpoints(_Section):
    """How the run is kept.

    Attributes:
        every: Steps from one checkpoint to the next.
        keep: Checkpoints kept, the newest; besides, the best.
    """

    every: Count = 200
    keep: Annotated[int, Field(ge=2, le=10_000)] = 3


class Configuration(_Section):
    """A training run.

    Attributes:
        operator: The measurement: `CT`, `MRI` or `IDT`, told by its `kind`.
        data: The images.
        denoiser: The network.
        red: The fixed point.
        pretraining: Stage 1.
        training: Stage 2.
        validation: How the run is watched.
        checkpoints: How it is kept.
        output: Folder of everything that is written.
        seed: The same seed gives the same run.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``...
        threads: Of the CPU; None for torch's default.
        timeout: Seconds that processes wait for each other before a run over several ends with an error.
    """

    operator: Annotated[CT | MRI | IDT, Field(discriminator="kind")]
    data: Data
    denoiser: DenoiserSection = DenoiserSection()
    red: RED = RED()
    pretraining: Pretraining = Pretraining()
    training: Training = Training()
    validation: Validation = Validation()
    checkpoints: Checkpoints = Checkpoints()
    output: Name = "oder-fast-run"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    device: str = "auto"
    threads: Threads | None = None
    timeout: Annotated[float, Field(gt=0, le=1e7)] = 1800.0

    @model_validator(mode="after")
    def _kspace_is_of_mri(self) -> Configuration:
        if self.data.kspace and self.operator.kind != "mri":
            raise ValueError(f"data.kspace needs the operator mri, got {self.operator.kind}")
        return self


RUN_MAY_CHANGE = (
    "output",
    "device",
    "threads",
    "timeout",
    "checkpoints",
    "validation",
    "data.workers",
    "data.cache",
    "training.steps",
)
"""What may differ when a run is resumed: where and (with a constant schedule) how long, not what is computed."""


def read_configuration(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()
) -> Configuration:
    """Read a configuration, and check all of it.

    Args:
        source: A YAML or TOML file, told apart by its suffix; or the tree itself.
        overrides: Settings that win over the file's, as ``"training.steps=500"``; values are written as in YAML.

    Raises:
        OSError: Where the file cannot be read.
        ConfigurationError: For a file that is neither, a key that is unknown (the nearest known one is told) or
            missing, a value of the wrong type or out of range; all of them at once.

    Example:
        >>> configuration = read_configuration(
        ...     {"operator": {"kind": "ct"}, "data": {"phantoms": {"kind": "ellipses"}}}, ["operator.angles=30"]
        ... )
        >>> configuration.operator.angles, configuration.training.learning_rate
        (30, 0.0001)
    """
    name = "the configuration" if isinstance(source, Mapping) else str(source)
    tree = dict(source) if isinstance(source, Mapping) else _parse(Path(source))
    for override in overrides:
        _override(tree, override)
    return as_configuration(tree, name)


def as_configuration(tree: Any, name: str) -> Configuration:
    """Return the configuration of a tree, with messages that begin with a name.

    Raises:
        ConfigurationError: As `read_configuration` does.
    """
    try:
        return Configuration.model_validate(_plain(tree, name))
    except ValidationError as error:
        raise ConfigurationError(
            "\n".join(f"{name}: {line}" for line in explain(error).split("\n"))
        ) from None


class _Loader(yaml.SafeLoader):
    """YAML in which a key stands once, and aliases do not multiply."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set[str]()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} is set twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MOST_KEYS:
            raise yaml.MarkedYAMLError(problem=f"over {MOST_KEYS} keys", problem_mark=node.start_mark)


def _from_yaml(text: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f"line {mark.line + 1}: "
        raise ValueError(f"{where}{error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def _parse(path: Path) -> dict[str, Any]:
    if path.suffix == ".toml":
        if sys.version_info >= (3, 11):
            import tomllib
        else:
            needs("reading TOML", "tomli")
            import tomli as tomllib
        parse: Callable[[str], Any] = tomllib.loads
    elif path.suffix in (".yaml", ".yml"):
        parse = _from_yaml
    else:
        raise ConfigurationError(f"{path}: must end in .yaml, .yml or .toml")
    try:
        tree = parse(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(
            f"{path}: not {'TOML' if path.suffix == '.toml' else 'YAML'}: {error}"
        ) from error
    if not isinstance(tree, dict):
        raise ConfigurationError(f"{path}: must hold settings by name, got {type(tree).__name__}")
    return tree


def _plain(tree: Any, name: str) -> Any:
    """Return a copy of what was read, with numbers such as 1e-4, which YAML 1.1 takes for text without a point.

    Raises:
        ConfigurationError: For what holds itself, or more than any configuration does.
    """
    left = MOST_VALUES

    def copy(value: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0 or depth > DEEPEST:
            raise ConfigurationError(
                f"{name}: must hold at most {MOST_VALUES} values, at most {DEEPEST} deep"
            )
        if isinstance(value, Mapping):
            return {key: copy(inner, depth + 1) for key, inner in value.items()}
        if isinstance(value, list):
            return [copy(inner, depth + 1) for inner in value]
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ConfigurationError(f"{name}: holds a whole number of more than 64 bits")
        is_number = isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value)
        return float(value) if is_number else value

    return copy(tree, 0)


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigurationError(f"{override!r} must be written key=value, as training.steps=500")
    try:
        value = _from_yaml(text)
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{_shown(override)}: not a YAML value: {error}") from error
    *sections, last = key.split(".")
    for section in sections:
        inner = tree.get(section)
        # Copied, so that the caller's tree stays as it was.
        tree[section] = dict(inner) if isinstance(inner, Mapping) else {}
        tree = tree[section]
    tree[last] = value


def explain(error: ValidationError) -> str:
    """Say in a line for each setting what is wrong."""
    # A value of none of several types is told once.
    lines = [*dict.fromkeys(_explain(problem) for problem in error.errors())]
    more = [f"and {len(lines) - MOST_PROBLEMS} more"] if len(lines) > MOST_PROBLEMS else []
    return "\n".join(lines[:MOST_PROBLEMS] + more)


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 200 else f"{text[:200]}..."


def _explain(problem: Any) -> str:
    """Say in a sentence what pydantic found."""
    where = [str(part) for part in problem["loc"]]
    section: type[BaseModel] = Configuration
    # The kind of operator is a branch of pydantic's, not a key of the user's.
    if where[:1] == ["operator"] and len(where) > 1 and where[1] in ("ct", "mri", "idt"):
        kinds: dict[str, type[BaseModel]] = {"ct": CT, "mri": MRI, "idt": IDT}
        section = kinds[where.pop(1)]
    else:
        for part in where[:-1]:
            field = section.model_fields.get(part)
            inner = field.annotation if field is not None else None
            candidates = [k for k in _classes(inner) if issubclass(k, BaseModel)]
            if not candidates:
                break
            section = candidates[0]
    # Branches of a value that may be of several types are no keys either.
    key = ".".join(part for part in where if part.replace("_", "").isalnum())
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(where[-1], section.model_fields, n=1, cutoff=0.4)
        return f"unknown key {key}" + (f"; did you mean {near[0]}?" if near else "")
    if problem["type"].startswith("union_tag"):
        return f"{key}.kind: must be ct, mri or idt, got {problem['ctx'].get('tag', 'none')!r}"
    if problem["type"] == "missing":
        return f"missing key {key}"
    said = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] in ("model_type", "model_attributes_type", "dict_type"):
        said = "must hold settings by name"
    got = "" if isinstance(problem["input"], Mapping | BaseModel) else f", got {_shown(problem['input'])}"
    return f"{key}: {said[:1].lower()}{said[1:]}{got}" if key else said


def _classes(annotation: Any) -> list[type]:
    if isinstance(annotation, type):
        return [annotation]
    return [k for part in get_args(annotation) for k in _classes(part)]


def differences(saved: Configuration, given: Configuration) -> list[str]:
    """Return the settings that change what a run computes and differ between two configurations."""
    may_change = [*RUN_MAY_CHANGE]
    if given.training.schedule == "cosine":  # which ends with the last step
        may_change.remove("training.steps")

    def flat(tree: Any, key: str = "") -> dict[str, Any]:
        if not isinstance(tree, Mapping) or not tree:
            return {key: tree}
        return {
            k: v
            for name, part in tree.items()
            for k, v in flat(part, f"{key}.{name}" if key else name).items()
        }

    one, other = flat(saved.model_dump()), flat(given.model_dump())
    return [
        f"{key} was {one.get(key)!r} and is {other.get(key)!r}"
        for key in sorted({*one, *other})
        if one.get(key) != other.get(key)
        and not any(key == may or key.startswith(may + ".") for may in may_change)
    ]
