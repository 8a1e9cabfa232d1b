"""Real parallel-beam scans: the axis of rotation, counts to line integrals, rings, and what files may have wrong."""

from __future__ import annotations

import math

import h5py
import numpy as np
import pytest
import torch

from oder_fast import ParallelBeamCT
from oder_fast.data import (
    find_rotation_axis,
    normalize_projections,
    psnr,
    random_ellipses,
    read_projections,
    remove_rings,
)

pytestmark = pytest.mark.usefixtures("one_thread")

N = 96
WHOLE, SHORT = 141, 65
"""Bins of detectors that see all of the images, and the middle of them."""


def scan(axis, angles, n_bins=WHOLE, noise=0.01, seed=0):
    """Line integrals of asymmetric objects, some 2 at most, and the operator."""
    angles = torch.deg2rad(torch.as_tensor(angles, dtype=torch.float64))
    x = random_ellipses(2, N, torch.Generator().manual_seed(seed)) / 16
    ct = ParallelBeamCT(N, angles, n_bins, bin_offset=(n_bins - 1) / 2 - axis)
    y = ct(x)
    return y + noise * torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)), ct


# ------------------------------------------------------------------ the axis


@pytest.mark.parametrize(
    ("angles", "n_bins", "within"),
    [
        pytest.param(np.linspace(0, 180, 91), WHOLE, 0.2, id="both-ends"),
        pytest.param(np.arange(0, 180, 2), WHOLE, 0.2, id="one-end"),
        pytest.param(np.arange(0, 180, 7.5), WHOLE, 0.25, id="few-views"),
        pytest.param(np.arange(0, 360, 4), WHOLE, 0.03, id="full-turn"),
        pytest.param(np.arange(0, 360, 360 / 91), WHOLE, 0.03, id="full-turn-odd"),
        pytest.param(np.arange(0, 360, 4), SHORT, 0.15, id="full-turn-truncated"),
        pytest.param(np.linspace(0, 180, 91), SHORT, 0.6, id="truncated"),
        pytest.param(np.arange(-30, 160, 2), WHOLE, 0.1, id="overlap"),
        pytest.param(np.arange(180, 0, -2), WHOLE, 0.2, id="backwards"),
    ],
)
def test_the_axis_is_found_by_opposite_views(angles, n_bins, within):
    for seed, shift in enumerate((0.0, 0.3, -7.25, 11.9)):
        axis = (n_bins - 1) / 2 + shift
        found = find_rotation_axis(
            scan(axis, angles, n_bins, seed=seed)[0], torch.deg2rad(torch.tensor(angles))
        )
        assert found.method == "opposite"
        assert found.bin == pytest.approx(axis, abs=within)


@pytest.mark.parametrize(("last", "within"), [(150, 0.1), (120, 0.2)])
def test_the_axis_is_found_by_moments_where_no_view_has_an_opposite_one(last, within):
    angles = np.arange(0, last, 2.0)
    for seed, shift in enumerate((0.3, -7.25, 9.5)):
        axis = (WHOLE - 1) / 2 + shift
        y, ct = scan(axis, angles, seed=seed)
        found = find_rotation_axis(y, ct.angles)
        assert found.method == "moments"
        assert found.comparisons == 0
        assert found.bin == pytest.approx(axis, abs=within)
        with pytest.raises(
            ValueError, match=f"span {last - 2} degrees, so none of its {len(angles)} views has"
        ):
            find_rotation_axis(y, ct.angles, method="opposite")


def test_the_axis_does_not_depend_on_order_background_or_direction():
    y, ct = scan(74.3, np.arange(0, 180, 2.0), noise=0)
    found = find_rotation_axis(y, ct.angles).bin
    order = torch.randperm(90, generator=torch.Generator().manual_seed(0))
    for same in (
        find_rotation_axis(y[:, order], ct.angles[order]),
        find_rotation_axis(y + 3, ct.angles),
        find_rotation_axis(y, ct.angles + 2),
        find_rotation_axis(y.numpy(), ct.angles.numpy()),
        find_rotation_axis(y * 1e-6, ct.angles),
    ):
        assert same.bin == pytest.approx(found, abs=0.01)
    mirrored = find_rotation_axis(y.flip(-1), ct.angles)
    assert mirrored.bin == pytest.approx(WHOLE - 1 - found, abs=0.01)


