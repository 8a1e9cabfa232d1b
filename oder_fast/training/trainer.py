"""Training of a denoiser, on noise and then through the fixed point, in runs that survive what happens to them."""

from __future__ import annotations

import copy
import math
import os
import platform
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from .._torch import Autocast
from ..data import psnr, ssim
from ..data.files import remove_unfinished
from ..data.samples import Batch, Sample, collate
from ..denoisers.call import ImageDenoiser, as_channels, from_channels
from ..fixed_point import FixedPointError, NotConvergedWarning, Solution
from ..operators.base import seen
from . import configuration as settings
from .checkpoints import (
    FORMAT,
    HALVINGS,
    CheckpointError,
    Position,
    checkpoint_path,
    configuration_of,
    list_checkpoints,
    locked,
    newest_checkpoint,
    random_states,
    remove_old,
    require_room,
    restore_random_states,
    save_checkpoint,
)
from .configuration import Configuration, ConfigurationError, differences
from .draws import (
    Draws,
    begin_worker,
    checked,
    collate_seeded,
    loading_context,
    positions,
    seed_generators,
    seed_of,
)
from .logs import SOLVED, Logs, Silence, clock, draw_images, duration
from .losses import LOSSES, contraction_loss, splitting_loss, sure_loss, total_loss
from .model import OWN, autocast, load_weights, make_denoiser, make_model, misfit, solve
from .processes import (
    any_process,
    average_gradients,
    pick_device,
    process_group,
    rank,
    same_everywhere,
    sum_over_processes,
    wait_for_all,
    world_size,
)
from .report import STAGES, write_report
from .scans import Measured, make_scan
from .sets import make_sets, training_transform

SMALLEST = 7
"""Rows and columns that the structural similarity of validation images needs."""

USUAL = 10.0
"""Largest magnitude of images that networks are initialized for, generously."""

CHECKPOINTS_OF_ROOM = 2
# Of a step through the fixed point, to tell how long a run takes.
TYPICAL_CALLS, TYPICAL_PRODUCTS = 15, 20
"""Beyond those that are kept: the one being written, and the tables and pictures."""


def truth_of(weights: Mapping[Any, float]) -> dict[str, float]:
    """Return the losses that compare with the truth."""
    return {name: weight for name, weight in weights.items() if name in LOSSES}


class RunError(RuntimeError):
    """A run that cannot go on."""


class Outcome(NamedTuple):
    """How a run ended.

    Attributes:
        best: Checkpoint with the best validation of stage 2 (of stage 1 where there was no other), if any.
        last: The last checkpoint.
        psnr: Of the best, in dB; NaN where nothing was validated.
        reason: Why it ended: ``"finished"``, ``"no better for long"`` or the name of a signal.
    """

    best: Path | None
    last: Path
    psnr: float
    reason: str


