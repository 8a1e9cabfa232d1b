"""Measurements spread over the processes of a group: each has a part of them, all have the same image."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .._torch import kept
from . import _blocks, solve
from .base import LeastSquares, MeasurementOperator, Part, as_operator
from .ct import ParallelBeamCT, _angular_weights
from .idt import DiffractionTomography
from .mri import CartesianMRI

# Of conjugate gradients, for a start.
START_RESIDUAL = 0.01
START_WEIGHT = 0.01
# From the seed of one rank's minibatches to the next one's.
SEED_STRIDE = 7919
# Integers of a number of bytes.
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def split_blocks(n_blocks: int, rank: int, world_size: int) -> Tensor:
    r"""Return the blocks of one rank: every `world_size`-th from `rank` on, so that each has angles all around.

    .. math:: \{ r, \; r + W, \; r + 2 W, \dots \}

    Args:
        n_blocks: Number of blocks of the whole scan: views, coils or illuminations.
        rank: Of this process, 0 to ``world_size - 1``.
        world_size: Number of processes, at most `n_blocks`.

    Returns:
        int64 indices in increasing order, for the angles, coil maps or illuminations and for axis 1 of the data.

    Raises:
        TypeError: For an argument that is not an int.
        ValueError: For a rank out of range, or fewer blocks than processes.

    Example:
        >>> split_blocks(7, rank=1, world_size=3)
        tensor([1, 4])
    """
    for name, value in (("n_blocks", n_blocks), ("rank", rank), ("world_size", world_size)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"split_blocks: {name} must be an int, got {type(value).__name__}")
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"split_blocks: rank must be 0 to world_size - 1, got {rank} of {world_size}")
    if n_blocks < world_size:
        raise ValueError(f"split_blocks: each of {world_size} ranks needs a block, got {n_blocks}")
    return torch.arange(rank, n_blocks, world_size)


class MeasurementParallel(MeasurementOperator):
    r"""An operator whose measurements are spread over the processes of a `torch.distributed` group.

    .. math:: \nabla g(x) = \sum_r A_r^H (A_r x - y_r)

    Rank `r` has the operator :math:`A_r` and the data :math:`y_r` of its own blocks, and the same image as all others.
    It stands where an operator stands: each rank builds the same `DEQRED` around its own part, calls it with its own
    data, and gets the same images. A gradient costs one all-reduce of the image.

    Every rank computes the same loss from the same image, so gradients in the image are summed over the ranks and those
    in weights, step size and tau come out the same on each, with nothing left to average. Where a GPU's backward pass
    is not deterministic their rounding is not: wrap the model in ``DistributedDataParallel``, which averages it away
    and gives all ranks the weights of the first. The gradient in :math:`y_r` is of that part alone. The data must be of
    the same images on all ranks, which nothing can check: a loop that gives each process images of its own (`Trainer`
    does) is not for the processes of one group.

    All ranks must do the same in the same order: build this, solve, differentiate. `DEQRED` makes them agree before
    each solve: where a rank refuses its data, or something differs that must not, all raise. How a solve goes on is
    decided by the numbers of the first rank, whatever the rounding of the others. A rank that is lost ends the others
    with a `RuntimeError`: at once with Gloo, after the `timeout` given to ``init_process_group`` where it still holds
    its connections, or with NCCL, which ends the process.

    Args:
        local_operator: `ParallelBeamCT`, `CartesianMRI` or `DiffractionTomography` of this rank's blocks
            (`split_blocks`), or any operator with their methods; of one kind and one image shape on all ranks. Its
            parameters, where it has any, are not those of this module.
        group: Process group; None for all processes. NCCL needs ``torch.cuda.set_device`` first.

    Attributes:
        local_operator: As given.
        n_blocks: Blocks that every rank has, the largest minibatch: `minibatch_size` counts the blocks of one rank.
        image_shape: Of all ranks.
        data_shape: Of this rank's data.

    Raises:
        RuntimeError: Without a process group, or where a rank is lost.
        ValueError: For operators of different kinds or image shapes, or coil maps that are zero everywhere on all
            ranks; on some they may be.

    Example:
        >>> import tempfile, torch.distributed as dist
        >>> store = f"file://{tempfile.mkdtemp()}/store"
        >>> dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)  # torchrun gives all three
        >>> mine = split_blocks(30, dist.get_rank(), dist.get_world_size())
        >>> ct = MeasurementParallel(ParallelBeamCT(64, mine * torch.pi / 30))
        >>> ct.least_squares(torch.zeros(1, 30, 91)).gradient(torch.ones(1, 64, 64)).shape
        torch.Size([1, 64, 64])
        >>> dist.destroy_process_group()
    """

    local_operator: MeasurementOperator

    def __init__(self, local_operator: Any, group: Any = None) -> None:
        super().__init__()
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "MeasurementParallel: needs a process group: start with torchrun and call "
                "torch.distributed.init_process_group first"
            )
        self.group = group
        self.rank: int = dist.get_rank(group)
        self.world_size: int = dist.get_world_size(group)
        if self.rank < 0:
            raise RuntimeError("MeasurementParallel: this process is not in the group")
        self._norm_squared: float | None = None
        self._view_scale: Tensor | None = None
        self._generator: torch.Generator | None = None
        with self.agreement() as same:
            local_operator = as_operator(local_operator)
            same["the kind of operator"] = type(local_operator).__name__
            same["image_shape"] = tuple(local_operator.image_shape)
        # No submodule: DistributedDataParallel would give all ranks the geometry of the first.
        object.__setattr__(self, "local_operator", local_operator)
        seen = not isinstance(local_operator, CartesianMRI) or bool((local_operator.coil_maps != 0).any())
        blocks, sees = zip(*self._gather((local_operator.n_blocks, seen)), strict=True)
        if not any(sees):
            raise ValueError("MeasurementParallel: the coil maps of all ranks are zero everywhere")
        self.n_blocks: int = min(blocks)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MeasurementParallel:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if isinstance(self.local_operator, nn.Module):
            self.local_operator._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        # Generators cannot be copied; one of the same seed is made when it is needed.
        return self.__dict__ | {"_generator": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> MeasurementParallel:
        # A copy belongs to the same group, which is the connections themselves.
        memo[id(self.group)] = self.group
        copied = object.__new__(type(self))
        copied.__dict__ = copy.deepcopy(self.__getstate__(), memo)
        return copied

    def extra_repr(self) -> str:
        """Tell the rank and its operator."""
        return f"rank={self.rank}, world_size={self.world_size}, local_operator={self.local_operator}"

    @property
    def image_shape(self) -> tuple[int, ...] | None:  # type: ignore[override]
        """Of all ranks."""
        return self.local_operator.image_shape

    @property
    def data_shape(self) -> tuple[int, ...] | None:  # type: ignore[override]
        """Of this rank's data."""
        return self.local_operator.data_shape

    def split(self, y: Tensor, share: float, generator: torch.Generator | None = None) -> tuple[Part, Part]:
        """Refuse: split the whole scan before it is spread over processes."""
        raise ValueError(
            "MeasurementParallel: measurements spread over processes cannot be split; split those of the whole operator"
        )

    @contextmanager
    def _collective(self) -> Iterator[None]:
        """Say what it means where a collective call fails."""
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"MeasurementParallel: rank {self.rank} lost contact with another of the {self.world_size} ranks: look "
                "in their output for the one that ended or hangs, and start all anew"
            ) from error

    def _gather(self, value: Any) -> list[Any]:
        """Return the small objects of all ranks, in their order."""
        values: list[Any] = [None] * self.world_size
        with self._collective():
            dist.all_gather_object(values, value, group=self.group)
        return values

    @contextmanager
    def agreement(self) -> Iterator[dict[str, object]]:
        """Return a context for what may fail on one rank alone; at its end all ranks go on, or all raise.

        Yields:
            A dictionary to fill; what is put there, tensors bit for bit, must be the same on all ranks.

        Raises:
            RuntimeError: Where another rank raised, with its rank and message.
            ValueError: Where something differs.
        """
        same: dict[str, object] = {}
        try:
            yield same
            mine = {name: _checksum(value) for name, value in same.items()}
        except Exception as error:
            self._gather((f"{type(error).__name__}: {error}", {}))
            raise
        everyone = self._gather((None, mine))
        for rank, (failure, _) in enumerate(everyone):
            if failure is not None:
                raise RuntimeError(f"MeasurementParallel: rank {rank} gave up: {failure}")
        first = everyone[0][1]
        for rank, (_, values) in enumerate(everyone):
            for name, value in first.items():
                if values[name] != value:
                    raise ValueError(
                        f"MeasurementParallel: {name} must be the same on all ranks, got {value} on rank 0 and "
                        f"{values[name]} on rank {rank}"
                    )

    def agree(self, numbers: Tensor) -> Tensor:
        """Return the first rank's numbers, those that decide how an iteration goes on, without a graph."""
        agreed = numbers.detach().clone(memory_format=torch.contiguous_format)
        source = 0 if self.group is None else dist.get_global_rank(self.group, 0)
        with self._collective():
            dist.broadcast(agreed, source, group=self.group)
        return agreed

    def _sum(self, value: Tensor) -> Tensor:
        """Return the sum over the ranks, the same bits on all; differentiable any number of times."""
        total: Tensor = _Sum.apply(value, self._all_reduce)  # type: ignore[no-untyped-call]
        return total

    def _share(self, image: Tensor) -> Tensor:
        """Return the image that all ranks have; its gradient is the sum of theirs."""
        shared: Tensor = _Share.apply(image, self._all_reduce)  # type: ignore[no-untyped-call]
        return shared

    def _all_reduce(self, value: Tensor) -> Tensor:
        total = value.resolve_conj().clone(memory_format=torch.contiguous_format)
        with self._collective():
            dist.all_reduce(total, group=self.group)
        return total

    def forward(self, x: Tensor) -> Tensor:
        """Measure images with this rank's blocks; a backward pass through it is one of all ranks."""
        measured: Tensor = self.local_operator(self._share(x))
        return measured

    def adjoint(self, y: Tensor) -> Tensor:
        r"""Compute :math:`\sum_r A_r^H y_r` from each rank's data: the exact transpose of all ranks' `forward`."""
        return self._sum(self.local_operator.adjoint(y))

    def least_squares(self, y: Tensor) -> ParallelLeastSquares:
        r"""Return the data fidelity of all ranks, :math:`g(x) = \sum_r \tfrac12 \|A_r x - y_r\|^2`.

        Its gradients, its normal operator and each step of its inner solve cost one all-reduce of the image.

        Args:
            y: Data of this rank.
        """
        return ParallelLeastSquares(self, y)

    def normal(self, v: Tensor) -> Tensor:
        r"""Compute :math:`\sum_r A_r^H A_r v`, the same bits on all ranks."""
        return self._sum(self.local_operator.adjoint(self.local_operator(self._share(v))))

    def draw_blocks(self, size: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw a minibatch of this rank's blocks.

        Args:
            size: Number of blocks of this rank.
            generator: Source of randomness, seeded differently on each rank, or neighbouring blocks come together. None
                for one that is made from torch's seed and the rank: torch's own goes on alike on all ranks.

        Returns:
            int64 indices among this rank's blocks.
        """
        if generator is None:
            if self._generator is None:
                seed = (torch.initial_seed() + SEED_STRIDE * (self.rank + 1)) % 2**63
                self._generator = torch.Generator(self._device).manual_seed(seed)
            generator = self._generator
        drawn: Tensor = self.local_operator.draw_blocks(size, generator)
        return drawn

    def norm_squared(self, tolerance: float = 0.01, max_iterations: int = 200) -> float:
        r"""Estimate :math:`\| A \|^2` of all ranks' measurements from above, the same bits on all; kept.

        Power iteration; to the estimate twice what it leaves is added, up to :math:`\sum_r \|A_r\|^2`, the bound.

        Args:
            tolerance: Relative residual of the eigenvector at which to stop, on the first call.
            max_iterations: At the most.
        """
        if self._norm_squared is None:
            bound = float(sum(self._gather(float(self.local_operator.norm_squared()))))
            x = _noise(self.local_operator).to(self._device)
            estimate = 0.0
            with torch.no_grad():
                for _ in range(max_iterations):
                    x = x / _inner(x, x).sqrt()
                    z = self.normal(x)
                    quotient = _inner(x, z)
                    rest = z - quotient * x
                    value, left = self.agree(torch.stack([quotient, _inner(rest, rest).sqrt()]))
                    x = z
                    estimate = float((value + 2 * left).max())
                    if bool((left <= tolerance * value).all()):
                        break
            self._norm_squared = min(estimate, bound)
        return self._norm_squared

    def minibatch_norm_squared(self, size: int) -> float:
        r"""Bound what takes the place of :math:`\|A\|^2` where each step sees a minibatch of every rank.

        .. math:: \Bigl( 1 - \frac{1}{W} \min_r \frac{n_r - b}{b (n_r - 1)} \Bigr) \|A\|^2 + \max_r v_r

        with the part :math:`v_r` of the noise in the expected smoothness of rank `r`: the ranks draw independently, so
        that not norms but the noises of :math:`A_r^H A_r` add, each at most :math:`v_r` times that. With one rank it is
        the local operator's.

        Args:
            size: Number of blocks of each rank a step.
        """
        n = self.local_operator.n_blocks
        with self.agreement() as same:
            _blocks.check_size("MeasurementParallel", "blocks on each rank", size, self.n_blocks)
            same["the size of a minibatch"] = size
        share = (n - size) / (size * (n - 1)) if n > 1 else 0.0
        noise = 0.0
        if hasattr(self.local_operator, "minibatch_norm_squared"):
            smoothness = float(self.local_operator.minibatch_norm_squared(size))
            noise = max(smoothness - (1 - share) * float(self.local_operator.norm_squared()), 0.0)
        shares, noises = zip(*self._gather((share, noise)), strict=True)
        if not any(noises):
            return self.norm_squared()
        return float((1 - min(shares) / self.world_size) * self.norm_squared() + max(noises))

    def initial(self, y: Tensor) -> Tensor:
        r"""Reconstruct a start for iterations from all ranks' data.

        CT: the filtered back-projection of all views, each rank's part weighted by the angles of all. MRI: the coils of
        all ranks combined. Others: 20 conjugate gradients from zero for

        .. math:: \min_x \tfrac12 \sum_r \| A_r x - y_r \|^2 + \tfrac{w}{2} \| x \|^2, \quad w = 0.01 \, \| A \|^2

        Args:
            y: Data of this rank.

        Returns:
            Shape ``(B, *image_shape)``, the same bits on all ranks; differentiable in `y`.

        Raises:
            ValueError: For an image of which the coils of all ranks together see nothing.
        """
        if isinstance(self.local_operator, ParallelBeamCT):
            return self._sum(self.local_operator.initial(y * self._view_weights(y)))
        if isinstance(self.local_operator, CartesianMRI):
            start = self._sum(self.local_operator.initial(y))
            empty = (start == 0).flatten(1).all(1)
            if bool(empty.any()):
                image = int(empty.nonzero()[0])
                raise ValueError(f"MeasurementParallel: the coils of all ranks see nothing of image {image}")
            return start
        return self._regularized(y)

    def _view_weights(self, y: Tensor) -> Tensor:
        """Return what each view weighs among those of all ranks, over what it weighs here: (V, 1)."""
        if self._view_scale is None:
            local = self.local_operator
            assert isinstance(local, ParallelBeamCT)
            views = [torch.tensor(v, dtype=torch.float64) for v in self._gather(local.angles.tolist())]
            among_all = _angular_weights(torch.cat(views)).split([len(v) for v in views])[self.rank]
            here = _angular_weights(views[self.rank])
            # A view without a weight has others at its angle on both sides, and the same among all.
            ratio = among_all / torch.where(here > 0, here, 1.0)
            self._view_scale = kept(ratio[:, None])
        return self._view_scale.to(y)

    def _regularized(self, y: Tensor) -> Tensor:
        rhs = self.adjoint(y)
        weight = START_WEIGHT * self.norm_squared()
        target = START_RESIDUAL * solve.norm(rhs)
        start, _ = solve.conjugate_gradients(
            lambda v: self.normal(v) + weight * v, rhs, torch.zeros_like(rhs), target, lambda v: v
        )
        return start

    @property
    def _device(self) -> torch.device:
        tensors = self.local_operator.buffers() if isinstance(self.local_operator, nn.Module) else ()
        return next((tensor.device for tensor in tensors), torch.device("cpu"))


class ParallelLeastSquares(LeastSquares):
    r"""The data fidelity of `MeasurementParallel`: the sum of those of the ranks, in which each is unbiased.

    .. math:: \sum_r \frac{n_r}{|B_r|} A_{B_r}^H (A_{B_r} x - y_{B_r})
    """

    operator: MeasurementParallel

    def __init__(self, operator: MeasurementParallel, y: Tensor) -> None:
        super().__init__(operator, y)
        self.local = operator.local_operator.least_squares_part(y)

    def solve(
        self, rhs: Tensor, weight: Tensor, start: Tensor, tolerance: Tensor, free: Tensor | None = None
    ) -> Tensor:
        """Solve, from what the first rank starts with: all ranks then take the same number of steps."""
        agree = self.operator.agree
        return super().solve(agree(rhs), weight, agree(start), agree(tolerance), free)

    def solve_nonnegative(self, rhs: Tensor, weight: Tensor, start: Tensor, tolerance: Tensor) -> Tensor:
        """Solve with x >= 0, from what the first rank starts with."""
        agree = self.operator.agree
        return super().solve_nonnegative(agree(rhs), weight, agree(start), agree(tolerance))

    def _gradient(self, x: Tensor, blocks: Tensor | None) -> Tensor:
        return self.operator._sum(self.local.gradient(self.operator._share(x), blocks))

    def _normal(self, v: Tensor, blocks: Tensor | None) -> Tensor:
        return self.operator._sum(self.local.normal(self.operator._share(v), blocks))


class _Sum(torch.autograd.Function):
    """The sum over the ranks. Each has the gradient of the one loss in it, and it is that of each term."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, all_reduce: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.all_reduce = all_reduce
        return all_reduce(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Share.apply(gradient, ctx.all_reduce), None  # type: ignore[no-untyped-call]


class _Share(torch.autograd.Function):
    """The identity on what all ranks have alike: the transpose of `_Sum`."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, all_reduce: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.all_reduce = all_reduce
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(gradient, ctx.all_reduce), None  # type: ignore[no-untyped-call]


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Return the real inner product of each image, to be broadcast over it."""
    return (a.conj() * b).real.flatten(1).sum(1).reshape(-1, *[1] * (a.ndim - 1))


def _noise(operator: Any) -> Tensor:
    """Return the same random images on all ranks, as few as the operator takes."""
    dtype, batch = torch.float32, 1
    if isinstance(operator, CartesianMRI):
        double = operator.coil_maps.dtype == torch.complex128
        dtype = torch.complex128 if double else torch.complex64
        batch = max(operator.coil_maps.shape[0], operator.mask.shape[0])
    elif isinstance(operator, DiffractionTomography):
        dtype = operator.transfer.dtype if operator.transfer.is_complex() else torch.complex64
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, *operator.image_shape, dtype=dtype, generator=generator)


def _checksum(value: Any) -> str:
    """Describe a value, tensors by a checksum of their bits: sums of whole numbers, which have no order."""
    if isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) for v in value):
        numbers = "".join(_checksum(v) for v in value)
        return f"{len(value)} tensors of checksum {hashlib.sha256(numbers.encode()).hexdigest()[:16]}"
    if not isinstance(value, Tensor):
        return str(value)
    plain = value.detach().resolve_conj().contiguous()
    plain = torch.view_as_real(plain) if plain.is_complex() else plain
    bits = plain.flatten().view(BITS[plain.element_size()])
    places = torch.arange(1, len(bits) + 1, device=bits.device)
    return f"{value.dtype} {tuple(value.shape)} of checksum {int((bits * places).sum()):x}"
