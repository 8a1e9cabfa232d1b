import multiprocessing
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor

import h5py
import numpy as np
import pytest
import scipy.io
import torch

from oder_fast import data
from oder_fast.data import kspace as ks
from oder_fast.data.hdf5 import open_hdf5

H, W = 16, 12


def noise(*shape, seed=0):
    random = np.random.default_rng(seed)
    return (random.normal(size=shape) + 1j * random.normal(size=shape)).astype(np.complex64)


def header(matrix=(H, W, 1), fov=(320.0, 180.0, 5.0), center=W // 2, trajectory="cartesian", more=""):
    x, y, z = matrix
    return f"""<?xml version="1.0"?>
<ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD">
  <subjectInformation><patientID>P7</patientID></subjectInformation>
  <measurementInformation><protocolName>T2 axial</protocolName></measurementInformation>
  <encoding>
    <trajectory>{trajectory}</trajectory>
    <encodedSpace>
      <matrixSize><x>{x}</x><y>{y}</y><z>{z}</z></matrixSize>
      <fieldOfView_mm><x>{fov[0]}</x><y>{fov[1]}</y><z>{fov[2]}</z></fieldOfView_mm>
    </encodedSpace>
    <reconSpace>
      <matrixSize><x>{x // 2}</x><y>{y}</y><z>{z}</z></matrixSize>
      <fieldOfView_mm><x>{fov[0] / 2}</x><y>{fov[1]}</y><z>{fov[2]}</z></fieldOfView_mm>
    </reconSpace>
    <encodingLimits><kspace_encoding_step_1>
      <minimum>0</minimum><maximum>{y - 3}</maximum><center>{center}</center>
    </kspace_encoding_step_1></encodingLimits>{more}
  </encoding>
</ismrmrdHeader>"""


# ------------------------------------------------------------------ fastMRI


def write_fastmri(path, values, **datasets):
    with h5py.File(path, "w") as file:
        file["kspace"] = values
        for name, data in datasets.items():
            file[name] = data
        file.attrs["acquisition"] = "CORPD_FBK"
        file.attrs["patient_id"] = b"abc"
        file.attrs["max"] = np.float64(0.5)


def test_fastmri(tmp_path):
    values, mask, reference = (
        noise(3, 4, H, W),
        np.arange(W) % 3 == 0,
        np.random.default_rng(1).random((3, 8, 8)),
    )
    path = tmp_path / "file.h5"
    write_fastmri(path, values, mask=mask, ismrmrd_header=header(), reconstruction_rss=reference)
    kspace, found, metadata = ks.read_kspace(path)
    assert kspace.dtype == torch.complex64
    np.testing.assert_array_equal(kspace, values)
    assert found.dtype == torch.bool
    np.testing.assert_array_equal(found, np.broadcast_to(mask, (3, H, W)))
    np.testing.assert_array_equal(metadata.pop("reference"), reference.astype(np.float32))
    assert metadata == {
        "format": "fastMRI",
        "slices": (0, 1, 2),
        "readout_axis": -2,
        "acquisition": "CORPD_FBK",
        "patient_id": "abc",
        "attributes": {"max": 0.5},
        "encoded_matrix": (H, W, 1),
        "recon_matrix": (H // 2, W, 1),
        "encoded_fov": (320.0, 180.0, 5.0),
        "recon_fov": (160.0, 180.0, 5.0),
        "voxel_size": (5.0, 320 / H, 180 / W),
        "padding": (0, W - 2),
        "reference_name": "reconstruction_rss",
    }


@pytest.mark.parametrize(
    "slices, expected",
    [(1, [1]), (-1, [4]), (slice(1, 3), [1, 2]), (slice(None, None, 2), [0, 2, 4]), (slice(3, 99), [3, 4])],
)
def test_some_slices_alone_are_read(tmp_path, slices, expected):
    values, masks = noise(5, 2, H, W), np.random.default_rng(0).random((5, H, W)) < 0.5
    references = np.random.default_rng(1).random((5, 4, 4)).astype(np.float32)
    # What is not asked for is not looked at.
    values[[s for s in range(5) if s not in expected]] = np.nan
    write_fastmri(tmp_path / "file.h5", values, mask=masks, reconstruction_rss=references)
    np.savez(tmp_path / "file.npz", kspace=values, mask=masks)
    np.save(tmp_path / "file.npy", values)
    for name in ("file.h5", "file.npz", "file.npy"):
        kspace, mask, metadata = ks.read_kspace(tmp_path / name, slices)
        np.testing.assert_array_equal(kspace, values[expected])
        assert metadata["slices"] == tuple(expected)
        if mask is not None:
            np.testing.assert_array_equal(mask, masks[expected])
        if "reference" in metadata:
            np.testing.assert_array_equal(metadata["reference"], references[expected])
    assert (mask is None) == (name == "file.npy")


def test_slices_that_are_not_there(tmp_path):
    path = tmp_path / "file.h5"
    write_fastmri(path, noise(3, 2, H, W))
    for slices in (3, -4):
        with pytest.raises(ValueError, match=f"file.h5: it has 3 slices, slice {slices} is not among them"):
            ks.read_kspace(path, slices)
    for slices in (slice(3, 5), slice(2, 0, -1)):
        with pytest.raises(ValueError, match=r"file.h5: slices .* are none of its 3 in order"):
            ks.read_kspace(path, slices)


def test_single_coil_fastmri(tmp_path):
    values, reference = noise(3, H, W), np.random.default_rng(1).random((3, 8, 8)).astype(np.float32)
    write_fastmri(tmp_path / "file.h5", values, reconstruction_esc=reference)
    kspace, mask, metadata = ks.read_kspace(tmp_path / "file.h5")
    np.testing.assert_array_equal(kspace, values[:, None])
    assert mask is None
    assert metadata["reference_name"] == "reconstruction_esc"
    assert "voxel_size" not in metadata


@pytest.mark.parametrize(
    "values, datasets, message",
    [
        (noise(H, W), {}, r"its k-space has the shape \(16, 12\), not \(slices, coils, H, W\)"),
        (noise(1, 2, 3, H, W), {}, r"its k-space has the shape \(1, 2, 3, 16, 12\)"),
        (noise(0, 2, H, W), {}, r"its k-space has the shape \(0, 2, 16, 12\)"),
        (np.ones((2, 2, H, W), np.float32), {}, "its k-space is float32, not complex"),
        (
            noise(2, 2, H, W),
            {"mask": np.ones(W + 1)},
            r"its mask has the shape \(13,\), but its k-space has 16 rows and 12",
        ),
        (noise(2, 2, H, W), {"mask": np.full(W, 2)}, "its mask holds values other than 0 and 1"),
        (noise(2, 2, H, W), {"mask": np.full(W, np.nan)}, "its mask holds values other than 0 and 1"),
        (noise(2, 2, H, W), {"ismrmrd_header": "<open>"}, "its ISMRMRD header is not XML"),
        (
            noise(2, 2, H, W),
            {"reconstruction_rss": np.ones((3, 4, 4))},
            r"its reconstruction_rss has the shape \(3, 4, 4\)",
        ),
    ],
)
def test_fastmri_files_that_are_wrong(tmp_path, values, datasets, message):
    path = tmp_path / "file.h5"
    write_fastmri(path, values, **datasets)
    with pytest.raises(ValueError, match=rf"file\.h5: {message}"):
        ks.read_kspace(path)


@pytest.mark.parametrize("bad, shown", [(np.nan, "nan"), (np.inf, "inf"), (1e300, "inf")])
def test_samples_that_are_not_finite_are_named(tmp_path, bad, shown):
    values = noise(3, 2, H, W).astype(np.complex128)
    values[2, 1, 3, 4] = bad
    write_fastmri(tmp_path / "file.h5", values)
    message = rf"file\.h5: sample \(3, 4\) of coil 1 in slice 2 is .*{shown}"
    for slices in (None, 2, slice(1, 3)):
        with pytest.raises(ValueError, match=message):
            ks.read_kspace(tmp_path / "file.h5", slices)
    assert ks.read_kspace(tmp_path / "file.h5", 1).kspace.shape == (1, 2, H, W)


# ------------------------------------------------------------------ ISMRMRD

# The layout that the ISMRMRD format publishes, written down here from its documentation.
COUNTERS = np.dtype(
    [
        ("kspace_encode_step_1", "<u2"),
        ("kspace_encode_step_2", "<u2"),
        ("average", "<u2"),
        ("slice", "<u2"),
        ("contrast", "<u2"),
        ("phase", "<u2"),
        ("repetition", "<u2"),
        ("set", "<u2"),
        ("segment", "<u2"),
        ("user", "<u2", (8,)),
    ]
)
HEAD = np.dtype(
    [
        ("version", "<u2"),
        ("flags", "<u8"),
        ("measurement_uid", "<u4"),
        ("scan_counter", "<u4"),
        ("acquisition_time_stamp", "<u4"),
        ("physiology_time_stamp", "<u4", (3,)),
        ("number_of_samples", "<u2"),
        ("available_channels", "<u2"),
        ("active_channels", "<u2"),
        ("channel_mask", "<u8", (16,)),
        ("discard_pre", "<u2"),
        ("discard_post", "<u2"),
        ("center_sample", "<u2"),
        ("encoding_space_ref", "<u2"),
        ("trajectory_dimensions", "<u2"),
        ("sample_time_us", "<f4"),
        ("position", "<f4", (3,)),
        ("read_dir", "<f4", (3,)),
        ("phase_dir", "<f4", (3,)),
        ("slice_dir", "<f4", (3,)),
        ("patient_table_position", "<f4", (3,)),
        ("idx", COUNTERS),
        ("user_int", "<i4", (8,)),
        ("user_float", "<f4", (8,)),
    ]
)
FLOATS = h5py.vlen_dtype(np.dtype("<f4"))
ACQUISITION = np.dtype([("head", HEAD), ("traj", FLOATS), ("data", FLOATS)])


def line(samples, step=0, flags=(), center=None, **fields):
    """One acquisition: samples (C, N), phase encoding, flags counted from 1, counters and header fields."""
    acquisition = np.zeros(1, ACQUISITION)[0]
    head = acquisition["head"]
    head["version"] = 1
    head["flags"] = sum(1 << (flag - 1) for flag in flags)
    head["active_channels"], head["number_of_samples"] = samples.shape
    head["available_channels"] = samples.shape[0]
    head["center_sample"] = samples.shape[1] // 2 if center is None else center
    head["sample_time_us"] = 5.0
    head["idx"]["kspace_encode_step_1"] = step
    for name, value in fields.items():
        (head["idx"] if name in COUNTERS.names else head)[name] = value
    acquisition["traj"] = np.zeros(0, np.float32)
    acquisition["data"] = np.ascontiguousarray(samples).view(np.float32).ravel()
    return acquisition


def write_ismrmrd(path, lines, xml=None, group="dataset"):
    with h5py.File(path, "w") as file:
        target = file.create_group(group)
        target.create_dataset("xml", (1,), h5py.string_dtype())[0] = header() if xml is None else xml
        data = target.create_dataset("data", (0,), ACQUISITION, maxshape=(None,), chunks=(1,))
        data.resize(len(lines), 0)
        for index, acquisition in enumerate(lines):
            data[index] = acquisition


def scan_lines(values, steps, **fields):
    """Lines of k-space (C, H, W) at the given columns."""
    return [line(values[:, :, step], step, **fields) for step in steps]


def test_ismrmrd(tmp_path):
    values = noise(2, 3, H, W)
    steps = [0, 2, 5, 6, 7, 11]
    # Slices in turn, as scanners measure; a slice number may be left out.
    lines = [
        one
        for pair in zip(
            scan_lines(values[0], steps, slice=1), scan_lines(values[1], steps, slice=4), strict=True
        )
        for one in pair
    ]
    path = tmp_path / "scan.h5"
    write_ismrmrd(path, lines)
    kspace, mask, metadata = ks.read_kspace(path)
    expected = np.zeros(W, bool)
    expected[steps] = True
    assert kspace.dtype == torch.complex64
    np.testing.assert_array_equal(kspace, values * expected)
    np.testing.assert_array_equal(mask, np.broadcast_to(expected, (2, H, W)))
    assert metadata == {
        "format": "ISMRMRD",
        "slices": (0, 1),
        "readout_axis": -2,
        "acquisition": "T2 axial",
        "patient_id": "P7",
        "encoded_matrix": (H, W, 1),
        "recon_matrix": (H // 2, W, 1),
        "encoded_fov": (320.0, 180.0, 5.0),
        "recon_fov": (160.0, 180.0, 5.0),
        "voxel_size": (5.0, 320 / H, 180 / W),
        "averages": 1,
        "left_out": {},
        "dwell_time": 5.0,
    }
    one = ks.read_kspace(path, 1)
    np.testing.assert_array_equal(one.kspace, kspace[1:])
    assert one.metadata["slices"] == (1,)


def test_headers_say_what_is_read(tmp_path):
    values = noise(3, 2, H, W)
    write_fastmri(tmp_path / "fast.h5", values, ismrmrd_header=header())
    write_fastmri(tmp_path / "single.h5", values[:, 0])
    write_ismrmrd(
        tmp_path / "scan.h5",
        [one for s in range(3) for one in scan_lines(values[s], range(W), slice=2 * s + 1)],
    )
    np.save(tmp_path / "stack.npy", values)
    np.save(tmp_path / "one.npy", values[0, 0])
    np.savez(tmp_path / "named.npz", kspace=values[0], mask=np.ones(W), maps=values)
    for name in ("fast.h5", "single.h5", "scan.h5", "stack.npy", "one.npy", "named.npz"):
        found = ks.read_kspace_header(tmp_path / name)
        kspace, _, metadata = ks.read_kspace(tmp_path / name)
        assert found.shape == tuple(kspace.shape)
        assert found.format == metadata["format"]
        assert all(metadata[key] == value for key, value in found.metadata.items())
    assert ks.read_kspace_header(tmp_path / "scan.h5").metadata["patient_id"] == "P7"
    dataset = data.KSpaceFolder(
        tmp_path / "scan.h5", remove_oversampling=False, calibration={"kernel_size": 3}
    )
    assert dataset.groups == ["P7"] * 3
    sample = dataset[2]
    torch.testing.assert_close(
        sample.kspace / sample.kspace.abs().max(), torch.from_numpy(values[2] / np.abs(values[2]).max())
    )


def test_many_ismrmrd_lines_are_read_in_blocks(tmp_path):
    values = noise(60, 1, H, W)
    lines = [one for s in range(60) for one in scan_lines(values[s], range(W), slice=s)]
    write_ismrmrd(tmp_path / "scan.h5", lines, group="other")
    np.testing.assert_array_equal(ks.read_kspace(tmp_path / "scan.h5").kspace, values)
    np.testing.assert_array_equal(
        ks.read_kspace(tmp_path / "scan.h5", slice(20, 50, 7)).kspace, values[20:50:7]
    )


def test_ismrmrd_is_read_by_several_threads_at_once(tmp_path):
    values = noise(4, 2, H, W)
    lines = [one for s in range(4) for one in scan_lines(values[s], range(W), slice=s)]
    write_ismrmrd(tmp_path / "scan.h5", lines)
    with ThreadPoolExecutor(8) as threads:
        for read in threads.map(ks.read_kspace, 60 * [tmp_path / "scan.h5"]):
            np.testing.assert_array_equal(read.kspace, values)


def test_a_fork_reads_while_a_thread_of_its_parent_does(tmp_path):
    write_fastmri(tmp_path / "fast.h5", noise(1, 2, H, W))
    opened, over = threading.Event(), threading.Event()

    def hold():
        with open_hdf5(tmp_path / "fast.h5"):
            opened.set()
            over.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    opened.wait()
    child = multiprocessing.get_context("fork").Process(target=ks.read_kspace, args=(tmp_path / "fast.h5",))
    child.start()
    child.join(60)
    code = child.exitcode
    child.kill()
    over.set()
    thread.join()
    assert code == 0


def test_ismrmrd_repeated_lines_are_averaged(tmp_path):
    values = noise(4, 2, H, W)
    lines = []
    for repetition in range(2):
        for average in range(2):
            # Of column 3 there is but one measurement, column 4 is measured in the first repetition alone.
            steps = [
                s for s in range(W) if (s != 3 or repetition + average == 0) and (s != 4 or repetition == 0)
            ]
            lines += scan_lines(
                values[2 * repetition + average], steps, repetition=repetition, average=average
            )
    path = tmp_path / "scan.h5"
    write_ismrmrd(path, lines)
    kspace, mask, metadata = ks.read_kspace(path)
    expected = values.mean(0)
    expected[:, :, 3], expected[:, :, 4] = values[0, :, :, 3], values[:2, :, :, 4].mean(0)
    np.testing.assert_allclose(kspace[0], expected, rtol=1e-5, atol=1e-6)
    assert mask.all()
    assert metadata["averages"] == 4
    one = ks.read_kspace(path, select={"repetition": 1, "average": 0})
    columns = [s for s in range(W) if s not in (3, 4)]
    np.testing.assert_array_equal(one.kspace[0][:, :, columns], values[2][:, :, columns])
    assert not one.mask[..., 3:5].any()
    with pytest.raises(ValueError, match=r"scan\.h5: it has no repetition 2, only: 0, 1"):
        ks.read_kspace(path, select={"repetition": 2})
    with pytest.raises(
        ValueError, match=r"scan\.h5: it has no counter 'slice' to select, only: average, repetition"
    ):
        ks.read_kspace(path, select={"slice": 0})


@pytest.mark.parametrize("counter", ["contrast", "phase", "set"])
def test_ismrmrd_images_that_differ_are_not_mixed(tmp_path, counter):
    values = noise(2, 2, H, W)
    lines = [one for k in range(2) for one in scan_lines(values[k], range(W), **{counter: k})]
    path = tmp_path / "scan.h5"
    write_ismrmrd(path, lines)
    with pytest.raises(ValueError, match=rf"scan\.h5: it holds several of {counter}, select one of: 0, 1"):
        ks.read_kspace(path)
    np.testing.assert_array_equal(ks.read_kspace(path, select={counter: 1}).kspace[0], values[1])


def test_ismrmrd_readouts_are_centred(tmp_path):
    values = noise(2, H, W)
    lines = scan_lines(values, range(2, W))
    # A partial echo: only the last 10 samples, whose third is the zero frequency (8 of the matrix).
    lines.append(line(values[:, 6:, 0], 0, center=2))
    # One and two samples to be thrown away around a line measured backwards.
    padded = np.concatenate([noise(2, 1), values[:, ::-1, 1], noise(2, 2)], axis=1)
    lines.append(line(padded, 1, flags=[22], center=1 + H - 1 - H // 2, discard_pre=1, discard_post=2))
    write_ismrmrd(tmp_path / "scan.h5", lines)
    kspace, mask, _ = ks.read_kspace(tmp_path / "scan.h5")
    values[:, :6, 0] = 0
    np.testing.assert_array_equal(kspace[0], values)
    assert not mask[0, :6, 0].any()
    assert mask.sum() == H * W - 6


def test_ismrmrd_centre_of_the_phase_encoding_and_unset_centre_sample(tmp_path):
    values = noise(2, H, 5)
    lines = [line(values[:, :, step], step, center=0) for step in range(5)]
    write_ismrmrd(tmp_path / "scan.h5", lines, header(center=2))
    kspace, mask, _ = ks.read_kspace(tmp_path / "scan.h5")
    np.testing.assert_array_equal(kspace[0, :, :, W // 2 - 2 : W // 2 + 3], values)
    assert mask.sum() == 5 * H


def test_ismrmrd_acquisitions_that_are_no_image(tmp_path):
    values, silence = noise(3, H, W), noise(3, 40, seed=1)
    lines = [
        line(silence[:, :30], flags=[19], sample_time_us=2.5),
        line(noise(5, 8), flags=[23]),
        line(noise(3, H), 4, flags=[24, 1]),
        line(noise(3, H), 4, flags=[20]),
        line(noise(3, H), 4, encoding_space_ref=1),
        *scan_lines(values, range(W), flags=[21, 7]),
        line(silence[:, 30:], flags=[19], sample_time_us=2.5),
    ]
    path = tmp_path / "scan.h5"
    write_ismrmrd(path, lines)
    kspace, _, metadata = ks.read_kspace(path)
    np.testing.assert_array_equal(kspace[0], values)
    assert metadata["left_out"] == {
        "navigator": 1,
        "phase correction": 1,
        "separate calibration": 1,
        "another encoding space": 1,
    }
    np.testing.assert_array_equal(metadata["noise"], silence)
    assert (metadata["dwell_time"], metadata["noise_dwell_time"]) == (5.0, 2.5)


def test_ismrmrd_embedded_calibration_lines_belong_to_the_image(tmp_path):
    values = noise(2, H, W)
    lines = scan_lines(values, range(0, W, 2)) + scan_lines(values, [5, 7], flags=[20])
    for mode, expected in (("embedded", 8), ("separate", 6)):
        more = f"<parallelImaging><calibrationMode>{mode}</calibrationMode></parallelImaging>"
        write_ismrmrd(tmp_path / "scan.h5", lines, header(more=more))
        kspace, mask, _ = ks.read_kspace(tmp_path / "scan.h5")
        assert mask[0, 0].sum() == expected
        np.testing.assert_array_equal(kspace[0], values * mask[0].numpy())


@pytest.mark.parametrize(
    "lines, xml, message",
    [
        (
            [line(noise(2, 9), flags=[19])],
            None,
            "a file without k-space: none of its 1 acquisitions are lines",
        ),
        ([], None, "a file without k-space: none of its 0 acquisitions"),
        ([line(noise(2, H)), line(noise(3, H))], None, "its lines have different numbers of coils: 2, 3"),
        (
            [line(noise(2, H), W)],
            None,
            "acquisition 0 lies outside the encoded matrix of 16 by 12: .* phase encoding 12",
        ),
        ([line(noise(2, H + 2))], None, r"acquisition 0 lies outside .*: samples -1\.\.16 of the readout"),
        (
            [line(noise(2, H), number_of_samples=9)],
            None,
            "acquisition 0 holds 64 values of float32, not the 36",
        ),
        ([line(noise(2, H))], header(trajectory="radial"), "its trajectory is 'radial', not Cartesian"),
        (
            [line(noise(2, H))],
            header(matrix=(H, W, 8)),
            r"its encoding is three-dimensional \(8 partitions\)",
        ),
        ([line(noise(2, H))], "<a/>", "its ISMRMRD header has no encoded matrix size"),
        ([line(noise(2, H))], "no xml", "its ISMRMRD header is not XML"),
        (
            [line(np.full((2, H), np.nan, np.complex64), 3)],
            None,
            r"sample \(0, 3\) of coil 0 in slice 0 is .*nan",
        ),
        (
            [line(noise(2, H)), line(noise(2, 9), flags=[19]), line(noise(3, 9), flags=[19])],
            None,
            "its noise acquisitions have different numbers of coils",
        ),
    ],
)
def test_ismrmrd_files_that_are_wrong(tmp_path, lines, xml, message):
    write_ismrmrd(tmp_path / "scan.h5", lines, xml)
    with pytest.raises(ValueError, match=rf"scan\.h5: {message}"):
        ks.read_kspace(tmp_path / "scan.h5")


def test_a_file_that_the_ismrmrd_package_wrote(tmp_path):
    ismrmrd = pytest.importorskip("ismrmrd")
    values = noise(2, H, W)
    dataset = ismrmrd.Dataset(tmp_path / "scan.h5", "dataset", create_if_needed=True)
    dataset.write_xml_header(header().encode())
    for step in range(W):
        acquisition = ismrmrd.Acquisition.from_array(np.ascontiguousarray(values[:, :, step]))
        acquisition.idx.kspace_encode_step_1 = step
        acquisition.center_sample = H // 2
        dataset.append_acquisition(acquisition)
    dataset.close()
    kspace, mask, _ = ks.read_kspace(tmp_path / "scan.h5")
    np.testing.assert_array_equal(kspace[0], values)
    assert mask.all()


# ------------------------------------------------------------------ NPY, NPZ, other files


@pytest.mark.parametrize("shape", [(H, W), (3, H, W), (2, 3, H, W)])
@pytest.mark.parametrize("dtype", [np.complex64, np.complex128])
def test_arrays(tmp_path, shape, dtype):
    values = noise(*shape).astype(dtype)
    np.save(tmp_path / "a.npy", values)
    np.savez(tmp_path / "a.npz", measured=values, mask=np.arange(W) % 2)
    expected = values.reshape((1,) * (4 - len(shape)) + shape)
    plain, archived = ks.read_kspace(tmp_path / "a.npy"), ks.read_kspace(tmp_path / "a.npz")
    for file in (plain, archived):
        assert file.kspace.dtype == torch.complex64
        np.testing.assert_array_equal(file.kspace, expected)
    assert plain.mask is None
    assert plain.metadata == {"format": "NPY", "slices": tuple(range(len(expected)))}
    np.testing.assert_array_equal(archived.mask, np.broadcast_to(np.arange(W) % 2, (len(expected), H, W)))


def test_names_of_arrays(tmp_path):
    a, b = noise(H, W), noise(H, W, seed=1)
    path = tmp_path / "two.npz"
    np.savez(path, a=a, b=b)
    np.testing.assert_array_equal(ks.read_kspace(path, array="b").kspace[0, 0], b)
    with pytest.raises(ValueError, match=r"two\.npz: it holds 2 arrays, name one of: a, b"):
        ks.read_kspace(path)
    with pytest.raises(ValueError, match=r"two\.npz: it holds no array 'c', only: a, b"):
        ks.read_kspace(path, array="c")
    np.savez(path, other=a, kspace=b)
    np.testing.assert_array_equal(ks.read_kspace(path).kspace[0, 0], b)
    np.savez(path, other=a, kspace=b, mask=np.ones(H))
    with pytest.raises(
        ValueError, match=r"its mask has the shape \(16,\), but its k-space has 16 rows and 12 columns"
    ):
        ks.read_kspace(path)
    write_fastmri(tmp_path / "file.h5", noise(1, 1, H, W))
    with pytest.raises(ValueError, match=r"file\.h5: an HDF5 file has no named arrays to choose from"):
        ks.read_kspace(tmp_path / "file.h5", array="kspace")
    for name in ("file.h5", "two.npz"):
        with pytest.raises(ValueError, match=f"{name}: an? .* file has no counters, cannot select contrast"):
            ks.read_kspace(tmp_path / name, select={"contrast": 0})


@pytest.mark.parametrize("kept", [0.05, 0.3, 0.6, 0.95])
@pytest.mark.parametrize("kind", ["fastmri.h5", "ismrmrd.h5", "a.npy", "a.npz"])
def test_a_truncated_file_is_named(tmp_path, kind, kept):
    path, values = tmp_path / kind, noise(1, 2, H, W)
    if kind == "fastmri.h5":
        write_fastmri(path, values, ismrmrd_header=header())
    elif kind == "ismrmrd.h5":
        write_ismrmrd(path, scan_lines(values[0], range(W)))
    elif kind == "a.npy":
        np.save(path, values)
    else:
        np.savez_compressed(path, kspace=values)
    np.testing.assert_array_equal(ks.read_kspace(path).kspace, values)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(ValueError, match=f"{kind}: ."):
        ks.read_kspace(path)


def test_content_decides_and_not_the_name(tmp_path):
    values = noise(1, 2, H, W)
    write_fastmri(tmp_path / "file.dat", values)
    assert ks.read_kspace(tmp_path / "file.dat").metadata["format"] == "fastMRI"
    np.save(tmp_path / "a.npy", values)
    (tmp_path / "a.npy").rename(tmp_path / "a.h5")
    assert ks.read_kspace(tmp_path / "a.h5").metadata["format"] == "NPY"
    with h5py.File(tmp_path / "block.h5", "w", userblock_size=512) as file:
        file["kspace"] = values
    np.testing.assert_array_equal(ks.read_kspace(tmp_path / "block.h5").kspace, values)


def test_other_files_are_named(tmp_path):
    path = tmp_path / "note.h5"
    path.write_text("this is not HDF5 " * 400)
    with pytest.raises(ValueError, match=r"note\.h5: its name ends in \.h5, but its content is not HDF5"):
        ks.read_kspace(path)
    path.rename(tmp_path / "note.txt")
    with pytest.raises(ValueError, match=r"note\.txt: not an HDF5, NPY, NPZ or MATLAB file"):
        ks.read_kspace(tmp_path / "note.txt")
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"note\.h5: the file is empty"):
        ks.read_kspace(path)
    with h5py.File(path, "w") as file:
        file["image"] = np.ones((4, 4))
        file.create_group("dataset")["data"] = np.ones(3)
    with pytest.raises(ValueError, match=r"note\.h5: a file without k-space: .*, only: dataset, image"):
        ks.read_kspace(path)
    with h5py.File(path, "w"):
        pass
    with pytest.raises(ValueError, match=r"note\.h5: a file without k-space: .*, only: nothing"):
        ks.read_kspace(path)
    for values, message in (
        (np.ones((4, 4)), "its k-space is float64, not complex"),
        (noise(4), r"its k-space has the shape \(4,\), not \(H, W\)"),
    ):
        np.save(tmp_path / "real.npy", values)
        with pytest.raises(ValueError, match=rf"real\.npy: {message}"):
            ks.read_kspace(tmp_path / "real.npy")
    with pytest.raises(FileNotFoundError, match=r"missing\.h5"):
        ks.read_kspace(tmp_path / "missing.h5")
    with pytest.raises(IsADirectoryError):
        ks.read_kspace(tmp_path)


# ------------------------------------------------------------------ files from elsewhere


def external_link(file, elsewhere):
    file["kspace"] = h5py.ExternalLink(elsewhere, "kspace")


def soft_link_by_way_of_another(file, elsewhere):
    file["there"] = h5py.ExternalLink(elsewhere, "/")
    file["kspace"] = h5py.SoftLink("/there/kspace")


def virtual(file, elsewhere):
    layout = h5py.VirtualLayout((1, 2, H, W), np.complex64)
    layout[:] = h5py.VirtualSource(elsewhere, "kspace", (1, 2, H, W))
    file.create_virtual_dataset("kspace", layout)


def external_storage(file, elsewhere):
    file.create_dataset("kspace", (1, 2, H, W), np.complex64, external=[(elsewhere, 0, h5py.h5f.UNLIMITED)])


@pytest.mark.parametrize(
    "write", [external_link, soft_link_by_way_of_another, virtual, external_storage], ids=lambda f: f.__name__
)
def test_hdf5_that_points_elsewhere(tmp_path, write):
    write_fastmri(tmp_path / "secret.h5", noise(1, 2, H, W))
    with h5py.File(tmp_path / "scan.h5", "w") as file:
        write(file, str(tmp_path / "secret.h5"))
    for read in (ks.read_kspace, ks.read_kspace_header, data.read_array, data.KSpaceFolder):
        with pytest.raises(ValueError, match=r"scan\.h5: its '\w+' is .* another file"):
            read(tmp_path / "scan.h5")


def test_links_within_a_file(tmp_path):
    values = noise(1, 2, H, W)
    with h5py.File(tmp_path / "scan.h5", "w") as file:
        file["raw/values"] = values
        file["kspace"] = h5py.SoftLink("/raw/values")
        file["nowhere"] = h5py.SoftLink("/raw/nothing")
    np.testing.assert_array_equal(ks.read_kspace(tmp_path / "scan.h5").kspace, values)


@pytest.mark.parametrize(
    "shape, options, message",
    [
        ((10**12, 2, H, W), {"chunks": (1, 2, H, W)}, "takes 3072000000000000 bytes, and the file stores"),
        ((3, 2, H, W), {"chunks": (1, 2, H, W)}, "0 of 3 parts were written"),
        ((3, 2, H, W), {}, "0 of 1 parts were written"),
        ((3, 2, H, W), {"chunks": (1, 2, H, W), "compression": "gzip"}, "0 of 3 parts were written"),
        ((1, 2, H, W), {"chunks": (64, 64, 512, 512), "maxshape": (None,) * 4}, "a chunk of its 'kspace'"),
    ],
)
def test_hdf5_that_claims_more_than_it_stores(tmp_path, shape, options, message):
    with h5py.File(tmp_path / "scan.h5", "w") as file:
        file.create_dataset("kspace", shape, np.complex64, **options)
        file.attrs["more"] = np.zeros(4000)
    for read in (ks.read_kspace, ks.read_kspace_header, data.read_array):
        with pytest.raises(ValueError, match=rf"scan\.h5: .*({message})"):
            read(tmp_path / "scan.h5")


def test_what_unpacks_beyond_measure(tmp_path, monkeypatch):
    monkeypatch.setattr("oder_fast.data.files.SMALL", 2**16)
    values = np.zeros((1, 4, 512, 512), np.complex64)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("kspace", data=values, compression="gzip")
    np.savez_compressed(tmp_path / "a.npz", kspace=values)
    scipy.io.savemat(tmp_path / "a.mat", {"kspace": values}, do_compression=True)
    for name in ("a.h5", "a.npz", "a.mat"):
        for read in (ks.read_kspace, data.read_array):
            with pytest.raises(
                ValueError, match=rf"{name}: its 'kspace' .*takes \d+ bytes, and the file stores"
            ):
                read(tmp_path / name)


def test_headers_that_ask_for_more(tmp_path):
    content = b"kspace"
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive, archive.open("kspace.npy", "w") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<c8", "fortran_order": False, "shape": (10**9, 8, 8)}
        )
        file.write(content)
    with pytest.raises(ValueError, match=r"a\.npz: its 'kspace' of shape .* takes 512000000000 bytes"):
        ks.read_kspace(tmp_path / "a.npz")
    write_ismrmrd(tmp_path / "a.h5", [line(noise(2, H))], header(matrix=(60000, 60000, 1)))
    with pytest.raises(ValueError, match=r"a\.h5: its k-space of shape \(1, 2, 60000, 60000\) takes"):
        ks.read_kspace(tmp_path / "a.h5")
    for matrix in ((0, W, 1), (-4, W, 1), ("many", W, 1), ("nan", W, 1), ("inf", W, 1)):
        xml = header().replace(f"<x>{H}</x>", f"<x>{matrix[0]}</x>", 1)
        write_ismrmrd(tmp_path / "a.h5", [line(noise(2, H))], xml)
        with pytest.raises(ValueError, match=r"a\.h5: its ISMRMRD header has"):
            ks.read_kspace(tmp_path / "a.h5")


def test_a_heap_on_which_hdf5_would_not_return(tmp_path):
    path = tmp_path / "scan.h5"
    write_ismrmrd(path, scan_lines(noise(2, H, W), range(W)))
    content = bytearray(path.read_bytes())
    # The second object of the last heap gets the index and the size 0.
    first = content.rindex(b"GCOL") + 16
    length = int.from_bytes(content[first + 8 : first + 16], "little")
    second = first + 16 + length + -length % 8
    content[second : second + 16] = bytes(16)
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"scan\.h5: it is damaged: a heap of its values is not filled by them"
    ):
        ks.read_kspace(path)


# ------------------------------------------------------------------ MATLAB, masks


def write_matlab(path, **arrays):
    """As MATLAB's -v7.3 does."""
    with h5py.File(path, "w", userblock_size=512) as file:
        for name, values in arrays.items():
            stored = values.T
            if np.iscomplexobj(values):
                stored = np.empty(values.T.shape, [("real", "<f8"), ("imag", "<f8")])
                stored["real"], stored["imag"] = values.T.real, values.T.imag
            file[name] = stored
            file[name].attrs["MATLAB_class"] = np.bytes_("logical" if values.dtype == np.uint8 else "double")
        file["#refs#/a"] = np.ones(3)


@pytest.mark.parametrize("version", ["7.3", "7", "6"])
def test_matlab(tmp_path, version):
    path, values, maps = tmp_path / "scan.mat", noise(3, 2, H, W), noise(2, H, W, seed=1)
    mask = (np.arange(W) % 3 == 0).astype(np.uint8)[None]

    def write(**arrays):
        if version == "7.3":
            write_matlab(path, **arrays)
        else:
            scipy.io.savemat(path, arrays | {"note": "text"}, do_compression=version == "7")

    write(kspace=values, mask=mask, maps=maps)
    kspace, found, metadata = ks.read_kspace(path, slice(1, 3))
    np.testing.assert_allclose(kspace, values[1:], rtol=1e-6)
    np.testing.assert_array_equal(found, np.broadcast_to(mask == 1, (2, H, W)))
    assert metadata == {"format": "MATLAB", "slices": (1, 2)}
    assert ks.read_kspace_header(path).shape == values.shape
    np.testing.assert_allclose(data.read_array(path, "maps"), maps, rtol=1e-6)
    write(first=values[0], second=values[1])
    np.testing.assert_allclose(ks.read_kspace(path, array="second").kspace[0], values[1], rtol=1e-6)
    with pytest.raises(ValueError, match=r"scan\.mat: it holds 2 arrays, name one of: first, second"):
        ks.read_kspace(path)
    write(kspace=values.real)
    with pytest.raises(ValueError, match=r"scan\.mat: its k-space is float(32|64), not complex"):
        ks.read_kspace(path)


def test_matlab_marks_what_is_no_array(tmp_path):
    with h5py.File(tmp_path / "a.mat", "w") as file:
        for name, kind in (("empty", b"double"), ("text", b"char")):
            file[name] = np.array([0, 180], np.uint64)  # of what is empty MATLAB stores the size
            file[name].attrs["MATLAB_class"] = np.bytes_(kind)
        file["empty"].attrs["MATLAB_empty"] = np.int32(1)
    with pytest.raises(ValueError, match=r"a\.mat: its 'empty' is empty"):
        data.read_array(tmp_path / "a.mat", "empty")
    with pytest.raises(ValueError, match=r"a\.mat: its 'text' is text, not numbers"):
        data.read_array(tmp_path / "a.mat", "text")


@pytest.mark.parametrize("dtype", ["?", "u1", "i8", "f4", "f8"])
@pytest.mark.parametrize("shape", [(W,), (1, W), (H, 1), (H, W), (1, H, W), (2, 1, W), (2, H, W)])
def test_masks(tmp_path, shape, dtype):
    values = noise(2, 3, H, W)
    sampled = np.random.default_rng(1).random(shape) < 0.5
    for scale in (1,) if dtype == "?" else (1, 255):
        stored = (sampled * scale).astype(dtype)
        if dtype[0] == "f":
            stored += np.random.default_rng(2).normal(size=shape).astype(dtype) * 1e-5 * scale
        write_fastmri(tmp_path / "a.h5", values, mask=stored)
        np.savez(tmp_path / "a.npz", kspace=values, mask=stored)
        for name in ("a.h5", "a.npz"):
            found = ks.read_kspace(tmp_path / name).mask
            np.testing.assert_array_equal(found, np.broadcast_to(sampled, (2, H, W)))


@pytest.mark.parametrize(
    "mask, message",
    [
        (np.zeros(W), "its mask samples nothing"),
        (np.arange(W), "its mask holds values other than 0 and 1"),
        (np.array([0, 0.5, 1] * (W // 3)), "its mask holds values other than 0 and 1"),
        (np.array([0, 1, 255] * (W // 3)), "its mask holds values other than 0 and 1"),
        (np.array([0, np.inf] * (W // 2)), "its mask holds values other than 0 and 1"),
        (np.ones((W, 1)), r"its mask has the shape \(12, 1\)"),
        (np.ones((1, 1, 1, W)), r"its mask has the shape \(1, 1, 1, 12\)"),
        (np.ones(0), r"its mask has the shape \(0,\)"),
        (np.ones(W, np.complex64), "its mask is complex64, not of numbers 0 and 1"),
    ],
)
def test_masks_that_are_wrong(tmp_path, mask, message):
    np.savez(tmp_path / "a.npz", kspace=noise(2, H, W), mask=mask)
    with pytest.raises(ValueError, match=rf"a\.npz: {message}"):
        ks.read_kspace(tmp_path / "a.npz")


# ------------------------------------------------------------------ readouts


def test_ismrmrd_complete_lines_that_run_backwards(tmp_path):
    for height in (H, H + 1):
        values = noise(2, height, W)
        for center in {0, height // 2, (height - 1) // 2}:
            lines = [
                line(values[:, :: 1 - 2 * (j % 2), j], j, [22] * (j % 2), center=center) for j in range(W)
            ]
            write_ismrmrd(tmp_path / "scan.h5", lines, header(matrix=(height, W, 1)))
            np.testing.assert_array_equal(ks.read_kspace(tmp_path / "scan.h5").kspace[0], values)


@pytest.mark.parametrize(
    "told, field, expected",
    [
        (2 * H, (320.0, 160.0), (H, 160.0)),  # oversampling was removed from the lines alone
        (H // 2, (160.0, 160.0), (H, 320.0)),  # and kept out of the header
        (H // 2, (320.0, 160.0), (H, 320.0)),  # of whose matrix alone
        (H // 2, (319.9, 160.0), (H, 319.9)),
        (H, (320.0, 160.0), (H, 320.0)),
    ],
)
def test_ismrmrd_headers_that_disagree_with_the_lines(tmp_path, told, field, expected):
    values = noise(2, H, W)
    xml = header(matrix=(told, W, 1), fov=(field[0], 180.0, 5.0)).replace(
        f"<x>{field[0] / 2}</x>", f"<x>{field[1]}</x>"
    )
    for center in (H // 2, 0):
        write_ismrmrd(tmp_path / "scan.h5", [line(values[:, :, j], j, center=center) for j in range(W)], xml)
        kspace, mask, metadata = ks.read_kspace(tmp_path / "scan.h5")
        np.testing.assert_array_equal(kspace[0], values)
        assert mask.all()
        assert (metadata["encoded_matrix"][0], metadata["encoded_fov"][0]) == expected
        assert metadata["voxel_size"][1] == pytest.approx(expected[1] / H)
        assert ks.read_kspace_header(tmp_path / "scan.h5").shape == (1, 2, H, W)


def test_ismrmrd_half_an_echo_is_no_readout_without_oversampling(tmp_path):
    values = noise(2, H // 2, W)
    lines = [line(values[:, :, j], j, center=0 if j < 0 else 1) for j in range(W)]
    write_ismrmrd(tmp_path / "scan.h5", lines)
    kspace, mask, _ = ks.read_kspace(tmp_path / "scan.h5")
    np.testing.assert_array_equal(kspace[0, :, H // 2 - 1 : H - 1], values)
    assert mask.sum() == H // 2 * W


def test_ismrmrd_calibration_lines_that_are_of_the_image_too(tmp_path):
    values = noise(2, H, W)
    write_ismrmrd(tmp_path / "scan.h5", scan_lines(values, range(W), flags=[20, 21]))
    np.testing.assert_array_equal(ks.read_kspace(tmp_path / "scan.h5").kspace[0], values)


def test_each_image_of_a_file_can_be_selected(tmp_path):
    values = noise(4, 2, H, W)
    lines = [
        one for k in range(4) for one in scan_lines(values[k], range(W), contrast=k // 2, set=3 * (k % 2))
    ]
    write_ismrmrd(tmp_path / "scan.h5", lines)
    found = ks.kspace_selections(tmp_path / "scan.h5", {})
    assert found == [{"contrast": c, "set": s} for c in (0, 1) for s in (0, 3)]
    for k, select in enumerate(found):
        np.testing.assert_array_equal(
            ks.read_kspace(tmp_path / "scan.h5", select=select).kspace[0], values[k]
        )
    assert ks.kspace_selections(tmp_path / "scan.h5", {"contrast": 1}) == [{"set": 0}, {"set": 3}]
    assert ks.kspace_selections(tmp_path / "scan.h5", {"contrast": 1, "set": 0}) == [{}]