@dataclass
class _Stop:
    """Which signal asks the run to stop."""

    name: str | None = None
    before: dict[int, Any] = field(default_factory=dict)

    def __enter__(self) -> _Stop:
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self.before[number] = signal.signal(number, self._ask)
            except ValueError:
                break  # signals reach the main thread alone
        return self

    def _ask(self, number: int, _: Any) -> None:
        if self.name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
        if rank() == 0:
            # Not by print, which may be in the middle of something.
            os.write(2, b"\noder-fast: stops after this step, with a checkpoint\n")

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Trainer:
    """Train a denoiser on noise, and then through the fixed point.

    What is computed follows from the configuration alone: each image's noise, mask and augmentation from the seed and
    its position in the run, not from what was drawn before. So a run that was broken off and resumed gives on a CPU
    the same bits as one that was not, and two processes the gradients of one with twice the batch.

    Started by ``torchrun``, the processes train together: each takes its part of a batch of `batch_size` times as
    many images as there are processes, and the gradients are averaged. Only the first one writes.

    Args:
        configuration: What to do; see `read_configuration`.
        denoiser: In place of the one it names: any module from ``(B, C, H, W)`` to the same.
        train_set: In place of its data: a dataset of `oder_fast.data.Sample`.
        validation_set: The same; needed with `train_set`.
        progress: Whether to show a live line.

    Raises:
        ConfigurationError: For settings, data and denoiser that do not go together.
        OSError: For files that cannot be read.
        ValueError: For files that are damaged, or a device that is not here.

    Example:
        >>> import tempfile
        >>> from oder_fast.training import read_configuration
        >>> configuration = read_configuration({
        ...     "operator": {"kind": "ct", "angles": 8},
        ...     "data": {"phantoms": {"kind": "ellipses", "n": 4, "size": 16}, "workers": 0},
        ...     "denoiser": {"kind": "dncnn", "options": {"depth": 3, "width": 4}},
        ...     "pretraining": {"steps": 2}, "training": {"steps": 1}, "output": tempfile.mkdtemp()})
        >>> outcome = Trainer(configuration, progress=False).fit()
        >>> outcome.reason, outcome.last.name
        ('finished', 'checkpoint-1-00000001.pt')
    """

    def __init__(
        self,
        configuration: Configuration,
        *,
        denoiser: nn.Module | None = None,
        train_set: Dataset[Sample] | None = None,
        validation_set: Dataset[Sample] | None = None,
        progress: bool = True,
    ) -> None:
        if not isinstance(configuration, Configuration):
            raise TypeError(
                f"Trainer: configuration must be a Configuration (read_configuration), got "
                f"{type(configuration).__name__}"
            )
        if (train_set is None) != (validation_set is None):
            raise ConfigurationError("Trainer: give both train_set and validation_set, or neither")
        self.device = pick_device(configuration.device)
        self.scan = make_scan(configuration.operator)
        if train_set is None or validation_set is None:
            train_set, validation_set = make_sets(configuration, self.scan)
        self.train_set, self.validation_set = train_set, validation_set
        if denoiser is not None:
            section = configuration.denoiser.model_copy(update={"kind": OWN, "options": {}})
            configuration = configuration.model_copy(update={"denoiser": section})
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed_of(configuration.seed, "weights"))
                denoiser = make_denoiser(configuration.denoiser, self.scan.channels)
        self.configuration = configuration
        self.stages: tuple[settings.Pretraining, settings.Training] = (
            configuration.pretraining,
            configuration.training,
        )
        self.folder = Path(configuration.output)
        self.model = make_model(denoiser, configuration.red, self.scan.nonnegative).to(self.device)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        if not self.parameters:
            raise ConfigurationError("denoiser: has no parameter that requires a gradient: nothing to train")
        self.progress = progress
        self.position = Position()
        self.ema: dict[str, Tensor] | None = None
        self.optimizer = self._new_optimizer()
        self._check_samples()

    # -------------------------------------------------------------- before anything long starts

    def _check_samples(self) -> None:
        """Go the way from a sample to the loss once, all but the solve."""
        for name, samples in (("train", self.train_set), ("validation", self.validation_set)):
            if len(samples) == 0:  # type: ignore[arg-type]
                raise ConfigurationError(f"data: the {name} set is empty")
        red = self.configuration.red
        try:
            whole = self.scan.prepare(checked(self.validation_set[0]), torch.Generator()).image
            self.image_shape = tuple(whole.shape)
            batch, seeds = collate_seeded([self._draws(1)[0]])
        except (ValueError, TypeError) as error:
            raise ConfigurationError(f"data: {error}") from error
        self.largest = float(batch.image.abs().max())
        self.sample = torch.zeros_like(batch.image[:1])
        if self.stages[1].steps and self.model.nonnegative and not whole.is_complex():
            least = min(float(whole.min()), float(batch.image.min()))
            if least < -0.01 * self.largest:
                warnings.warn(
                    f"data: images go down to {least:.3g}, and red.nonnegative keeps those reconstructed from going "
                    "below 0: set it to false, or scale the images (data.scale)",
                    stacklevel=3,
                )
        shape = tuple(batch.image.shape[1:])
        try:
            self.scan.check(self.image_shape, whole.is_complex())
            self.scan.check(shape, batch.image.is_complex())
            measured = self.scan.measure(batch, [torch.Generator().manual_seed(seeds[0])])
        except (ValueError, TypeError) as error:
            raise ConfigurationError(f"operator: {error}") from error
        size, blocks = red.minibatch_size, measured.operator.n_blocks
        if size is not None and size > blocks:
            raise ConfigurationError(f"red.minibatch_size: must be at most the {blocks} blocks, got {size}")
        for stage in self.stages:
            try:
                total_loss(truth_of(stage.loss) or {"mse": 1.0}, batch.image, batch.image)
            except ValueError as error:
                raise ConfigurationError(f"loss: {error}") from error
        stage = self.stages[1]
        if stage.steps and batch.measured is not None and truth_of(stage.loss):
            raise ConfigurationError(
                f"training.loss: {', '.join(truth_of(stage.loss))} needs the truth, and {batch.names[0]} has "
                "measurements alone; take splitting or sure"
            )
        if stage.steps and "splitting" in stage.loss:
            try:
                measured.operator.split(measured.data, stage.share, torch.Generator())
            except ValueError as error:
                raise ConfigurationError(f"training.share: {error}") from error
        if min(self.image_shape[-2:]) < SMALLEST:
            raise ConfigurationError(
                f"data: validation images must have at least {SMALLEST} rows and columns, got {self.image_shape}"
            )
        self._check_denoiser(batch.image)

    def _check_denoiser(self, image: Tensor) -> None:
        was_training = self.model.training
        try:
            with torch.no_grad():
                channels = as_channels(image.to(self.device))
                denoised = self.model.eval().denoiser(channels)
        except (ValueError, TypeError, RuntimeError) as error:
            raise ConfigurationError(
                f"denoiser: does not take images of shape {tuple(image.shape[1:])}: {error}"
            ) from error
        finally:
            self.model.train(was_training)
        if denoised.shape != channels.shape:
            raise ConfigurationError(
                f"denoiser: must return the shape it got, {tuple(channels.shape)}, got {tuple(denoised.shape)}"
            )

    def _begin(self, resume: bool) -> None:
        """Make the folder, or take up the run that is in it."""
        weights = sum(t.numel() * t.element_size() for t in self.model.state_dict().values())
        # Weights, their average, two moments of Adam.
        room = 4 * weights * (self.configuration.checkpoints.keep + 1 + CHECKPOINTS_OF_ROOM)
        require_room(self.folder, room + 2**20)
        if not resume and list_checkpoints(self.folder):
            raise ConfigurationError(
                f"{self.folder}: holds a run already; resume it (--resume), or choose another output"
            )
        path, state, problems = newest_checkpoint(self.folder) if resume else (None, None, [])
        if problems and path is None:
            raise ConfigurationError(
                f"{self.folder}: none of its checkpoints is whole ({problems[0]}); remove them, or choose "
                "another output"
            )
        if path is not None and state is not None:
            self._restore(path, state)
        else:
            self._begin_stage()
        found = torch.tensor([self.position.stage, self.position.step], dtype=torch.float64)
        mean = sum_over_processes(found.clone().to(self.device, torch.float32)).cpu() / world_size()
        if not torch.equal(mean.double(), found):
            raise RunError(
                f"process {rank()} found another checkpoint than the others; is {self.folder} shared?"
            )
        same_everywhere(self.model)
        done = (self.position.stage, self.position.step, self._overall())
        self.logs: Logs = Logs(self.folder, done, self.progress) if rank() == 0 else Silence()
        for problem in problems:
            self.logs.say(f"{problem}; the one before is taken")
        if path is not None:
            self.logs.say(f"goes on from {path}")
        elif resume:
            self.logs.say(f"{self.folder} holds no checkpoint: starts anew")
        asked = self.stages[self.position.stage].steps
        if self.position.step > asked:
            self.logs.say(f"{self.position.step} steps are done already, and {asked} are asked for")
        if self.largest > USUAL:
            self.logs.say(
                f"images reach {self.largest:.3g}; networks, sigma and learning rates are for values of about 1: see "
                "data.scale"
            )
        if rank() == 0:
            self.logs.say(self._estimate())
            (self.folder / "images").mkdir(exist_ok=True)
            for folder in (self.folder, self.folder / "images"):
                remove_unfinished(folder)
            (self.folder / "configuration.json").write_text(
                self.configuration.model_dump_json(indent=2) + "\n"
            )

    def _estimate(self) -> str:
        """Tell about how long is left, by what a call of the denoiser and its derivative take."""
        try:
            denoiser = copy.deepcopy(self.model.denoiser)
        except (RuntimeError, TypeError):
            return "the denoiser cannot be copied, so how long this takes will be seen"
        image = as_channels(self.sample.to(self.device))
        call = both = math.inf
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            # The first call makes what later ones find; the machine may have other things to do.
            begin, rounds = clock(self.device), 0
            while rounds < 2 or (rounds < 10 and clock(self.device) - begin < 1):
                start, rounds = clock(self.device), rounds + 1
                with torch.no_grad():
                    denoiser(image)
                call = min(call, clock(self.device) - start)
                start = clock(self.device)
                denoiser(image.requires_grad_()).sum().backward()
                both = min(both, clock(self.device) - start)
        # Of a solve, and of its adjoint, in which each product is a backward pass.
        solve = TYPICAL_CALLS * call + TYPICAL_PRODUCTS * (both - call) + both
        position, parts, total = self.position, [], 0.0
        for number, (stage, one) in enumerate(zip(self.stages, (both, solve), strict=True)):
            left = stage.steps - (position.step if number == position.stage else 0)
            if number < position.stage or left <= 0:
                continue
            seconds = one * stage.batch_size
            total += left * seconds
            what = ("on noise", "through the fixed point")[number]
            parts.append(f"{left} steps {what} of about {duration(seconds)}")
        return f"{' and '.join(parts) or 'no steps'}: {duration(total)} in all, if the machine stays as it is"

    # -------------------------------------------------------------- state

    def _new_optimizer(self) -> torch.optim.Adam:
        return torch.optim.Adam(self.parameters, lr=self.stages[self.position.stage].learning_rate)

    def _begin_stage(self) -> None:
        if self.ema is not None:
            load_weights(self.model, {**self.model.state_dict(), **self.ema})
        self.optimizer = self._new_optimizer()
        decay = self.stages[self.position.stage].ema
        self.ema = None if decay is None else {k: p.detach().clone() for k, p in self._trained()}

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def _state(self) -> dict[str, Any]:
        import oder_fast

        return {
            "configuration": self.configuration.model_dump(mode="json"),
            "position": self.position.model_dump(),
            "model": self.model.state_dict(),
            "ema": self.ema,
            "optimizer": self.optimizer.state_dict(),
            "random": random_states(),
            "image_shape": list(self.image_shape),
            "processes": world_size(),
            "versions": {
                "oder_fast": oder_fast.__version__,
                "torch": str(torch.__version__),
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
        }

    def _restore(self, path: Path, state: dict[str, Any]) -> None:
        if state["format"] < FORMAT:
            raise ConfigurationError(
                f"{path}: belongs to a run of version 0.1, which solved in another way: begin another run, in another "
                f"output, with its weights (denoiser.weights={path})"
            )
        saved = configuration_of(state, path)
        changed = differences(saved, self.configuration)
        if changed:
            raise ConfigurationError(
                f"{path}: belongs to another configuration: {'; '.join(changed)}; choose another output for this one"
            )
        if state["processes"] != world_size():
            raise ConfigurationError(
                f"{path}: belongs to a run of {state['processes']} processes, and here are {world_size()}: each step "
                "takes a batch from every one; go on with as many"
            )
        problem = misfit(self.model.state_dict(), state["model"])
        if problem:
            raise ConfigurationError(f"{path}: its weights do not fit the denoiser: {problem}")
        averaged = self.stages[state["position"]["stage"]].ema is not None
        problem = misfit(dict(self._trained()) if averaged else {}, state["ema"] or {})
        if problem:
            raise CheckpointError(f"{path}: its moving average does not fit the denoiser: {problem}")
        self.model.load_state_dict(state["model"])
        self.position = Position(**state["position"])
        self.position.reason = None
        self.ema = state["ema"] and {k: v.to(self.device) for k, v in state["ema"].items()}
        try:
            self._restore_optimizer(state["optimizer"]["state"])
            restore_random_states(state["random"])
        except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{path}: its optimizer or its random numbers are not of this run: {error}"
            ) from error

    def _restore_optimizer(self, moments: dict[int, Any]) -> None:
        """Take the moments of a checkpoint, and all else from the configuration."""
        self.optimizer = self._new_optimizer()
        for number, of_one in moments.items():
            p = self.parameters[number]
            problem = misfit({"step": torch.zeros(()), "exp_avg": p, "exp_avg_sq": p}, of_one)
            if problem:
                raise ValueError(problem)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})

    def _save(self, path: Path | None = None) -> Path:
        position = self.position
        path = path or checkpoint_path(self.folder, position.stage, position.step)
        if rank() == 0:
            save_checkpoint(path, self._state())
            remove_old(self.folder, self.configuration.checkpoints.keep)
        return path

    def _overall(self) -> int:
        """Return the steps taken in both stages."""
        return self.position.step + (self.stages[0].steps if self.position.stage else 0)

    # -------------------------------------------------------------- data

    def _draws(self, stage: int) -> Draws:
        key = (self.configuration.seed, "training", stage)
        transform = training_transform(self.configuration.data)
        return Draws(self.train_set, transform, self.scan, key, with_kspace=stage == 1)

    def _loader(self) -> Iterator[tuple[Batch, list[int]]]:
        section, workers = self.stages[self.position.stage], self.configuration.data.workers
        return iter(
            DataLoader(
                self._draws(self.position.stage),
                batch_sampler=positions(self.position.step, section.batch_size),
                num_workers=workers,
                multiprocessing_context=loading_context() if workers else None,
                collate_fn=collate_seeded,
                worker_init_fn=begin_worker,
                pin_memory=self.device.type == "cuda",
                # Workers are seeded from here, not from the state that a checkpoint keeps.
                generator=torch.Generator().manual_seed(0),
            )
        )

    # -------------------------------------------------------------- steps

    def _autocast(self) -> AbstractContextManager[Any]:
        return autocast(self.stages[self.position.stage], self.device)

    def _denoise(self, image: Tensor, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
        """Return noisy images, and what the denoiser makes of them."""
        sigma = self.stages[0].sigma
        low, high = sigma if isinstance(sigma, tuple) else (sigma, sigma)
        clean = as_channels(image)
        noise = []
        for g in generators:
            level = low + (high - low) * float(torch.rand((), generator=g))
            noise.append(level * torch.randn(clean.shape[1:], generator=g, dtype=clean.dtype))
        noisy = from_channels(clean + torch.stack(noise).to(clean.device), image)
        with self._autocast():
            return noisy, ImageDenoiser(self.model.denoiser, Autocast(self.device))(noisy)

    def _compute(self, batch: Batch, seeds: list[int]) -> tuple[Tensor, dict[str, Any], Any]:
        """Return the loss, what the log tells of the solve, and its solution."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        loss = self.stages[self.position.stage].loss
        if self.position.stage == 0:
            _, denoised = self._denoise(batch.image, generators)
            return total_loss(loss, denoised, batch.image), {}, None
        measured = self.scan.measure(batch, generators)
        minibatches = torch.Generator().manual_seed(self._minibatch_seed())
        drawn = torch.Generator().manual_seed(
            seed_of(self.configuration.seed, "splitting", self.position.step)
        )
        with self._autocast():
            value, solution = self._objective(measured, batch.image, minibatches, drawn, generators)
        row = {
            "iterations": float(solution.iterations.double().mean()),
            "denoiser_calls": solution.denoiser_calls,
            "operator_calls": solution.operator_calls,
            "residual": float(solution.residual.max()),
            "converged": float(solution.converged.double().mean()),
        }
        return value, row, solution

    def _objective(
        self,
        measured: Measured,
        truth: Tensor,
        minibatches: torch.Generator,
        drawn: torch.Generator,
        generators: Sequence[torch.Generator],
    ) -> tuple[Tensor, Solution]:
        """Return the loss of stage 2, and the solution it is made from: of all measurements where a term needs that."""
        section = self.stages[1]
        operator, y = measured
        terms, whole = [], None
        if truth_of(section.loss) or section.noise is not None:
            whole = solve(self.model, measured, minibatches)
        if whole is not None and truth_of(section.loss):
            terms.append(total_loss(truth_of(section.loss), whole.value, truth))
        if whole is not None and section.noise is not None:
            there = seen(operator, whole.value.detach())
            noise = [
                torch.randn(one.shape, generator=g, dtype=y.dtype)
                for one, g in zip(y, generators, strict=True)
            ]
            probe = torch.stack(noise).to(y.device) * there
            # A step of the noise's size: the derivative that the noise itself sees.
            beside = solve(self.model, Measured(operator, y + section.noise * probe), minibatches)
            count = there.expand(y.shape).flatten(1).sum(1)
            foretold = operator(whole.value), operator(beside.value)
            estimate = sure_loss(*foretold, y, probe, section.noise, section.noise, count)
            terms.append(section.loss["sure"] * estimate)
        if "splitting" in section.loss:
            stays, left_out = operator.split(y, section.share, drawn)
            of_part = solve(self.model, Measured(*stays), minibatches)
            terms.append(section.loss["splitting"] * splitting_loss(of_part.value, left_out))
            whole, measured = (of_part, Measured(*stays)) if whole is None else (whole, measured)
        assert whole is not None
        if "contraction" in section.loss:
            terms.append(section.loss["contraction"] * self._contraction(measured, whole, generators))
        return torch.stack(terms).sum(), whole

    def _contraction(
        self, measured: Measured, solution: Solution, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """Return the penalty of a map that hardly contracts, where it was solved."""
        operator, y = measured
        point = solution.value.detach()
        probe = [
            torch.randn(one.shape, generator=g, dtype=one.dtype)
            for one, g in zip(point, generators, strict=True)
        ]
        return contraction_loss(
            ImageDenoiser(self.model.denoiser, Autocast(self.device)),
            operator.least_squares(y),
            point,
            float(self.model.tau) * operator.norm_squared(),
            self.stages[1].contraction,
            torch.stack(probe).to(point.device),
            (point > 0).to(point.dtype) if self.model.nonnegative else None,
        )

    def _minibatch_seed(self) -> int:
        # All processes draw the same minibatches: so each image sees what it would see in one process.
        return seed_of(self.configuration.seed, "minibatches", self.position.step)

    def _step(self, batch: Batch, seeds: list[int]) -> dict[str, Any]:
        """Take one step of the optimizer, or leave a batch out that has no gradient; return what the log tells."""
        position, section = self.position, self.stages[self.position.stage]
        batch = batch.to(self.device)
        # What dropout draws follows from the position too, in every process.
        seed_generators(self.configuration.seed, "global", position.stage, position.step, rank())
        row = self._try_gradient(batch, seeds)
        if isinstance(row, str):
            self._back_off(row)
            return {"halvings": position.halvings}
        norm = torch.nn.utils.clip_grad_norm_(
            self.parameters, math.inf if section.clip_norm is None else section.clip_norm
        )
        rate = section.learning_rate * 0.5**position.halvings
        if section.schedule == "cosine":
            rate *= 0.5 * (1 + math.cos(math.pi * position.step / section.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        if self.ema is not None and section.ema is not None:
            # The first steps weigh more: weights as they were drawn are no part of a mean.
            decay = min(section.ema, (1 + position.step) / (10 + position.step))
            for name, parameter in self._trained():
                self.ema[name].lerp_(parameter.detach(), 1 - decay)
        tau = self.model.tau
        return row | {
            "gradient_norm": float(norm),
            "learning_rate": rate,
            "tau": float(tau.detach()) if isinstance(tau, Tensor) else tau,
            "halvings": position.halvings,
        }

    def _try_gradient(self, batch: Batch, seeds: list[int]) -> dict[str, Any] | str:
        """Compute the gradient of all processes; return what the log tells, or why it cannot be used."""
        self.optimizer.zero_grad(set_to_none=True)
        reason, loss, solution = "", None, None
        row: dict[str, Any] = {}
        try:
            loss, row, solution = self._compute(batch, seeds)
            if not bool(loss.isfinite()):
                reason = f"the loss is {float(loss.detach())}"
        except FixedPointError as error:
            reason = str(error)
        # Agreed on before the backward pass, and again after it: no process waits for one that failed.
        if any_process(bool(reason), self.device):
            return reason or "another process could not solve"
        assert loss is not None
        try:
            with warnings.catch_warnings():
                # How far the adjoint solve came stands in the log.
                warnings.simplefilter("ignore", NotConvergedWarning)
                torch.autograd.backward(loss)
            if not all(bool(p.grad.isfinite().all()) for p in self.parameters if p.grad is not None):
                reason = "a gradient is not finite"
        except FixedPointError as error:
            reason = str(error)
        if any_process(bool(reason), self.device):
            return reason or "another process could not solve"
        average_gradients(self.parameters, self.model.buffers())
        mean = sum_over_processes(loss.detach().clone().reshape(1)) / world_size()
        if solution is not None and solution.adjoint:
            adjoint = solution.adjoint[-1]
            row["adjoint_iterations"] = float(adjoint.iterations.double().mean())
            row["adjoint_denoiser_calls"] = adjoint.denoiser_calls
            row["adjoint_operator_calls"] = adjoint.operator_calls
        return row | {"loss": float(mean)}

    def _back_off(self, reason: str) -> None:
        """Halve the learning rate from now on, or give up."""
        if self.position.stage == 0:
            raise RunError(
                f"pre-training, step {self.position.step}: {reason}; lower pretraining.learning_rate "
                f"({self.stages[0].learning_rate:g}), or look at the data"
            )
        if self.position.halvings == HALVINGS:
            raise RunError(
                f"training, step {self.position.step}: {reason}. Before, {HALVINGS} batches were left out and the "
                "learning rate halved after each, which did not help: the denoiser does not contract. Pre-train it "
                "longer, take spectral norms, or lower red.tau or training.learning_rate"
            )
        self.position.halvings += 1
        self.logs.say(
            f"step {self.position.step}: {reason}; backs off: the batch is left out, and the learning rate is halved "
            f"({self.position.halvings} of {HALVINGS} times)"
        )

    # -------------------------------------------------------------- validation

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Put in the averaged weights, and the evaluation mode."""
        now = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        if self.ema is not None:
            load_weights(self.model, {**now, **self.ema})
        self.model.eval()
        try:
            yield
        finally:
            self.model.load_state_dict(now)
            self.model.train()

    def _validate(self) -> None:
        """Compare reconstructions with truths, keep the best weights, draw some."""
        position, section = self.position, self.configuration.validation
        count = min(section.samples, len(self.validation_set))  # type: ignore[arg-type]
        sums = torch.zeros(11, dtype=torch.float32, device=self.device)
        shown = []
        failed = None
        with self._evaluating(), torch.no_grad():
            for k in range(rank(), count, world_size()):
                try:
                    values, drawn = self._validate_one(k)
                except FixedPointError as error:
                    failed = str(error)
                    continue
                if values is None:
                    sums[-1] += 1
                    continue
                sums += torch.tensor([*values, 1.0, 0.0], device=self.device)
                if k < section.images:
                    shown.append(drawn)
        sums = sum_over_processes(sums)
        n, uniform = sums[-2:].tolist()
        if uniform:
            self.logs.say(f"{uniform:.0f} of {count} validation images are uniform and left out")
        if n == 0:
            self.logs.say(
                f"step {position.step}: no validation image could be solved for: {failed or 'all are uniform'}"
            )
            return
        loss, quality, similarity, quality_0, similarity_0, *solved = (sums[:-2] / n).tolist()
        row = {
            "stage": position.stage,
            "step": position.step,
            "seconds": position.seconds,
            "loss": loss,
            "psnr": quality,
            "ssim": similarity,
            "psnr_start": quality_0,
            "ssim_start": similarity_0,
            **(dict(zip(SOLVED, solved, strict=True)) if position.stage else {}),
        }
        self.logs.validated(self._overall(), row)
        self.logs.say(
            f"{STAGES[position.stage]}, step {position.step}: PSNR {quality:.2f} dB (start {quality_0:.2f}), "
            f"SSIM {similarity:.3f} (start {similarity_0:.3f})"
            + (f"; {1 - solved[-1]:.0%} of the solves did not converge" if solved[-1] < 1 else "")
        )
        if rank() == 0 and shown:
            path = self._picture_path()
            draw_images(path, shown)
            self.logs.picture(self._overall(), path)
        position.waiting += 1
        if quality > position.best or position.best_stage != position.stage:
            position.best, position.best_stage, position.waiting = quality, position.stage, 0
            self._save(self.folder / "best.pt")

    def _picture_path(self) -> Path:
        return self.folder / "images" / f"validation-{self.position.stage}-{self.position.step:08d}.png"

    def _validate_one(self, k: int) -> tuple[list[float] | None, tuple[str, Tensor, Tensor, Tensor]]:
        """Return the numbers of an image, and what is drawn of it; no numbers of a uniform one, which has no scale."""
        seed = self.configuration.seed
        seed_generators(seed, "validating", k)
        g = torch.Generator().manual_seed(seed_of(seed, "validation", k))
        batch = collate([self.scan.prepare(checked(self.validation_set[k]), g)]).to(self.device)
        truth = self.scan.show(batch.image[0]).cpu()
        if truth.min() == truth.max() and batch.measured is None:
            return None, (batch.names[0], truth, truth, truth)
        solved = [0.0, 0.0, 0.0, 1.0]
        compared = None
        if self.position.stage == 0:
            start, image = self._denoise(batch.image, [g])
            loss = float(total_loss(self.stages[0].loss, image, batch.image))
        else:
            measured = self.scan.measure(batch, [g])
            start = measured.operator.initial(measured.data)
            minibatches = torch.Generator().manual_seed(seed_of(seed, "validation minibatches", k))
            drawn = torch.Generator().manual_seed(seed_of(seed, "validation splitting", k))
            with self._autocast():
                value, solution = self._objective(measured, batch.image, minibatches, drawn, [g])
                loss = float(value)
                if not truth_of(self.stages[1].loss):
                    solution = solve(self.model, measured, minibatches)
                if batch.measured is not None:
                    compared = self._foretold(measured, minibatches, seed_of(seed, "validation part", k))
            image = solution.value
            solved = [
                float(solution.iterations[0]),
                solution.denoiser_calls,
                solution.operator_calls,
                float(solution.converged[0]),
            ]
        first, result = (self.scan.show(v[0]).cpu() for v in (start, image))
        if compared is not None:
            quality = [psnr(compared[0], compared[2]), math.nan, psnr(compared[1], compared[2]), math.nan]
        else:
            quality = [psnr(result, truth), ssim(result, truth), psnr(first, truth), ssim(first, truth)]
        truth, first, result = (v if v.ndim == 2 else v[len(v) // 2] for v in (truth, first, result))
        return [loss, *quality, *solved], (batch.names[0], truth, first, result)

    def _foretold(self, measured: Measured, minibatches: torch.Generator, seed: int) -> tuple[Tensor, ...]:
        """Return measurements left out: as the others' reconstruction and its start foretell them, and as they are."""
        share = self.stages[1].share
        stays, left_out = measured.operator.split(measured.data, share, torch.Generator().manual_seed(seed))
        images = solve(self.model, Measured(*stays), minibatches).value, stays.operator.initial(stays.y)
        return *(left_out.operator(v)[0].cpu() for v in images), left_out.y[0].cpu()

    # -------------------------------------------------------------- the run

    def fit(self, *, resume: bool = False) -> Outcome:
        """Run, or go on with a run.

        Args:
            resume: Go on from the newest whole checkpoint in the output folder; where there is none, start.

        Returns:
            How the run ended. SIGTERM and Ctrl-C end it after the present step, with a checkpoint.

        Raises:
            ConfigurationError: Where the folder holds another run.
            OSError: Where the folder cannot be written, or has no room.
            RunError: Where the loss or the solver diverges and backing off does not help, a file of the data is
                damaged, or the folder cannot be written any more.
            LostProcessError: Where another process of the run is gone.
        """
        threads = torch.get_num_threads()
        if self.configuration.threads is not None:
            torch.set_num_threads(self.configuration.threads)
        try:
            with (
                process_group(self.device, self.configuration.timeout),
                _Stop() as stop,
                locked(self.folder) as require_folder,
            ):
                self._begin(resume)
                try:
                    try:
                        return self._run(stop, require_folder)
                    finally:
                        # TensorBoard's writer tells here of what it could not write.
                        self.logs.close()
                except OSError as error:
                    raise self._broken_off(
                        f"{self.folder}: cannot be written any more: {error.strerror or error}"
                    ) from error
                except RuntimeError as error:
                    if not str(error).startswith("DataLoader worker"):
                        raise
                    raise self._broken_off(
                        f"a process that loads data ended ({error}); was there memory enough? data.workers is "
                        f"{self.configuration.data.workers}"
                    ) from error
        finally:
            torch.set_num_threads(threads)

    def _broken_off(self, reason: str) -> RunError:
        """Return the error of a run that could not write a checkpoint where it ended."""
        whole = next(iter(list_checkpoints(self.folder)), "none")
        return RunError(
            f"{reason}; the newest checkpoint is {whole}; mend it, and go on with --resume (resume=True)"
        )

    def _run(self, stop: _Stop, require_folder: Callable[[], None]) -> Outcome:
        position = self.position
        self.model.train()
        reason = None
        while reason is None:
            reason = self._run_stage(stop, require_folder)
            if reason is None and position.stage == 0:
                position.stage, position.step, position.waiting = 1, 0, 0
                self._begin_stage()
            elif reason is None:
                reason = "finished"
        position.reason = reason
        last = self._save()
        if rank() == 0:
            self._report(reason)
        wait_for_all()
        best = self.folder / "best.pt"
        quality = position.best if math.isfinite(position.best) else math.nan
        return Outcome(best if best.exists() else None, last, quality, reason)

    def _run_stage(self, stop: _Stop, require_folder: Callable[[], None]) -> str | None:
        """Take the steps of a stage; return why the run is to end, or None where the stage is done."""
        position, section = self.position, self.stages[self.position.stage]
        every, watch = self.configuration.checkpoints.every, self.configuration.validation
        if position.step >= section.steps:
            return None
        if self._waits_too_long():
            return "no better for long"
        self.logs.begin_stage(STAGES[position.stage], section.steps, position.step)
        loader = self._loader()
        try:
            while position.step < section.steps:
                start = time.perf_counter()
                row = self._step(*self._load(loader))
                require_folder()
                position.step += 1
                position.seconds += time.perf_counter() - start
                where = {"stage": position.stage, "step": position.step, "seconds": position.seconds}
                self.logs.step(self._overall(), where | row)
                last = position.step == section.steps
                if last or position.step % watch.every == 0:
                    self._validate()
                if any_process(stop.name is not None, self.device):
                    return stop.name or "a signal to another process"
                if self._waits_too_long():
                    return "no better for long"
                if last or position.step % every == 0:
                    self._save()
        finally:
            self.logs.end_stage()
            del loader
        return None

    def _waits_too_long(self) -> bool:
        patience = self.configuration.validation.patience
        return self.position.stage == 1 and patience is not None and self.position.waiting >= patience

    def _load(self, loader: Iterator[tuple[Batch, list[int]]]) -> tuple[Batch, list[int]]:
        try:
            return next(loader)
        except (ValueError, TypeError, OSError) as error:
            # Of a worker's error the last line is the error itself.
            said = str(error).strip().splitlines()[-1]
            said = said.partition("Error: ")[2] or said
            path = self._save()
            raise RunError(
                f"{STAGES[self.position.stage]}, step {self.position.step}: {said}; wrote {path}: mend it, and go on "
                "with --resume (resume=True)"
            ) from error

    def _report(self, reason: str) -> None:
        position = self.position
        training, validation = self.logs.training.rows(), self.logs.validation.rows()
        summary = {
            "Ended": f"{reason}, after {self._overall()} steps and {position.seconds / 60:.1f} minutes",
            "Processes": f"{world_size()}, {self.device.type}",
            "Parameters": f"{sum(p.numel() for p in self.parameters):,}",
            "Seed": str(self.configuration.seed),
        }
        if math.isfinite(position.best):
            summary["Best validation"] = f"{position.best:.2f} dB ({STAGES[position.best_stage]}), best.pt"
        if position.halvings:
            summary["Backed off"] = (
                f"{position.halvings} batches were left out; the learning rate is {2**position.halvings} times lower"
            )
        pictures = sorted((self.folder / "images").glob("validation-*.png"))
        write_report(
            self.folder / "report.html",
            summary=summary,
            training=training,
            validation=validation,
            picture=pictures[-1] if pictures else None,
            configuration=self.configuration.model_dump_json(indent=2),
        )