def test_one_view_and_many_of_one_direction_are_refused():
    for angles in (torch.zeros(1), torch.zeros(5)):
        with pytest.raises(ValueError, match="moments need 90 degrees and 4 views"):
            find_rotation_axis(torch.rand(len(angles), 32), angles)


TWO = torch.linspace(0, math.pi, 31)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: find_rotation_axis(torch.zeros(31, 32), TWO), ValueError, "the views are constant"),
        (
            lambda: find_rotation_axis(torch.rand(30, 32), TWO),
            ValueError,
            r"shape \(30,\), one for each view",
        ),
        (lambda: find_rotation_axis(torch.rand(31, 4), TWO), ValueError, "at least 8 bins, got 4"),
        (lambda: find_rotation_axis(torch.rand(31), TWO), ValueError, r"\(V, D\) or \(R, V, D\)"),
        (
            lambda: find_rotation_axis(torch.full((31, 9), math.nan), TWO),
            ValueError,
            r"value \(0, 0\) of sinog",
        ),
        (
            lambda: find_rotation_axis(torch.rand(31, 9), TWO * math.inf),
            ValueError,
            r"value \(0,\) of angles",
        ),
        (lambda: find_rotation_axis(torch.ones(31, 32, dtype=torch.int64), TWO), TypeError, "real numbers"),
        (lambda: find_rotation_axis([[1.0]], TWO), TypeError, "sinograms must be a torch.Tensor, got list"),
        (
            lambda: find_rotation_axis(torch.rand(31, 32), TWO, method="guess"),
            ValueError,
            "method must be one",
        ),
        (
            lambda: find_rotation_axis(
                scan(32, np.arange(0, 120, 2), SHORT)[0], torch.arange(60) * math.pi / 90
            ),
            ValueError,
            "the object leaves the field of view",
        ),
    ],
)
def test_what_the_axis_cannot_be_found_in(call, error, message):
    with pytest.raises(error, match=f"find_rotation_axis: .*{message}"):
        call()


# ------------------------------------------------------------------ counts


def counts_of(p, flat=1000.0, dark=100.0):
    """Counts (V, R, D) of line integrals (R, V, D), and frames of flats and darks."""
    gain = 1 + 0.2 * torch.rand(p.shape[0], p.shape[-1], generator=torch.Generator().manual_seed(1))
    counts = dark + flat * gain[:, None] * torch.exp(-p)
    flats = (dark + flat * gain).expand(5, *gain.shape)
    return counts.transpose(0, 1), flats.clone(), torch.full((4, *gain.shape), dark)


def test_counts_become_line_integrals():
    p = torch.rand(3, 7, 20)
    counts, flats, darks = counts_of(p)
    normalized = normalize_projections(counts, flats, darks)
    torch.testing.assert_close(normalized.sinograms, p, atol=1e-5, rtol=0)
    assert normalized.interpolated == {}
    # One bright pixel in one frame.
    flats[2, 1, 5] = 1e5
    by_median = normalize_projections(
        counts.numpy(), flats.numpy(), darks[0].numpy(), average="median"
    ).sinograms
    torch.testing.assert_close(by_median, p, atol=1e-5, rtol=0)
    without = normalize_projections(counts - 100, flats - 100, average="median").sinograms
    torch.testing.assert_close(without, p, atol=1e-5, rtol=0)


