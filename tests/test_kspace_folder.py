import h5py
import numpy as np
import pytest
import scipy.io
import torch
from torch.utils.data import DataLoader

from oder_fast import CartesianMRI, data

H, W, C = 40, 36, 4


def transform(values, inverse=False):
    fft = torch.fft.ifft2 if inverse else torch.fft.fft2
    return torch.fft.fftshift(fft(torch.fft.ifftshift(values, dim=(-2, -1)), norm="ortho"), dim=(-2, -1))


@pytest.fixture(scope="module")
def scan():
    """Images (3, H, W), maps (C, H, W) and k-space (3, C, H, W)."""
    images = data.brain_like(3, H, torch.Generator().manual_seed(0))[:, :, 2:-2]
    maps = data.birdcage_maps(C, (H, W))
    return images, maps, transform(images[:, None] * maps) * 50


def header(oversampling=1):
    return f"""<ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD"><encoding>
      <encodedSpace><matrixSize><x>{H}</x><y>{W}</y><z>1</z></matrixSize>
      <fieldOfView_mm><x>{200 * oversampling}</x><y>180</y><z>5</z></fieldOfView_mm></encodedSpace>
      <reconSpace><matrixSize><x>{H // oversampling}</x><y>{W}</y><z>1</z></matrixSize>
      <fieldOfView_mm><x>200</x><y>180</y><z>5</z></fieldOfView_mm></reconSpace></encoding></ismrmrdHeader>"""


def write(path, kspace, patient=None, **datasets):
    with h5py.File(path, "w") as file:
        file["kspace"] = kspace
        for name, values in datasets.items():
            file[name] = values
        if patient is not None:
            file.attrs["patient_id"] = patient


def check(sample, images, maps, k):
    """The reference is the image, scaled; k-space is that of the reference."""
    largest = images[k].abs().amax()
    torch.testing.assert_close(sample.image, images[k] / largest, rtol=0, atol=2e-5)
    assert sample.image.abs().max() == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(sample.kspace, transform(maps * sample.image), rtol=0, atol=1e-4)
    assert sample.image.dtype == sample.kspace.dtype == sample.maps.dtype == torch.complex64


@pytest.mark.parametrize("kind", ["h5", "npz"])
@pytest.mark.parametrize("per_slice", [False, True])
def test_maps_of_the_file(tmp_path, scan, kind, per_slice):
    images, maps, kspace = scan
    stored = maps.expand(3, C, H, W) if per_slice else maps
    if kind == "h5":
        write(tmp_path / "a.h5", kspace, "P1", maps=stored)
    else:
        np.savez(tmp_path / "a.npz", kspace=kspace, maps=stored)
    dataset = data.KSpaceFolder(tmp_path, maps="file")
    assert dataset.names == [f"a.{kind}[{k}]" for k in range(3)]
    assert dataset.groups == ["P1" if kind == "h5" else "a.npz"] * 3
    assert data.common_shape(dataset) == (H, W)
    for k, sample in enumerate(dataset):
        check(sample, images, maps, k)
        assert torch.equal(sample.maps, maps)


def test_estimated_maps(tmp_path, scan):
    images, _, kspace = scan
    np.save(tmp_path / "a.npy", kspace)
    dataset = data.KSpaceFolder(tmp_path, calibration={"calibration_size": 20})
    sample = dataset[1]
    # The reference is what one sees with maps of unit norm: all of the magnitude.
    torch.testing.assert_close(sample.maps.abs().square().sum(0), torch.ones(H, W), rtol=0, atol=1e-4)
    torch.testing.assert_close(
        sample.image.abs(), images[1].abs() / images[1].abs().amax(), rtol=0, atol=0.02
    )
    expected = data.espirit_maps(sample.kspace, calibration_size=20)
    torch.testing.assert_close(sample.maps, expected, rtol=0, atol=1e-3)
    again = data.KSpaceFolder(tmp_path, calibration={"calibration_size": 20})[1]
    for one, other in zip(sample[1:4], again[1:4], strict=True):
        assert torch.equal(one, other)


def test_it_is_what_the_operator_measures(tmp_path, scan):
    _, maps, kspace = scan
    np.savez(tmp_path / "a.npz", kspace=kspace, maps=maps)
    dataset = data.KSpaceFolder(tmp_path, maps="file")
    batch = next(iter(DataLoader(dataset, batch_size=3, collate_fn=data.collate)))
    operator = CartesianMRI(batch.maps[0], torch.ones(W, dtype=torch.bool))
    torch.testing.assert_close(operator(batch.image), batch.kspace, rtol=0, atol=1e-4)
    torch.testing.assert_close(operator.adjoint(batch.kspace), batch.image, rtol=0, atol=1e-4)


