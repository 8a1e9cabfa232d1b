import math

import numpy as np
import pytest
import torch

from oder_fast.data import masks


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


DRAWN = {
    "random_lines": lambda g: masks.random_lines(96, 4, 0.08, g),
    "equispaced_lines": lambda g: masks.equispaced_lines(96, 8, 0.04, g),
    "gaussian_lines": lambda g: masks.gaussian_lines(96, 4, 0.08, g),
    "poisson_disc": lambda g: masks.poisson_disc((48, 40), 4, 6, g),
}


@pytest.mark.parametrize("name", DRAWN)
def test_the_same_seed_gives_the_same_mask(name):
    draw = DRAWN[name]
    state = torch.random.get_rng_state()
    mask = draw(seeded())
    assert mask.dtype == torch.bool
    assert torch.equal(mask, draw(seeded()))
    assert any(not torch.equal(mask, draw(seeded(seed))) for seed in range(1, 5))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert draw(None).shape == mask.shape


@pytest.mark.parametrize("n", [320, 37, 368])
@pytest.mark.parametrize("fraction, acceleration", [(0.08, 4), (0.04, 8), (0.0, 3.5)])
@pytest.mark.parametrize("draw", [masks.random_lines, masks.equispaced_lines, masks.gaussian_lines])
def test_the_centre_is_sampled_around_index_n_over_2(draw, n, fraction, acceleration):
    lines = round(n * fraction)
    start = n // 2 - lines // 2
    always = torch.stack([draw(n, acceleration, fraction, seeded(seed)) for seed in range(64)]).all(0)
    assert always[start : start + lines].all()
    if lines:
        # Nothing else is always there: the centre is where it should be, and no larger.
        assert always.sum() == lines
        assert always[n // 2]


def test_random_lines_have_the_expected_number_and_even_chances():
    n, acceleration, fraction = 320, 4, 0.08
    drawn = torch.stack(
        [masks.random_lines(n, acceleration, fraction, seeded(s)) for s in range(2000)]
    ).double()
    lines = round(n * fraction)
    p = (n / acceleration - lines) / (n - lines)
    deviation = math.sqrt((n - lines) * p * (1 - p))
    assert abs(drawn.sum(1).mean() - n / acceleration) < 4 * deviation / math.sqrt(2000)
    assert drawn.sum(1).std() == pytest.approx(deviation, rel=0.1)
    outside = drawn.mean(0)[drawn.mean(0) < 1]
    assert len(outside) == n - lines
    assert (outside - p).abs().max() < 5 * math.sqrt(p * (1 - p) / 2000)


@pytest.mark.parametrize("n", [320, 368, 101])
@pytest.mark.parametrize("fraction, acceleration", [(0.08, 4), (0.04, 8), (0.0, 5), (0.1, 2)])
def test_equispaced_lines_meet_the_acceleration_and_the_spacing(n, fraction, acceleration):
    lines = round(n * fraction)
    spacing = acceleration * (n - lines) / (n - acceleration * lines)
    centre = slice(n // 2 - lines // 2, n // 2 - lines // 2 + lines)
    counts = []
    for offset in range(round(spacing)):
        mask = masks.equispaced_lines(n, acceleration, fraction, offset=offset)
        counts.append(int(mask.sum()))
        assert abs(counts[-1] - n / acceleration) <= 3
        comb = torch.tensor([round(offset + k * spacing) for k in range(n)])
        comb = comb[comb < n]
        assert mask[comb].all()
        mask[comb] = False
        mask[centre] = False
        assert not mask.any()
    assert sum(counts) / len(counts) == pytest.approx(n / acceleration, rel=0.03)


def test_equispaced_offsets_are_all_drawn():
    first = {int(masks.equispaced_lines(64, 4, 0.0, seeded(s)).nonzero()[0]) for s in range(100)}
    assert first == {0, 1, 2, 3}


def test_gaussian_lines_have_their_number_and_their_density():
    n = 128
    drawn = torch.stack([masks.gaussian_lines(n, 16, 0.0, seeded(s)) for s in range(3000)]).double()
    assert (drawn.sum(1) == 8).all()
    distance = torch.arange(n) - n // 2
    # Few lines of many: next to independent draws, so that the histogram is the Gaussian.
    spread = ((drawn.mean(0) * distance**2).sum() / drawn.mean(0).sum()).sqrt()
    assert spread == pytest.approx(n / 6, rel=0.1)
    assert abs((drawn.mean(0) * distance).sum() / drawn.mean(0).sum()) < 1
    wide = torch.stack([masks.gaussian_lines(n, 16, 0.0, seeded(s), width=0.02) for s in range(200)]).double()
    assert wide.mean(0)[distance.abs() > 20].sum() == 0
    assert masks.gaussian_lines(n, 1, 0.5, seeded()).all()


def nearest(mask):
    """Distance of each sample to the nearest other one."""
    points = mask.nonzero().double()
    return torch.cdist(points, points).fill_diagonal_(math.inf).amin(1)


@pytest.mark.parametrize("shape", [(96, 96), (64, 81), (33, 128)])
@pytest.mark.parametrize("acceleration", [1, 1.5, 2, 4, 8, 16])
@pytest.mark.parametrize("falloff", [0.0, 2.0])
def test_poisson_disc_meets_the_acceleration(shape, acceleration, falloff):
    mask = masks.poisson_disc(shape, acceleration, (4, 7), seeded(), falloff=falloff)
    assert mask.shape == shape
    assert mask.sum() == round(shape[0] * shape[1] / acceleration)
    i, j = shape[0] // 2 - 2, shape[1] // 2 - 3
    assert mask[i : i + 4, j : j + 7].all()


def test_poisson_disc_keeps_distances_that_chance_does_not():
    mask = masks.poisson_disc((96, 96), 8, 0, seeded(), falloff=0.0)
    chance = torch.rand(96, 96, generator=seeded()) < 1 / 8
    # An even density of 1 in 8 allows a distance of sqrt(0.7 * 8) = 2.4.
    assert nearest(mask).min() >= 2
    assert nearest(chance).min() == 1
    assert nearest(mask).std() < 0.6 * nearest(chance).std()


def test_darts_keep_their_distance_and_leave_no_room():
    random = np.random.default_rng(0)
    shape = (20, 31)
    reach, taken = random.integers(0, 12, shape), random.random(shape) < 0.1
    accepted = masks._throw_darts(random.permutation(20 * 31), reach, taken)
    points = np.stack(np.unravel_index(accepted, shape), 1)
    assert not taken.reshape(-1)[accepted].any()
    squared = ((points[:, None] - points[None]) ** 2).sum(-1)
    # A point keeps those that come after it away.
    after = np.triu(np.ones_like(squared, dtype=bool), 1)
    reaches = reach.reshape(-1)[accepted][:, None]
    assert (squared >= reaches)[after].all()
    grid = np.stack(np.indices(shape), -1).reshape(-1, 1, 2)
    near = (((grid - points) ** 2).sum(-1) < reaches.T).any(1)
    near[accepted] = True
    assert (near | taken.reshape(-1)).all()


def test_poisson_disc_is_denser_in_the_middle():
    size, falloff = 128, 2.0
    drawn = torch.stack(
        [masks.poisson_disc((size, size), 12, 0, seeded(s), falloff=falloff) for s in range(8)]
    )
    axis = (torch.arange(size) - size // 2) / (size / 2)
    radius = torch.hypot(axis[:, None], axis[None])
    density = drawn.double().mean(0)

    def mean(low, high):
        return density[(radius >= low) & (radius < high)].mean()

    for low, high in ((0.3, 0.4), (0.6, 0.7), (0.9, 1.0)):
        ratio = mean(low, high) / mean(0.1, 0.2)
        law = ((1 + falloff * 0.15) / (1 + falloff * (low + high) / 2)) ** 2
        assert ratio == pytest.approx(law, rel=0.25)
    gap = torch.stack([nearest(mask & (radius > 0.9)).min() for mask in drawn]).min()
    assert gap > torch.stack([nearest(mask & (radius < 0.2)).min() for mask in drawn]).min()


def test_poisson_disc_without_room_outside_is_the_centre():
    mask = masks.poisson_disc((16, 16), 16, 4, seeded())
    assert mask[6:10, 6:10].all()
    assert mask.sum() == 16


@pytest.mark.parametrize("shape", [(64, 64), (33, 48), (1, 7)])
@pytest.mark.parametrize("golden", [True, False])
def test_radial_spokes_lie_on_straight_lines_from_edge_to_edge(shape, golden):
    n, first = 5, 0.3
    mask = masks.radial(shape, n, golden_angle=golden, first_angle=first)
    step = math.pi * (math.sqrt(5) - 1) / 2 if golden else math.pi / n
    i, j = (axis.double() for axis in mask.nonzero(as_tuple=True))
    y, x = shape[0] // 2 - i, j - shape[1] // 2
    angles = [first + m * step for m in range(n)]
    distance = torch.stack([(y * math.cos(a) - x * math.sin(a)).abs() for a in angles])
    assert distance.amin(0).max() <= 0.5 + 1e-9
    assert mask[shape[0] // 2, shape[1] // 2]
    for angle, own in zip(angles, distance <= 0.5 + 1e-9, strict=True):
        # One sample in each column (row, where the spoke is steep) that the spoke crosses on the grid.
        steep = abs(math.sin(angle)) > abs(math.cos(angle))
        slope = 1 / math.tan(angle) if steep else math.tan(angle)
        size, other = shape if steep else shape[::-1]
        found = {int(t) for t in (-y if steep else x)[own]}
        for t in range(-(size // 2), size - size // 2):
            across = round(-t * slope) + other // 2
            assert t in found or not 0 <= across < other


def test_golden_angle_is_the_known_one():
    assert math.degrees(masks.GOLDEN_ANGLE) == pytest.approx(111.246, abs=1e-3)


def test_even_spokes_are_evenly_spread():
    assert torch.equal(
        masks.radial((5, 5), 4, golden_angle=False),
        torch.tensor(
            [[1, 0, 1, 0, 1], [0, 1, 1, 1, 0], [1, 1, 1, 1, 1], [0, 1, 1, 1, 0], [1, 0, 1, 0, 1]]
        ).bool(),
    )


@pytest.mark.parametrize("name", ["random_lines", "equispaced_lines", "gaussian_lines"])
@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0, 4, 0.1), "n must be at least 1, got 0"),
        ((64, 0.5, 0.1), "acceleration must be finite and at least 1, got 0.5"),
        ((64, math.nan, 0.1), "acceleration must be finite and at least 1, got nan"),
        ((64, 4, 1.5), r"center_fraction must be in 0\.\.1, got 1.5"),
        ((64, 4, math.nan), r"center_fraction must be in 0\.\.1, got nan"),
        (
            (64, 4, 0.5),
            "center_fraction 0.5 takes 32 lines, more than the 16 that acceleration 4 leaves of n = 64",
        ),
    ],
)
def test_line_arguments(name, arguments, message):
    with pytest.raises(ValueError, match=f"^{name}: {message}"):
        getattr(masks, name)(*arguments)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: masks.equispaced_lines(64, 4, 0.0, offset=4),
            r"offset must be in 0\.\.3 at spacing 4, got 4",
        ),
        (lambda: masks.gaussian_lines(64, 4, 0.0, width=0.0), "width must be finite and above 0, got 0"),
        (lambda: masks.poisson_disc((0, 4), 2), r"shape must be \(H, W\), both at least 1, got \(0, 4\)"),
        (lambda: masks.poisson_disc((8, 8), 0.9), "acceleration must be finite and at least 1, got 0.9"),
        (lambda: masks.poisson_disc((8, 8), 2, 9), r"center must lie in 0\.\.8 by 0\.\.8, got 9 by 9"),
        (
            lambda: masks.poisson_disc((8, 8), 4, (4, 5)),
            "takes 20 samples, more than the 16 that acceleration 4",
        ),
        (lambda: masks.poisson_disc((8, 8), 2, falloff=-1), "falloff must be finite and at least 0, got -1"),
        (lambda: masks.poisson_disc((8, 8), 2, tolerance=0), "tolerance must be above 0 and below 1, got 0"),
        (lambda: masks.radial((8,), 3), r"shape must be \(H, W\)"),
        (lambda: masks.radial((8, 8), 0), "n_spokes must be at least 1, got 0"),
        (lambda: masks.radial((8, 8), 2, first_angle=math.inf), "first_angle must be finite, got inf"),
    ],
)
def test_other_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_random_lines_are_never_none():
    masks_ = [masks.random_lines(16, 8, 0.0, torch.Generator().manual_seed(k)) for k in range(30)]
    assert all(mask.any() for mask in masks_)
