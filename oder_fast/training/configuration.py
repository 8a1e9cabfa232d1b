"""What a training run is made of, read from YAML or TOML and checked before anything starts."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from ..data.kspace import COUNTERS

Share = Annotated[float, Field(gt=0, lt=1)]
Source = str | list[str]


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
        pixel_size: Distance of pixels.
        sampling: Of minibatches: ``"uniform"`` or ``"stratified"``.
        snr: Of the simulated scan, in dB; None for no noise.
        photons: Per bin; simulates Poisson noise in place of white noise.
    """

    kind: Literal["ct"] = "ct"
    angles: PositiveInt | list[FiniteFloat] = 90
    n_bins: PositiveInt | None = None
    bin_spacing: PositiveFloat | None = None
    pixel_size: PositiveFloat = 1.0
    sampling: Literal["uniform", "stratified"] = "stratified"
    snr: FiniteFloat | None = 50.0
    photons: PositiveFloat | None = None


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
    coils: PositiveInt = 8
    mask: Literal["random_lines", "equispaced_lines", "gaussian_lines", "poisson_disc", "radial"] = (
        "random_lines"
    )
    acceleration: Annotated[float, Field(ge=1)] = 4.0
    center_fraction: Share = 0.08
    spokes: PositiveInt = 32
    snr: FiniteFloat | None = 30.0


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
    depths: list[FiniteFloat]
    rings: list[tuple[PositiveInt, PositiveFloat]]
    pixel_size: PositiveFloat
    wavelength: PositiveFloat
    numerical_aperture: PositiveFloat
    medium_index: PositiveFloat
    magnification: PositiveFloat = 1.0
    thickness: PositiveFloat | None = None
    axial: Literal["exact", "vacuum"] = "exact"
    contrast_unit: PositiveFloat = 0.01
    snr: FiniteFloat | None = 20.0