def test_dead_bins_are_refused_or_filled_in_and_told():
    p = torch.linspace(0, 1, 20).expand(2, 7, 20).clone()
    counts, flats, darks = counts_of(p)
    flats[:, 1, 8:10] = 100.0
    counts[3, 1, 0] = 50.0
    with pytest.raises(
        ValueError, match=r"3 of the 20 bins of row 1 have no logarithm, 2 may be.* bin 0: its counts"
    ):
        normalize_projections(counts, flats, darks, interpolate=2)
    normalized = normalize_projections(counts, flats, darks, interpolate=3)
    assert normalized.interpolated == {1: (0, 8, 9)}
    p[1, 3, 0] = p[1, 3, 1]
    torch.testing.assert_close(normalized.sinograms, p, atol=1e-5, rtol=0)
    counts[5] = 0
    with pytest.raises(ValueError, match="no bin of row 0 has a logarithm in view 5"):
        normalize_projections(counts, flats, darks, interpolate=20)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"counts": torch.ones(3, 8)}, ValueError, r"counts must have the shape \(V, R, D\), got \(3, 8\)"),
        (
            {"flats": torch.ones(2, 1, 9)},
            ValueError,
            r"flats must be frames of 1 rows and 8 bins.*\(2, 1, 9\)",
        ),
        ({"darks": torch.ones(0, 1, 8)}, ValueError, "darks must be frames"),
        ({"counts": torch.full((3, 1, 8), math.nan)}, ValueError, r"value \(0, 0, 0\) of counts is nan"),
        ({"flats": torch.ones(2, 1, 8) * 1j}, TypeError, "flats must be real"),
        ({"flats": None}, TypeError, "flats must be a torch.Tensor, got NoneType"),
        ({"average": "mode"}, ValueError, "average must be one of"),
        ({"interpolate": -1}, ValueError, "interpolate must be at least 0"),
        ({"interpolate": 0.5}, TypeError, "interpolate must be an int"),
        (
            {"flats": torch.zeros(2, 1, 8)},
            ValueError,
            "8 of the 8 bins of row 0.* bin 0: its flats are not above",
        ),
    ],
)
def test_counts_that_are_refused(change, error, message):
    given = {
        "counts": torch.full((3, 1, 8), 5.0),
        "flats": torch.full((2, 1, 8), 9.0),
        "darks": torch.zeros(1, 8),
    }
    with pytest.raises(error, match=f"normalize_projections: .*{message}"):
        normalize_projections(**(given | change))


def test_rings_go_and_little_else():
    x = random_ellipses(2, N, torch.Generator().manual_seed(1))
    ct = ParallelBeamCT(N, 91)
    y = ct(x)
    generator = torch.Generator().manual_seed(2)
    bins = torch.rand(y.shape[-1], generator=generator) < 0.1
    stripes = 0.06 * y.max() * torch.randn(y.shape[-1], generator=generator) * bins

    def quality(sinograms):
        return psnr(ct.fbp(sinograms, "hann"), x)

    assert quality(remove_rings(y)) > quality(y) - 0.2
    assert quality(remove_rings(y + stripes)) > quality(y + stripes) + 1
    assert remove_rings(y.double()).dtype == torch.float64
    assert remove_rings(torch.zeros(2, 3, 0)).shape == (2, 3, 0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: remove_rings(torch.ones(3, 8), 4), ValueError, "width must be odd and at least 3, got 4"),
        (lambda: remove_rings(torch.ones(3, 8), 3.0), TypeError, "width must be an int, got float"),
        (lambda: remove_rings(torch.ones(8)), ValueError, r"\(\.\.\., V, D\), got \(8,\)"),
        (lambda: remove_rings(torch.ones(3, 8, dtype=torch.int32)), TypeError, "real numbers"),
        (lambda: remove_rings([[1.0]]), TypeError, "sinograms must be a torch.Tensor, got list"),
    ],
)
def test_what_rings_are_not_taken_out_of(call, error, message):
    with pytest.raises(error, match=message):
        call()


# ------------------------------------------------------------------ files


ANGLES = np.arange(0, 180, 2.0)
AXIS = 74.3


def write(path, change=None, **options):
    """Write a scan of two rows; `change` replaces data sets, or takes them away where None."""
    y, _ = scan(AXIS, ANGLES, noise=0.002)
    counts, flats, darks = counts_of(y)
    exchange = {"data": counts, "data_white": flats, "data_dark": darks, "theta": ANGLES} | (change or {})
    with h5py.File(path, "w") as file:
        for name, values in exchange.items():
            if values is not None:
                file.create_dataset(f"exchange/{name}", data=np.asarray(values), **options.get(name, {}))
    return y


