"""The datasets and augmentations that a configuration describes."""

from __future__ import annotations

from typing import Any

from ..data import (
    Cached,
    Compose,
    ImageFolder,
    KSpaceFolder,
    Patches,
    Phantoms,
    RandomFlip,
    RandomRotate90,
    RandomScaleIntensity,
    Subset,
    common_shape,
    split,
)
from ..data.samples import Samples
from . import configuration as settings
from .configuration import Configuration, ConfigurationError
from .scans import Scan

BRIGHTNESS = (0.5, 1.0)
"""Factors by which augmentation scales images."""


def training_transform(section: settings.Data) -> Compose:
    """Return what is done to each training image."""
    transforms: list[Any] = []
    if section.patch is not None:
        transforms.append(Patches(section.patch))
    if section.augment:
        transforms += [RandomFlip(), RandomRotate90(), RandomScaleIntensity(*BRIGHTNESS)]
    return Compose(transforms)


def _files(names: settings.Names, configuration: Configuration, scan: Scan) -> Samples:
    section = configuration.data
    dataset: Samples
    if section.kspace:
        folder = KSpaceFolder(names, array=section.array, select=section.select, cache=section.cache)
        other = next((k for k, n in enumerate(folder.coils) if n != folder.coils[0]), None)
        if other is not None and configuration.training.steps and configuration.training.batch_size > 1:
            raise ValueError(
                f"{folder.names[0]} has {folder.coils[0]} coils and {folder.names[other]} {folder.coils[other]}, "
                "which fit in no batch: set training.batch_size to 1"
            )
        dataset = folder
    else:
        dataset = ImageFolder(names, scale=section.scale, array=section.array, volumes=scan.axes == 3)
    return dataset if section.cache is None else Cached(dataset, section.cache)


def make_sets(configuration: Configuration, scan: Scan) -> tuple[Samples, Samples]:
    """Return the images to train on and those to validate with; no patient is among both.

    Raises:
        ConfigurationError: For an empty set, images of mixed sizes, or too few patients to split.
        OSError: For files that cannot be read.
    """
    section, seed = configuration.data, configuration.seed
    shares = (1 - section.validation_share, section.validation_share)
    train: Samples
    validation: Samples
    try:
        if section.phantoms is not None:
            p = section.phantoms
            size: int | tuple[int, int, int] = p.size
            if p.kind == "cells" and scan.axes == 3:
                # A real and an imaginary part of each slice.
                size = (scan.channels // 2, p.size, p.size)
            n = max(1, round(p.n * section.validation_share / (1 - section.validation_share)))
            drawn = Phantoms(p.kind, p.n + n, size, seed, **p.options)
            train, validation = (
                Subset(drawn, range(p.n)),
                Subset(drawn, range(p.n, p.n + n)),
            )
        elif section.validation is not None:
            assert section.train is not None
            train = _files(section.train, configuration, scan)
            validation = _files(section.validation, configuration, scan)
            known = {train.fingerprint(k): train.names[k] for k in range(len(train))}
            shared = [known[f] for f in map(validation.fingerprint, range(len(validation))) if f in known]
            if shared:
                raise ValueError(
                    f"{len(shared)} images of validation are in train too, the first {shared[0]}"
                )
        else:
            assert section.train is not None
            everything = _files(section.train, configuration, scan)
            if len(set(everything.groups)) == 1:
                raise ValueError("train shows one patient alone, so give validation too, of others")
            train, validation = split(everything, shares, seed)
        stages = (configuration.pretraining, configuration.training)
        if section.patch is None and any(s.steps and s.batch_size > 1 for s in stages):
            common_shape(train)
    except (ValueError, TypeError) as error:
        raise ConfigurationError(f"data: {error}") from error
    return train, validation