class PhantomsSection(_Section):
    """Synthetic images in place of files.

    Attributes:
        kind: See `oder_fast.data.Phantoms`.
        n: How many to train on.
        size: Rows and columns.
        options: Of the kind.
    """

    kind: Literal["ellipses", "shepp-logan", "shepp-logan-random", "brain", "cells"]
    n: PositiveInt = 1000
    size: PositiveInt = 128
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

    train: Source | None = None
    validation: Source | None = None
    validation_share: Share = 0.1
    phantoms: PhantomsSection | None = None
    kspace: bool = False
    scale: Literal["slice", "none"] | tuple[FiniteFloat, FiniteFloat] = "slice"
    array: str | None = None
    select: dict[str, NonNegativeInt] = {}
    patch: PositiveInt | None = None
    augment: bool = True
    cache: str | None = None
    workers: NonNegativeInt = 2

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
        kind: ``"unet"``, ``"dncnn"``, ``"drunet"``, or the class ``"module:Name"`` of one's own.
        options: Of its class; the channels are set to those of the images.
        weights: File of a `state_dict`, or of a run of this package, to begin from.
    """

    kind: str = "unet"
    options: dict[str, Any] = {}
    weights: str | None = None


class RED(_Section):
    r"""The fixed point.

    Attributes:
        tau: Weight of the prior, in units of :math:`\|A\|^2`.
        train_tau: Whether it is trained with the denoiser.
        minibatch_size: Blocks a step (views, coils, illuminations); None is RED, a number ODER.
        variance_reduction: See `oder_fast.DEQRED`.
        solver: ``"nesterov"``, ``"picard"`` or ``"anderson"``.
        max_iterations: Of the forward solve.
        tolerance: Of the forward solve.
        adjoint_iterations: Of the adjoint solve.
        adjoint_tolerance: Of the adjoint solve.
        differentiation: ``"implicit"``, ``"jacobian_free"`` or ``"unrolled"``.
        nonnegative: Project on images of at least 0; by default for CT alone.
        cuda_graph: Replay the iterations on a GPU as CUDA graphs (see `oder_fast.DEQRED`); minibatches are then drawn
            there, and are others than without.
    """

    tau: NonNegativeFloat = 0.002
    train_tau: bool = False
    minibatch_size: PositiveInt | None = None
    variance_reduction: bool = True
    solver: Literal["nesterov", "picard", "anderson"] = "nesterov"
    max_iterations: PositiveInt = 180
    tolerance: PositiveFloat = 1e-4
    adjoint_iterations: PositiveInt = 100
    adjoint_tolerance: PositiveFloat = 1e-3
    differentiation: Literal["implicit", "jacobian_free", "unrolled"] = "implicit"
    nonnegative: bool | None = None
    cuda_graph: bool = False

    @model_validator(mode="after")
    def _check(self) -> RED:
        if self.train_tau and self.tau == 0:
            raise ValueError("train_tau needs a tau above 0 to begin with")
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

    steps: NonNegativeInt
    batch_size: PositiveInt = 8
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

    steps: NonNegativeInt = 10_000
    sigma: PositiveFloat | tuple[NonNegativeFloat, PositiveFloat] = 5 / 255

    @model_validator(mode="after")
    def _least_then_largest(self) -> Pretraining:
        if isinstance(self.sigma, tuple) and self.sigma[0] > self.sigma[1]:
            raise ValueError(f"sigma must be the least and then the largest, got {list(self.sigma)}")
        return self


class Training(Stage):
    """Stage 2: through the fixed point."""

    steps: NonNegativeInt = 10_000
    batch_size: PositiveInt = 1


class Validation(_Section):
    """How the run is watched.

    Attributes:
        every: Steps from one validation to the next.
        samples: Images, at most.
        images: Of them shown.
        patience: Validations without a better PSNR after which stage 2 ends; None for no end before the last step.
    """

    every: PositiveInt = 500
    samples: PositiveInt = 20
    images: NonNegativeInt = 4
    patience: PositiveInt | None = None


class Checkpoints(_Section):
    """How the run is kept.

    Attributes:
        every: Steps from one checkpoint to the next.
        keep: Checkpoints kept, the newest; besides, the best.
    """

    every: PositiveInt = 200
    keep: Annotated[int, Field(ge=2)] = 3


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
    output: str = "oder-fast-run"
    seed: NonNegativeInt = 0
    device: str = "auto"
    threads: PositiveInt | None = None
    timeout: PositiveFloat = 1800.0

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
    tree: dict[str, Any] = _with_numbers(
        dict(source) if isinstance(source, Mapping) else _parse(Path(source))
    )
    for override in overrides:
        _override(tree, override)
    try:
        return Configuration.model_validate(tree)
    except ValidationError as error:
        raise ConfigurationError(
            "\n".join(f"{name}: {line}" for line in explain(error).split("\n"))
        ) from None


def _parse(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8")
    tree: Any
    if path.suffix == ".toml":
        if sys.version_info >= (3, 11):
            import tomllib
        else:
            import tomli as tomllib
        try:
            tree = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigurationError(f"{path}: not TOML: {error}") from error
    elif path.suffix in (".yaml", ".yml"):
        import yaml

        try:
            tree = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigurationError(f"{path}: not YAML: {error}") from error
    else:
        raise ConfigurationError(f"{path}: must end in .yaml, .yml or .toml")
    if not isinstance(tree, dict):
        raise ConfigurationError(f"{path}: must hold settings by name, got {type(tree).__name__}")
    return tree


def _with_numbers(value: Any) -> Any:
    """Return what was read with numbers such as 1e-4, which YAML 1.1 takes for text without a point."""
    if isinstance(value, Mapping):
        return {name: _with_numbers(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_with_numbers(inner) for inner in value]
    is_number = isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value)
    return float(value) if is_number else value


def _override(tree: dict[str, Any], override: str) -> None:
    import yaml

    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigurationError(f"{override!r} must be written key=value, as training.steps=500")
    try:
        value = _with_numbers(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{override!r}: not a YAML value: {error}") from error
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
    return "\n".join(dict.fromkeys(_explain(problem) for problem in error.errors()))


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
    got = "" if isinstance(problem["input"], Mapping | BaseModel) else f", got {problem['input']!r}"
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