@pytest.fixture
def path(tmp_path):
    return tmp_path / "scan.h5"


def test_a_file_is_read_with_its_geometry(path):
    y = write(path)
    sinograms, angles, axis, metadata = read = read_projections(path)
    torch.testing.assert_close(sinograms, y, atol=1e-4, rtol=0)
    assert angles.dtype == torch.float64
    np.testing.assert_allclose(angles, np.deg2rad(ANGLES))
    assert axis == pytest.approx(AXIS, abs=0.2)
    assert metadata == {
        "format": "DataExchange",
        "rows": (0, 1),
        "flats": 5,
        "darks": 4,
        "average": "mean",
        "axis_method": "opposite",
        "axis_comparisons": 4,
        "interpolated": {},
        "ring_width": None,
    }
    # The sign of the offset: the right one gives the image, the other one does not.
    x = random_ellipses(2, N, torch.Generator().manual_seed(0)) / 16
    ct = ParallelBeamCT(N, **read.geometry)
    wrong = ParallelBeamCT(N, **(read.geometry | {"bin_offset": -read.geometry["bin_offset"]}))
    assert psnr(ct.fbp(sinograms, "hann"), x) > psnr(wrong.fbp(sinograms, "hann"), x) + 6


def test_rows_angles_and_axis_can_be_given(path):
    y = write(path, {"theta": None})
    with pytest.raises(ValueError, match="it has no 'exchange/theta': give the angles of its 90 views"):
        read_projections(path)
    read = read_projections(path, -1, angles=np.deg2rad(ANGLES), axis=70, ring_width=5)
    torch.testing.assert_close(read.sinograms, remove_rings(y[1:], 5), atol=1e-4, rtol=0)
    assert (read.axis, read.metadata["axis_method"], read.metadata["rows"]) == (70.0, "given", (1,))
    assert read.metadata["ring_width"] == 5
    assert read_projections(path, slice(0, 1), angles=ANGLES * math.pi / 180, axis=70).sinograms.shape == (
        1,
        90,
        WHOLE,
    )


def test_rows_that_are_not_asked_for_are_not_read(path):
    """Bad values there do not matter."""
    y, _ = scan(AXIS, ANGLES)
    counts = counts_of(y)[0].clone()
    counts[4, 0, 7] = math.nan
    write(path, {"data": counts})
    with pytest.raises(ValueError, match=r"value \(4, 0, 7\) of its 'exchange/data' is nan"):
        read_projections(path)
    assert read_projections(path, 1).sinograms.shape[0] == 1


def test_whole_numbers_compressed_and_radians_are_read(path):
    y = write(path)
    counts, flats, darks = (np.round(np.asarray(values)).astype(np.uint16) for values in counts_of(y))
    options = {name: {"compression": "gzip"} for name in ("data", "data_white")}
    write(
        path,
        {"data": counts, "data_white": flats, "data_dark": darks, "theta": np.deg2rad(ANGLES)},
        **options,
    )
    with h5py.File(path, "a") as file:
        file["exchange/theta"].attrs["units"] = "radians"
    sinograms, angles, _, _ = read_projections(path)
    torch.testing.assert_close(sinograms, y, atol=0.02, rtol=0)
    np.testing.assert_allclose(angles, np.deg2rad(ANGLES))


def test_missing_darks_are_told(path):
    write(path, {"data_dark": None})
    with pytest.warns(UserWarning, match="scan.h5: it has no 'exchange/data_dark', taken as 0"):
        assert read_projections(path).metadata["darks"] == 0


def test_dead_bins_are_told_by_the_rows_of_the_file(path):
    y, _ = scan(AXIS, ANGLES)
    flats = counts_of(y)[1]
    flats[:, 1, 8] = 0
    write(path, {"data_white": flats})
    with pytest.raises(
        ValueError, match=r"1 of the 141 bins of row 1 have no .* bin 8: its flats are not above its d"
    ):
        read_projections(path, 1)
    assert read_projections(path, 1, interpolate=1).metadata["interpolated"] == {1: (8,)}


