"""What training takes from a dataset: samples, batches of them, and parts that share no patient."""

from __future__ import annotations

import hashlib
import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib import metadata
from typing import NamedTuple, SupportsIndex

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

VERSION = metadata.version("oder-fast")


class Sample(NamedTuple):
    """One image to learn from.

    Attributes:
        name: Where it is from, for messages.
        image: Shape ``(H, W)``, float32 or complex64 (MRI), or ``(Z, H, W)``, complex64 (diffraction tomography).
        kspace: Fully sampled k-space of the image, shape ``(C, H, W)``, complex64, the zero frequency at
            ``(H // 2, W // 2)``; or None, where measurements are to be simulated from the image.
        maps: Coil sensitivity maps that belong to it, shape ``(C, H, W)``, complex64.
        measured: Measurements without truth, as the operator's data are: a sinogram ``(V, D)``, intensities
            ``(L, H, W)``, or k-space ``(C, H, W)`` that is 0 where nothing was sampled; `image` is then a first
            reconstruction of them. None where there is a truth.
    """

    name: str
    image: Tensor
    kspace: Tensor | None = None
    maps: Tensor | None = None
    measured: Tensor | None = None


class Batch(NamedTuple):
    """Samples of one size, stacked: see `collate`.

    Attributes:
        names: Of the samples.
        image: Shape ``(B, H, W)`` or ``(B, Z, H, W)``.
        kspace: Shape ``(B, C, H, W)``, or None.
        maps: Shape ``(B, C, H, W)``, or None.
        measured: Shape ``(B, *data_shape)``, or None.
    """

    names: list[str]
    image: Tensor
    kspace: Tensor | None = None
    maps: Tensor | None = None
    measured: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        image = self.image.to(device, non_blocking=True)
        return Batch(self.names, image, move(self.kspace), move(self.maps), move(self.measured))