def test_stored_maps(tmp_path, scan):
    _, _, kspace = scan
    (tmp_path / "scans").mkdir()
    np.save(tmp_path / "scans" / "a.npy", kspace)
    cache = tmp_path / "scans" / "maps"
    options = {"calibration": {"calibration_size": 16}}
    plain = data.KSpaceFolder(tmp_path / "scans", **options)[2]
    for _ in range(2):
        dataset = data.KSpaceFolder(tmp_path / "scans", cache=cache, **options)
        assert len(dataset) == 3
        for one, other in zip(dataset[2][1:4], plain[1:4], strict=True):
            assert torch.equal(one, other)
        assert len(list(cache.iterdir())) == 1
    # The stored maps are what is used.
    (path,) = cache.iterdir()
    with path.open("wb") as file:
        np.savez(file, maps=np.ones((C, H, W), np.complex64))
    assert torch.equal(dataset[2].maps, torch.ones(C, H, W, dtype=torch.complex64))
    path.write_bytes(b"damaged")
    assert torch.equal(dataset[2].maps, plain.maps)
    data.KSpaceFolder(tmp_path / "scans", cache=cache)[2]
    assert len(list(cache.iterdir())) == 2


def test_single_coil(tmp_path, scan):
    images = scan[0]
    write(tmp_path / "a.h5", transform(images))
    sample = data.KSpaceFolder(tmp_path)[0]
    assert torch.equal(sample.maps, torch.ones(1, H, W, dtype=torch.complex64))
    torch.testing.assert_close(sample.image, images[0] / images[0].abs().amax(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("cut_maps", [False, True])
def test_readout_oversampling(tmp_path, scan, cut_maps):
    images, maps, kspace = scan
    middle = slice(H // 4, H // 4 + H // 2)
    stored = maps[:, middle] if cut_maps else maps
    write(tmp_path / "a.h5", kspace, ismrmrd_header=header(2), maps=stored)
    dataset = data.KSpaceFolder(tmp_path, maps="file")
    assert dataset.shapes == [(H // 2, W)] * 3
    sample = dataset[1]
    assert sample.kspace.shape == sample.maps.shape == (C, H // 2, W)
    check(sample, images[:, middle], maps[:, middle], 1)
    if not cut_maps:
        whole = data.KSpaceFolder(tmp_path, maps="file", remove_oversampling=False)
        check(whole[1], images, maps, 1)
        assert whole.fingerprint(1) != dataset.fingerprint(1)


def test_undersampled_kspace_is_refused(tmp_path, scan):
    _, maps, kspace = scan
    lines = torch.arange(W) % 3 != 1
    write(tmp_path / "mask.h5", kspace, maps=maps, mask=lines)
    write(tmp_path / "zeros.h5", kspace * lines, maps=maps)
    for name in ("mask", "zeros"):
        with pytest.raises(
            ValueError, match=rf"{name}\.h5: its k-space is undersampled, 480 of 1440 samples are missing"
        ):
            data.KSpaceFolder(tmp_path / f"{name}.h5", maps="file")[0]
    # Lines missing at the ends are none between others.
    ends = (torch.arange(W) > 3) & (torch.arange(W) < 30)
    write(tmp_path / "ends.h5", kspace * ends, maps=maps)
    assert data.KSpaceFolder(tmp_path / "ends.h5", maps="file")[0].kspace[..., :4].abs().max() == 0
    write(tmp_path / "nothing.h5", kspace * 0, maps=maps)
    with pytest.raises(ValueError, match=r"nothing\.h5: its k-space is zero everywhere"):
        data.KSpaceFolder(tmp_path / "nothing.h5", maps="file")[0]


def test_groups_and_folders(tmp_path, scan):
    kspace, maps = scan[2], scan[1]
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "a.h5", kspace[:1], "P1", maps=maps)
    write(tmp_path / "sub" / "b.h5", kspace[:2], maps=maps)
    write(tmp_path / "c.h5", kspace[:1], "P1", maps=maps)
    (tmp_path / "notes.txt").write_text("text")
    dataset = data.KSpaceFolder(tmp_path, maps="file")
    assert dataset.groups == ["P1", "P1", "sub/b.h5", "sub/b.h5"]
    assert dataset.left_out == {"another kind of file": 1}
    assert set(data.KSpaceFolder(tmp_path, maps="file", group=lambda path: path.parent.name).groups) == {
        tmp_path.name,
        "sub",
    }
    with pytest.raises(ValueError, match=r"no k-space \(HDF5, NPY, NPZ, MATLAB\) in it"):
        data.KSpaceFolder([])
    with pytest.raises(FileNotFoundError):
        data.KSpaceFolder(tmp_path / "nowhere")


def test_files_that_are_wrong(tmp_path, scan):
    _, maps, kspace = scan
    write(tmp_path / "a.h5", kspace)
    with pytest.raises(ValueError, match=r"a\.h5: it holds no coil maps under the name 'maps'"):
        data.KSpaceFolder(tmp_path, maps="file")
    write(tmp_path / "a.h5", kspace, maps=maps[1:])
    with pytest.raises(
        ValueError, match=r"a\.h5: its coil maps have the shape \(3, 40, 36\), but its k-space \(3, 4, 40"
    ):
        data.KSpaceFolder(tmp_path, maps="file")
    write(tmp_path / "a.h5", kspace, maps=torch.full((C, H, W), torch.nan))
    with pytest.raises(ValueError, match=r"a\.h5: value \(0, 0, 0\) of the coil maps of slice 1 is .*nan"):
        data.KSpaceFolder(tmp_path, maps="file")[1]
    np.save(tmp_path / "b.npy", kspace)
    with pytest.raises(ValueError, match=r"b\.npy: an NPY file holds k-space alone"):
        data.KSpaceFolder(tmp_path / "b.npy", maps="file")
    bad = kspace.clone()
    bad[2, 1, 3, 4] = torch.nan
    np.save(tmp_path / "b.npy", bad)
    with pytest.raises(ValueError, match=r"^[^:]*b\.npy: sample \(3, 4\) of coil 1 in slice 2 is"):
        data.KSpaceFolder(tmp_path / "b.npy")[2]
    np.save(tmp_path / "b.npy", np.ones((2, 3, 4, 5)))
    with pytest.raises(ValueError, match=r"b\.npy: its k-space is float64, not complex"):
        data.KSpaceFolder(tmp_path / "b.npy")
    content = (tmp_path / "a.h5").read_bytes()
    (tmp_path / "a.h5").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"a\.h5: ."):
        data.KSpaceFolder(tmp_path / "a.h5")[2]
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["image"] = np.ones(3)
    with pytest.raises(ValueError, match=r"a\.h5: a file without k-space"):
        data.KSpaceFolder(tmp_path / "a.h5")


def test_arguments(tmp_path):
    with pytest.raises(ValueError, match="maps must be 'espirit' or 'file', got 'rss'"):
        data.KSpaceFolder(tmp_path, maps="rss")
    with pytest.raises(
        TypeError, match=r"calibration may hold calibration_size, kernel_size, threshold, crop, got 'size'"
    ):
        data.KSpaceFolder(tmp_path, calibration={"size": 3})


@pytest.mark.parametrize("name", ["a.h5", "a.npz", "a.npy", "a.mat"])
def test_slices_without_signal_are_left_out(tmp_path, scan, name):
    images, maps, kspace = scan
    kspace = kspace.clone()
    kspace[1] = 0
    kspace[2, :, H // 2] = 0  # where one looks first
    if name == "a.h5":
        write(tmp_path / name, kspace, maps=maps)
    elif name == "a.npy":
        np.save(tmp_path / name, kspace)
    elif name == "a.npz":
        np.savez(tmp_path / name, kspace=kspace, maps=maps)
    else:
        scipy.io.savemat(tmp_path / name, {"kspace": kspace.numpy(), "maps": maps.numpy()})
    dataset = data.KSpaceFolder(tmp_path, maps="espirit" if name == "a.npy" else "file")
    assert dataset.names == [f"{name}[0]", f"{name}[2]"]
    assert dataset.left_out == {"slice without signal": 1}
    if name != "a.npy":
        check(dataset[0], images, maps, 0)
    np.save(tmp_path / "zeros.npy", np.zeros((2, C, H, W), np.complex64))
    with pytest.raises(ValueError, match=r"zeros\.npy: its k-space is zero everywhere"):
        data.KSpaceFolder(tmp_path / "zeros.npy")


@pytest.mark.parametrize("encoded, kept", [(400.001, 20), (250, 32), (320, 25), (333.3, 24)])
def test_readouts_are_cut_to_whole_pixels(tmp_path, scan, encoded, kept):
    images, maps, kspace = scan
    xml = header(2).replace(f"<x>{400}</x>", f"<x>{encoded}</x>")
    write(tmp_path / "a.h5", kspace, ismrmrd_header=xml, maps=maps)
    dataset = data.KSpaceFolder(tmp_path, maps="file")
    assert dataset.shapes[0] == (kept, W)
    top = H // 2 - kept // 2
    middle = slice(top, top + kept)
    check(dataset[0], images[:, middle], maps[:, middle], 0)