FRAMES = np.ones((5, 2, WHOLE))


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({"data": None}, {}, "it has no 'exchange/data'"),
        ({"data": None, "data_white": None}, {}, "it has no 'exchange/data' and no 'exchange/data_white'"),
        (
            {"data_white": FRAMES[:, :1]},
            {},
            r"'exchange/data_white' has the shape \(5, 1, 141\), and its .* 2 rows",
        ),
        ({"data_dark": FRAMES[..., 1:]}, {}, r"'exchange/data_dark' has the shape \(5, 2, 140\), and its"),
        ({"data": FRAMES[0]}, {}, r"'exchange/data' has the shape \(2, 141\), not \(views, rows, bins\)"),
        (
            {"data_dark": FRAMES[:0]},
            {},
            r"'exchange/data_dark' has the shape \(0, 2, 141\), not \(frames, rows",
        ),
        ({"data": FRAMES * 1j}, {}, "'exchange/data' is complex128, not real numbers"),
        ({"data_white": FRAMES * math.inf}, {}, r"value \(0, 0, 0\) of its 'exchange/data_white' is inf"),
        (
            {"data_white": FRAMES * 0},
            {},
            "141 of the 141 bins of row 0 .* bin 0: its flats are not above its darks",
        ),
        (
            {"theta": ANGLES[1:]},
            {},
            r"'exchange/theta' has the shape \(89,\), and its 'exchange/data' 90 views",
        ),
        ({"theta": ANGLES * math.nan}, {}, "value 0 of its 'exchange/theta' is nan"),
        ({"theta": np.deg2rad(ANGLES)}, {}, "spans 3.107 without a unit, which may be degrees or radians"),
        ({"theta": np.array([b"0"] * 90)}, {}, r"'exchange/theta' is \|S1, not real numbers"),
        ({}, {"rows": 2}, "it has 2 rows, row 2 is not among them"),
        ({}, {"rows": slice(2, 5)}, "rows 2:5:None are none of its 2 in order"),
        ({}, {"axis": 141}, "the axis must lie between its bins 0 and 140, got 141"),
        ({}, {"axis": math.nan}, "the axis must lie between its bins"),
        (
            {},
            {"angles": torch.zeros(3)},
            r"angles must have the shape \(90,\), one for each of its views, got \(3,\)",
        ),
        ({}, {"angles": torch.full((90,), math.nan)}, "angles must be finite"),
        ({}, {"angles": torch.zeros(90)}, "the views span 0 degrees.*give the axis"),
    ],
)
def test_files_that_are_refused_in_one_sentence(path, change, arguments, message):
    write(path, change)
    with pytest.raises(ValueError, match=f"^{path}: .*{message}") as caught:
        read_projections(path, **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": 0.5}, "rows must be an int, a slice or None, got float"),
        ({"rows": True}, "rows must be an int"),
        ({"axis": "middle"}, "axis must be a number of bins, got str"),
        ({"ring_width": 2.5}, "ring_width must be an int"),
        ({"interpolate": "all"}, "interpolate must be an int"),
    ],
)
def test_arguments_of_the_wrong_type_are_refused(path, arguments, message):
    write(path)
    with pytest.raises((TypeError, ValueError), match=message):
        read_projections(path, **arguments)


def test_units_that_are_unknown_and_files_of_other_kinds_are_refused(path, tmp_path):
    write(path)
    with h5py.File(path, "a") as file:
        file["exchange/theta"].attrs["units"] = np.bytes_("steps")
    with pytest.raises(ValueError, match="'exchange/theta' is in 'steps', neither degrees nor radians"):
        read_projections(path)
    path.write_bytes(b"no")
    with pytest.raises(ValueError, match="not an HDF5 file"):
        read_projections(path)
    with pytest.raises(FileNotFoundError):
        read_projections(tmp_path / "none.h5")


def test_a_file_that_leads_elsewhere_is_refused(path, tmp_path):
    write(tmp_path / "other.h5")
    with h5py.File(path, "w") as file:
        file["exchange/data"] = h5py.ExternalLink(tmp_path / "other.h5", "/exchange/data")
    with pytest.raises(ValueError, match="is a link to another file"):
        read_projections(path)