def _say_mixed(what: str, first: tuple[str, Sequence[int]], second: tuple[str, Sequence[int]]) -> str:
    return (
        f"{what} differ in size: {first[0]} has {tuple(first[1])}, {second[0]} has {tuple(second[1])}; cut patches of "
        "one size from them (Patches), or train on those of one size alone"
    )


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples to a batch.

    Args:
        samples: At least one; of one size and one kind.

    Returns:
        The batch, to be given as ``collate_fn`` to a `torch.utils.data.DataLoader`.

    Raises:
        ValueError: For samples of different sizes or kinds; the message names two of them.

    Example:
        >>> import torch
        >>> batch = collate([Sample("a", torch.zeros(4, 6)), Sample("b", torch.ones(4, 6))])
        >>> batch.names, batch.image.shape, batch.kspace
        (['a', 'b'], torch.Size([2, 4, 6]), None)
    """
    if not samples:
        raise ValueError("collate: samples must be at least one, got none")
    names = [sample.name for sample in samples]

    def stack(what: str, values: list[Tensor | None]) -> Tensor | None:
        first = values[0]
        for name, value in zip(names, values, strict=True):
            if (first is None) != (value is None):
                raise ValueError(f"collate: of {names[0]} and {name} only one has {what}")
            if first is None or value is None:
                continue
            if first.shape != value.shape:
                raise ValueError("collate: " + _say_mixed(what, (names[0], first.shape), (name, value.shape)))
            if first.dtype != value.dtype:
                raise ValueError(
                    f"collate: {what} differ in kind: that of {names[0]} is {first.dtype}, of {name} {value.dtype}"
                )
        return None if first is None else torch.stack([value for value in values if value is not None])

    image = stack("images", [sample.image for sample in samples])
    assert image is not None
    kspace = stack("k-space", [sample.kspace for sample in samples])
    maps = stack("coil maps", [sample.maps for sample in samples])
    return Batch(names, image, kspace, maps, stack("measurements", [sample.measured for sample in samples]))


class Samples(Dataset[Sample], ABC):
    """A dataset of samples: the same index gives the same bits, in any process.

    Attributes:
        names: Of the samples.
        groups: Of each sample, whom it shows: samples of one group are kept together by `split`.
        shapes: Of the images, known before any is read.
    """

    names: list[str]
    groups: list[str]
    shapes: list[tuple[int, ...]]

    def __len__(self) -> int:
        return len(self.groups)

    @abstractmethod
    def __getitem__(self, index: SupportsIndex) -> Sample: ...

    @abstractmethod
    def fingerprint(self, index: SupportsIndex) -> str:
        """Return a text that changes with whatever the sample depends on: file, settings, version."""

    def _check(self, index: SupportsIndex) -> int:
        number = operator.index(index)
        if not -len(self) <= number < len(self):
            raise IndexError(f"the dataset has {len(self)} samples, sample {number} is not among them")
        return number % len(self)

    def _hash(self, *parts: object) -> str:
        return hashlib.sha256(repr((VERSION, type(self).__name__, *parts)).encode()).hexdigest()


def common_shape(dataset: Samples) -> tuple[int, ...]:
    """Return the one shape of all images of a dataset, without reading any.

    Raises:
        ValueError: Where there are several; the message names two samples.

    Example:
        >>> from oder_fast.data import Phantoms
        >>> common_shape(Phantoms("ellipses", 5, 32))
        (32, 32)
    """
    first = dataset.shapes[0]
    for name, shape in zip(dataset.names, dataset.shapes, strict=True):
        if shape != first:
            raise ValueError(_say_mixed("images", (dataset.names[0], first), (name, shape)))
    return first


class Subset(Samples):
    """Some samples of a dataset.

    Args:
        dataset: The dataset.
        indices: Of the samples, in the order wanted.
    """

    def __init__(self, dataset: Samples, indices: Sequence[int]) -> None:
        self.dataset = dataset
        self.indices = [dataset._check(index) for index in indices]
        self.names = [dataset.names[index] for index in self.indices]
        self.groups = [dataset.groups[index] for index in self.indices]
        self.shapes = [dataset.shapes[index] for index in self.indices]

    def __getitem__(self, index: SupportsIndex) -> Sample:
        return self.dataset[self.indices[self._check(index)]]

    def fingerprint(self, index: SupportsIndex) -> str:
        """Return that of the sample in the dataset."""
        return self.dataset.fingerprint(self.indices[self._check(index)])


def seeded_generator(*numbers: int) -> torch.Generator:
    """Make a generator whose seed mixes several numbers, each at least 0: neighbours give unrelated numbers.

    Example:
        >>> seeded_generator(0, 1).initial_seed() == seeded_generator(1, 0).initial_seed()
        False
    """
    seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(seed)


def split(dataset: Samples, fractions: Sequence[float], seed: int) -> list[Subset]:
    """Split a dataset by groups: no patient is in two parts.

    Large groups are dealt out first, equal ones in random order, each to the part that lacks most, so that the
    fractions are met as well as the groups allow. The order of the files does not matter.

    Args:
        dataset: The dataset, with its ``groups``.
        fractions: Shares of the samples, each above 0, together 1.
        seed: The same seed gives the same parts.

    Returns:
        A part for each fraction, samples in the order of the dataset; none is empty.

    Raises:
        ValueError: For fractions out of range, or fewer groups than parts.

    Example:
        >>> from oder_fast.data import Phantoms
        >>> train, validation = split(Phantoms("ellipses", 20, 32), (0.8, 0.2), seed=0)
        >>> len(train), len(validation)
        (16, 4)
    """
    if not fractions or not all(math.isfinite(f) and f > 0 for f in fractions):
        raise ValueError(f"split: fractions must be numbers above 0, got {tuple(fractions)}")
    if not math.isclose(sum(fractions), 1, rel_tol=1e-6):
        raise ValueError(
            f"split: fractions must sum to 1, got {tuple(fractions)}, which sum to {sum(fractions):g}"
        )
    members: dict[str, list[int]] = {}
    for index, group in enumerate(dataset.groups):
        members.setdefault(group, []).append(index)
    if len(members) < len(fractions):
        raise ValueError(
            f"split: {len(fractions)} parts need as many groups (patients), got {len(members)} in {len(dataset)} "
            "samples; say by `group` which samples belong together"
        )
    names = sorted(members)
    order = [names[k] for k in torch.randperm(len(names), generator=seeded_generator(seed)).tolist()]
    order.sort(key=lambda name: -len(members[name]))
    parts: list[list[int]] = [[] for _ in fractions]
    for position, name in enumerate(order):
        empty = [k for k, part in enumerate(parts) if not part]
        # The last groups are kept for parts that would stay empty.
        choice = empty if len(order) - position <= len(empty) else range(len(parts))
        lacking = max(choice, key=lambda k: fractions[k] * len(dataset) - len(parts[k]))
        parts[lacking] += members[name]
    return [Subset(dataset, sorted(part)) for part in parts]
