import shutil
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import tifffile
import torch
from PIL import Image
from pydicom.data import get_testdata_file
from torch.utils.data import DataLoader

from oder_fast import data
from oder_fast.data import Sample

# More workers than cores, where there is but one.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def ramp(*shape):
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def write_dicom(path, values, patient="", study="1.2.3", **elements):
    dataset = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
    dataset.PatientID, dataset.StudyInstanceUID = patient, study
    dataset.Rows, dataset.Columns = values.shape[-2:]
    if values.ndim == 3:
        dataset.NumberOfFrames = len(values)
    dataset.PixelData = values.astype(np.int16).tobytes()
    for name, value in elements.items():
        setattr(dataset, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path)


# ------------------------------------------------------------------ ImageFolder


@pytest.fixture
def mixed(tmp_path):
    """A folder with every kind of file, all images 6 by 5."""
    (tmp_path / "a" / "deep").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    tifffile.imwrite(tmp_path / "a" / "deep" / "stack.tif", ramp(3, 6, 5), photometric="minisblack")
    Image.fromarray(ramp(6, 5).astype(np.uint8)).save(tmp_path / "a" / "image.PNG")
    np.save(tmp_path / "b" / "slices.npy", ramp(2, 6, 5))
    np.savez(tmp_path / "b" / "one.npz", image=ramp(6, 5) * 1j)
    volume = nibabel.Nifti1Image(ramp(4, 6, 5).T, np.eye(4))
    nibabel.save(volume, tmp_path / "volume.nii.gz")
    nibabel.save(volume, tmp_path / "volume.nii")
    write_dicom(tmp_path / "c" / "IM0001", ramp(6, 5), "P1")
    write_dicom(tmp_path / "c" / "x.dcm", ramp(2, 6, 5), "")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "b" / "._slices.npy").write_text("a copy of nothing")
    (tmp_path / ".hidden").mkdir()
    np.save(tmp_path / ".hidden" / "x.npy", ramp(6, 5))
    return tmp_path


def test_every_kind_of_file(mixed):
    dataset = data.ImageFolder(mixed, scale="none")
    expected = (
        [("a/deep/stack.tif", "a", k, 3) for k in range(3)]
        + [("a/image.PNG", "a", None, 1), ("b/one.npz", "b", None, 1)]
        + [("b/slices.npy", "b", k, 2) for k in range(2)]
        + [("c/IM0001", "P1", None, 1)]
        + [("c/x.dcm", "1.2.3", k, 2) for k in range(2)]
        + [("volume.nii", "volume.nii", k, 4) for k in range(4)]
        + [("volume.nii.gz", "volume.nii.gz", k, 4) for k in range(4)]
    )
    assert dataset.groups == [group for _, group, _, _ in expected]
    assert dataset.names == [name if frame is None else f"{name}[{frame}]" for name, _, frame, _ in expected]
    assert dataset.shapes == [(6, 5)] * len(expected)
    assert data.common_shape(dataset) == (6, 5)
    assert dataset.left_out == {"another kind of file": 1}
    for sample, (name, _, frame, frames) in zip(dataset, expected, strict=True):
        values = ramp(frames, 6, 5)[frame or 0]
        if name.startswith("c/"):
            values = np.maximum(0.02 * (1 + (values - 1024) / 1000), 0)
        if name == "b/one.npz":
            values = values * 1j
        np.testing.assert_allclose(sample.image, values, rtol=1e-6, atol=1e-8)
        assert sample.image.dtype == (torch.complex64 if name == "b/one.npz" else torch.float32)
        assert sample.kspace is None
        assert sample.maps is None


def test_one_file_and_lists_of_files(mixed):
    assert data.ImageFolder(mixed / "volume.nii").names == [f"volume.nii[{k}]" for k in range(4)]
    listed = data.ImageFolder([str(mixed / "b" / "slices.npy"), mixed / "a" / "image.PNG"])
    assert listed.names == ["b/slices.npy[0]", "b/slices.npy[1]", "a/image.PNG"]
    assert listed.groups == ["b", "b", "a"]
    assert listed.left_out == {}
    # What is asked for by name is not left out in silence.
    with pytest.raises(ValueError, match=r"notes\.txt: not a DICOM"):
        data.ImageFolder([mixed / "notes.txt"])
    with pytest.raises(ValueError, match="source: no images"):
        data.ImageFolder([])


def test_scales(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[-2.0, 0, 2, 6]]))
    np.save(tmp_path / "b.npy", np.array([[3 + 4j, 1j]]))
    np.save(tmp_path / "c.npy", np.full((2, 2), 7.0))
    np.save(tmp_path / "d.npy", np.zeros((2, 2), complex))
    a, b, c, d = (sample.image for sample in data.ImageFolder(tmp_path))
    torch.testing.assert_close(a, torch.tensor([[0, 0.25, 0.5, 1]]))
    torch.testing.assert_close(b, torch.tensor([[0.6 + 0.8j, 0.2j]]))
    assert torch.equal(c, torch.zeros(2, 2))
    assert torch.equal(d, torch.zeros(2, 2, dtype=torch.complex64))
    window = data.ImageFolder(tmp_path, scale=(0, 4))
    torch.testing.assert_close(window[0].image, torch.tensor([[0, 0, 0.5, 1]]))
    with pytest.raises(ValueError, match=r"b\.npy: it is complex, and a window is for real values"):
        window[1]
    for scale in ("max", (1, 1), (0, np.nan), (1,), None):
        with pytest.raises(ValueError, match="ImageFolder: scale must be 'none', 'slice' or a window"):
            data.ImageFolder(tmp_path, scale=scale)


def test_volumes(tmp_path):
    values = ramp(4, 6, 5) * (1 + 1j)
    np.save(tmp_path / "a.npy", values)
    np.savez(tmp_path / "b.npz", contrast=values.real)
    data.write_nifti(tmp_path / "c.nii.gz", torch.from_numpy(values))
    dataset = data.ImageFolder(tmp_path, scale="none", volumes=True)
    assert dataset.names == ["a.npy", "b.npz", "c.nii.gz"]
    assert data.common_shape(dataset) == (4, 6, 5)
    for sample, expected in zip(dataset, (values, values.real, values), strict=True):
        assert sample.image.dtype == torch.complex64
        np.testing.assert_array_equal(sample.image, expected)
    assert data.ImageFolder(tmp_path, volumes=True)[0].image.abs().max() == pytest.approx(1)
    assert dataset.fingerprint(0) != data.ImageFolder(tmp_path, scale="none").fingerprint(0)
    # What is kept of a volume is not what is given out.
    dataset[2].image.zero_()
    np.testing.assert_array_equal(dataset[2].image, values)
    np.save(tmp_path / "d.npy", values[0])
    with pytest.raises(ValueError, match=r"d\.npy: it holds one image of shape \(6, 5\), not a volume"):
        data.ImageFolder(tmp_path, volumes=True)


def test_slices_of_a_volume_are_not_what_is_kept_of_it(tmp_path):
    np.savez(tmp_path / "a.npz", ramp(3, 6, 5))
    data.write_nifti(tmp_path / "b.nii.gz", torch.from_numpy(ramp(3, 6, 5)))
    for _ in range(2):
        for sample in data.ImageFolder(tmp_path, scale=(0, 10)):
            sample.image.zero_()
    found = torch.stack([sample.image for sample in data.ImageFolder(tmp_path, scale="none")])
    np.testing.assert_array_equal(found, np.concatenate([ramp(3, 6, 5)] * 2))


def test_pixels_that_need_another_package(tmp_path, monkeypatch):
    from pydicom.pixels.decoders import RLELosslessDecoder

    monkeypatch.setattr(type(RLELosslessDecoder), "is_available", property(lambda self: False))
    with pytest.raises(
        ValueError, match=r"RLE\.dcm: its pixels are compressed \(RLE Lossless\), which needs another"
    ):
        data.ImageFolder(get_testdata_file("MR_small_RLE.dcm"))
    monkeypatch.undo()
    compressed, plain = (
        data.ImageFolder(get_testdata_file(name))[0].image for name in ("MR_small_RLE.dcm", "MR_small.dcm")
    )
    assert torch.equal(compressed, plain)


def test_groups_by_rule(mixed):
    dataset = data.ImageFolder(mixed, group=lambda path: path.suffix)
    assert set(dataset.groups) == {".tif", ".PNG", ".npy", ".npz", "", ".dcm", ".nii", ".gz"}
    with pytest.raises(TypeError, match="group must return a str, got int"):
        data.ImageFolder(mixed, group=lambda path: 3)


def test_dicom_without_images_and_localizers_are_left_out(tmp_path):
    write_dicom(tmp_path / "slice.dcm", ramp(6, 5), "P1")
    write_dicom(tmp_path / "scout.dcm", ramp(60, 5), "P1", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    shutil.copy(get_testdata_file("rtplan.dcm"), tmp_path / "plan.dcm")
    dataset = data.ImageFolder(tmp_path)
    assert dataset.names == ["slice.dcm"]
    assert dataset.left_out == {
        "a CT localizer: a projection, not a slice": 1,
        "a DICOM file of the kind RT Plan Storage, not an image": 1,
    }
    with pytest.raises(ValueError, match="RT Plan Storage, not an image"):
        data.ImageFolder([tmp_path / "plan.dcm"])


def test_rescale_of_enhanced_dicom(tmp_path):
    """In files of many frames, slope and intercept are said for all frames or for each."""
    dataset = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
    del dataset.RescaleSlope, dataset.RescaleIntercept, dataset.PixelSpacing
    values = ramp(2, 128, 128).astype(np.int16)
    dataset.NumberOfFrames, dataset.PixelData = 2, values.tobytes()

    def group(intercept=None, spacing=None):
        item = pydicom.Dataset()
        if intercept is not None:
            transformation = pydicom.Dataset()
            transformation.RescaleSlope, transformation.RescaleIntercept = 1, intercept
            item.PixelValueTransformationSequence = [transformation]
        if spacing is not None:
            measures = pydicom.Dataset()
            measures.PixelSpacing = [spacing, spacing]
            item.PixelMeasuresSequence = [measures]
        return item

    dataset.SharedFunctionalGroupsSequence = [group(spacing=0.5)]
    dataset.PerFrameFunctionalGroupsSequence = [group(-1000), group(0)]
    dataset.save_as(tmp_path / "enhanced.dcm")
    for frame, intercept in ((0, -1000), (1, 0)):
        image, metadata = data.read_image(tmp_path / "enhanced.dcm", frame=frame)
        expected = np.maximum(0.02 * (1 + (values[frame] + float(intercept)) / 1000), 0)
        np.testing.assert_allclose(image, expected, rtol=1e-6)
        assert metadata["pixel_spacing"] == (0.5, 0.5)
    with pytest.raises(ValueError, match="it holds 2 frames, frame 2 is not among them"):
        data.read_image(tmp_path / "enhanced.dcm", frame=2)
    with pytest.raises(ValueError, match="it holds one image alone, no frame 0"):
        data.read_image(get_testdata_file("CT_small.dcm"), frame=0)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("image.png", b"\x89PNG\r\n\x1a\n half", "cannot identify image file"),
        ("image.tif", b"II*\0", "."),
        ("image.tif", b"text", "not a DICOM, TIFF, PNG, NPY or NPZ file"),
        ("image.npy", b"\x93NUMPY\1\0", "."),
        ("image.npz", b"PK\3\4 half", "not a zip file"),
        ("image.dcm", b"", "the file is empty"),
        ("image.dcm", b"\0" * 200, "it holds no image size"),
        ("image.nii", b"\0" * 400, "not a NIfTI file"),
        ("image.nii.gz", b"\x1f\x8b half", "."),
    ],
)
def test_damaged_headers_are_found_at_once(tmp_path, name, content, message):
    np.save(tmp_path / "good.npy", ramp(4, 4))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: .*{message}"):
        data.ImageFolder(tmp_path)


@pytest.mark.parametrize("kept", [140, 1000, 3000])
def test_dicom_cut_in_the_header(tmp_path, kept):
    content = Path(get_testdata_file("CT_small.dcm")).read_bytes()
    (tmp_path / "IM1").write_bytes(content[:kept])
    with pytest.raises(ValueError, match=r"IM1: ."):
        data.ImageFolder(tmp_path)


@pytest.mark.parametrize("kind", ["tif", "pages.tif", "npy", "npz", "png", "nii", "nii.gz", "dcm"])
def test_files_damaged_further_down_are_named_when_read(tmp_path, kind):
    path = tmp_path / f"volume.{kind}"
    values = np.random.default_rng(0).integers(0, 30000, (3, 64, 64)).astype(np.uint16)
    if kind == "tif":
        tifffile.imwrite(path, values, photometric="minisblack")
    elif kind == "pages.tif":
        with tifffile.TiffWriter(path) as writer:
            for page in values:
                writer.write(page, metadata=None, contiguous=False)
    elif kind == "npy":
        np.save(path, values)
    elif kind == "npz":
        np.savez_compressed(path, values)
    elif kind == "png":
        Image.fromarray(values[0]).save(path)
    elif kind == "dcm":
        write_dicom(path, values)
    else:
        nibabel.save(nibabel.Nifti1Image(values.T, np.eye(4)), path)
    last = len(data.ImageFolder(tmp_path)) - 1
    content = path.read_bytes()
    path.write_bytes(content[:-900])
    with pytest.raises(ValueError, match=f"volume.{kind}: ."):
        data.ImageFolder(tmp_path)[last]


@pytest.mark.parametrize(
    "values, message",
    [
        (np.zeros(5), r"it holds an array of shape \(5,\), not images"),
        (np.zeros((2, 0, 3)), r"it holds an array of shape \(2, 0, 3\)"),
        (np.zeros((2, 2, 3, 5)), r"it holds an array of shape \(2, 2, 3, 5\)"),
        (np.array([["a"]]), "its values are <U1, not numbers"),
    ],
)
def test_arrays_that_are_no_images(tmp_path, values, message):
    for name, save in (("a.npy", np.save), ("a.npz", np.savez)):
        save(tmp_path / name, values)
        with pytest.raises(ValueError, match=f"{name}: {message}"):
            data.ImageFolder([tmp_path / name])


def test_values_that_are_not_finite_are_named(tmp_path):
    values = ramp(2, 4, 5)
    values[1, 2, 3] = np.inf
    np.save(tmp_path / "a.npy", values)
    dataset = data.ImageFolder(tmp_path)
    assert dataset[0].image.isfinite().all()
    with pytest.raises(ValueError, match=r"a\.npy: pixel \(2, 3\) is inf"):
        dataset[1]


def test_named_arrays(tmp_path):
    np.savez(tmp_path / "two.npz", a=ramp(2, 3, 6), b=ramp(3, 5))
    np.save(tmp_path / "one.npy", ramp(3, 5))
    with pytest.raises(ValueError, match=r"two\.npz: it holds 2 arrays, name one of: a, b"):
        data.ImageFolder(tmp_path)
    assert data.ImageFolder(tmp_path, array="b").shapes == [(3, 5), (3, 5)]
    assert data.ImageFolder(tmp_path / "two.npz", array="a").shapes == [(3, 6), (3, 6)]
    with pytest.raises(ValueError, match=r"two\.npz: it holds no array 'c'"):
        data.ImageFolder(tmp_path, array="c")


def test_missing_and_empty(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        data.ImageFolder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"nothing\.png"):
        data.ImageFolder([tmp_path / "nothing.png"])
    with pytest.raises(ValueError, match=r"no images \(DICOM, .*\) in it, only: nothing"):
        data.ImageFolder(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match="only: 1 of another kind of file"):
        data.ImageFolder(tmp_path)
    np.save(tmp_path / "a.npy", ramp(3, 3))
    dataset = data.ImageFolder(tmp_path)
    for index in (1, -2):
        with pytest.raises(IndexError, match=f"the dataset has 1 samples, sample {index} is not among them"):
            dataset[index]
    assert torch.equal(dataset[-1].image, dataset[np.int64(0)].image)


def test_links_are_followed_but_not_in_circles(tmp_path):
    (tmp_path / "real").mkdir()
    np.save(tmp_path / "real" / "a.npy", ramp(3, 3))
    folder = tmp_path / "links"
    folder.mkdir()
    (folder / "there").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "back").symlink_to(folder)
    assert data.ImageFolder(folder).names == ["there/a.npy"]


def test_mixed_sizes_are_known_before_anything_is_read(tmp_path):
    np.save(tmp_path / "a.npy", ramp(3, 4, 5))
    np.save(tmp_path / "b.npy", ramp(6, 5))
    dataset = data.ImageFolder(tmp_path)
    message = r"images differ in size: a.npy\[0\] has \(4, 5\), b.npy has \(6, 5\); cut patches"
    with pytest.raises(ValueError, match=message):
        data.common_shape(dataset)
    with pytest.raises(ValueError, match="collate: " + message):
        data.collate([dataset[0], dataset[3]])


# ------------------------------------------------------------------ Phantoms


@pytest.mark.parametrize("kind", ["ellipses", "shepp-logan", "shepp-logan-random", "brain", "cells"])
def test_phantoms_depend_on_seed_and_index_alone(kind):
    size = (6, 40, 48) if kind == "cells" else 72
    dataset = data.Phantoms(kind, 6, size, seed=3)
    shape = (6, 40, 48) if kind == "cells" else (72, 72)
    assert data.common_shape(dataset) == shape
    assert dataset[1].image.shape == shape
    assert dataset[1].image.dtype == (torch.complex64 if kind in ("brain", "cells") else torch.float32)
    assert dataset.groups == [f"{kind}[{k}]" for k in range(6)]
    images = [dataset[k].image for k in range(6)]
    backward = [dataset[k].image for k in reversed(range(6))][::-1]
    loader = DataLoader(dataset, batch_size=2, num_workers=2, collate_fn=data.collate)
    from_workers = [image for batch in loader for image in batch.image]
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        threaded = [data.Phantoms(kind, 9, size, seed=3)[k].image for k in range(6)]
    finally:
        torch.set_num_threads(threads)
    for others in (backward, from_workers, threaded):
        assert all(torch.equal(one, other) for one, other in zip(images, others, strict=True))
    if kind != "shepp-logan":
        assert not torch.equal(images[0], images[1])
        assert not torch.equal(images[0], data.Phantoms(kind, 6, size, seed=4)[0].image)
        assert dataset.fingerprint(0) != dataset.fingerprint(1)
    assert dataset.fingerprint(0) != data.Phantoms(kind, 6, size, seed=4).fingerprint(0)


def test_phantom_samples_are_their_own():
    dataset = data.Phantoms("shepp-logan", 2, 16)
    first = dataset[0].image
    first.zero_()
    assert dataset[1].image.max() == 1


def test_phantom_options():
    smooth = data.Phantoms("ellipses", 2, 32, texture=0.0, ellipses=1)[0].image
    rough = data.Phantoms("ellipses", 2, 32, texture=0.2, ellipses=1)[0].image
    assert rough.std() > smooth.std()
    with pytest.raises(ValueError, match=r"kind must be one of ellipses, shepp-logan, .* got 'mice'"):
        data.Phantoms("mice", 1, 8)
    with pytest.raises(TypeError, match=r"Phantoms: ellipses: .*colour"):
        data.Phantoms("ellipses", 1, 8, colour=3)
    with pytest.raises(ValueError, match="ellipses must be at least 1"):
        data.Phantoms("ellipses", 1, 8, ellipses=0)
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        data.Phantoms("ellipses", 0, 8)
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        data.Phantoms("ellipses", 1, 8, seed=-1)
    with pytest.raises(ValueError, match=r"size must be three numbers \(Z, H, W\) for cells, got 8"):
        data.Phantoms("cells", 1, 8)
    with pytest.raises(ValueError, match="size must be a whole number for brain"):
        data.Phantoms("brain", 1, (8, 8, 8))


def test_random_shepp_logan():
    known = data.random_shepp_logan(1, 200, seeded(), spread=0.0)[0]
    assert (known - data.shepp_logan(200)).abs().mean() < 0.01
    images = data.random_shepp_logan(20, 96, seeded())
    assert images.shape == (20, 96, 96)
    assert images.min() == 0
    assert images.max() <= 1
    # A head within the image, in a bright skull, each another.
    assert images[:, [0, -1]].max() == 0
    assert images[:, :, [0, -1]].max() == 0
    assert (images.amax((1, 2)) > 0.95).all()
    assert (images[:, 48].amax(1) > 0.6).all()
    assert (images[:, 30:66, 30:66].mean((1, 2)) < 0.5).all()
    assert ((images[:, None] - images[None]).square().mean((2, 3)) + torch.eye(20) > 1e-4).all()
    assert torch.equal(images, data.random_shepp_logan(20, 96, seeded()))
    assert data.random_shepp_logan(0, 8).shape == (0, 8, 8)
    for spread in (-0.1, 1.1, np.nan):
        with pytest.raises(ValueError, match=r"spread must be in 0\.\.1"):
            data.random_shepp_logan(1, 8, spread=spread)


# ------------------------------------------------------------------ collate


def test_collate():
    samples = [
        Sample(name, torch.full((3, 4), k + 0j), torch.ones(2, 3, 4) + 0j, torch.ones(2, 3, 4) + 0j)
        for k, name in enumerate("ab")
    ]
    batch = data.collate(samples)
    assert batch.names == ["a", "b"]
    assert batch.image[:, 0, 0].tolist() == [0, 1]
    assert batch.kspace.shape == batch.maps.shape == (2, 2, 3, 4)
    with pytest.raises(ValueError, match="collate: of a and c only one has k-space"):
        data.collate([samples[0], Sample("c", samples[0].image)])
    with pytest.raises(
        ValueError,
        match="images differ in kind: that of a is complex64, of c torch.float32".replace(
            "complex64", "torch.complex64"
        ),
    ):
        data.collate([Sample("a", samples[0].image), Sample("c", torch.ones(3, 4))])
    coils = samples[1]._replace(kspace=torch.ones(5, 3, 4) + 0j)
    with pytest.raises(ValueError, match=r"k-space differ in size: a has \(2, 3, 4\), b has \(5, 3, 4\)"):
        data.collate([samples[0], coils])
    with pytest.raises(ValueError, match="samples must be at least one, got none"):
        data.collate([])


# ------------------------------------------------------------------ split


class Patients(data.Samples):
    """Samples of which only the patient is known."""

    def __init__(self, sizes, order=None):
        groups = [f"patient {k}" for k, size in enumerate(sizes) for _ in range(size)]
        self.groups = [groups[k] for k in (order or range(len(groups)))]
        self.names = [f"{group}/{k}" for k, group in enumerate(self.groups)]
        self.shapes = [(2, 2)] * len(groups)

    def __getitem__(self, index):
        return Sample(self.names[index], torch.full((2, 2), float(index)))

    def fingerprint(self, index):
        return self._hash(index)


@pytest.mark.parametrize("sizes", [[1] * 20, [7, 30, 12, 1, 5, 22, 9, 40, 3, 11], [1, 50, 1, 1], [5, 5, 5]])
@pytest.mark.parametrize("seed", range(5))
def test_no_patient_is_in_two_parts(sizes, seed):
    dataset = Patients(sizes)
    fractions = (0.7, 0.2, 0.1)
    parts = data.split(dataset, fractions, seed)
    patients = [set(part.groups) for part in parts]
    assert all(patients)
    assert sum(map(len, patients)) == len(sizes)
    assert set.union(*patients) == set(dataset.groups)
    assert sorted(index for part in parts for index in part.indices) == list(range(sum(sizes)))
    for part, fraction in zip(parts, fractions, strict=True):
        assert part.indices == sorted(part.indices)
        assert [sample.name for sample in part] == part.names == [dataset.names[k] for k in part.indices]
        if len(sizes) >= 10:
            assert abs(len(part) - fraction * len(dataset)) <= max(1, 0.03 * len(dataset))


def test_split_is_deterministic_whatever_the_order_of_files():
    sizes = [3, 4, 5, 3, 2, 6, 3, 3]
    order = torch.randperm(sum(sizes), generator=seeded()).tolist()
    one, other = (data.split(Patients(sizes, o), (0.5, 0.5), 7) for o in (None, order))
    assert [set(part.groups) for part in one] == [set(part.groups) for part in other]
    splits = {
        tuple(sorted(set(data.split(Patients([1] * 8), (0.5, 0.5), seed)[0].groups))) for seed in range(9)
    }
    assert len(splits) > 4


def test_split_arguments():
    dataset = Patients([5, 5])
    with pytest.raises(ValueError, match=r"3 parts need as many groups \(patients\), got 2 in 10 samples"):
        data.split(dataset, (0.8, 0.1, 0.1), 0)
    with pytest.raises(ValueError, match=r"fractions must sum to 1, got \(0.8, 0.1\), which sum to 0.9"):
        data.split(dataset, (0.8, 0.1), 0)
    for fractions in ((), (1.0, 0.0), (1.5, -0.5), (np.nan, 1)):
        with pytest.raises(ValueError, match="fractions must be numbers above 0"):
            data.split(dataset, fractions, 0)
    again = data.split(data.split(dataset, (0.5, 0.5), 0)[0], (1.0,), 0)[0]
    assert len(again) == 5
    assert again.fingerprint(2) == again.dataset.fingerprint(2)
    assert torch.equal(again[0].image, again.dataset[0].image)


# ------------------------------------------------------------------ transforms


def measured(height=8, width=8, coils=3):
    maps = data.birdcage_maps(coils, (height, width))
    image = torch.randn(height, width, dtype=torch.complex64, generator=seeded())
    kspace = torch.fft.fftshift(
        torch.fft.fft2(torch.fft.ifftshift(maps * image, dim=(1, 2)), norm="ortho"), dim=(1, 2)
    )
    return Sample("scan", image, kspace, maps)


TRANSFORMS = {
    "patches": data.Patches((4, 5)),
    "flip": data.RandomFlip(),
    "turn": data.RandomRotate90(),
    "rotation": data.RandomRotation(10),
    "intensity": data.RandomScaleIntensity(0.5, 2.0),
    "compose": data.Compose([data.Patches(4), data.RandomFlip(), data.RandomRotation(5)]),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize(
    "shape, dtype", [((9, 8), torch.float32), ((8, 8), torch.complex64), ((3, 9, 9), torch.complex64)]
)
def test_randomness_is_that_of_the_generator_alone(name, shape, dtype):
    transform = TRANSFORMS[name]
    image = torch.randn(shape, dtype=dtype, generator=seeded())
    before = image.clone()
    results = []
    for seed in (0, 0, *range(1, 12)):
        torch.manual_seed(len(results))
        state = torch.get_rng_state()
        results.append(transform(Sample("a", image), seeded(seed)))
        assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(image, before)
    assert torch.equal(results[0].image, results[1].image)
    assert any(
        other.image.shape != results[0].image.shape or not torch.equal(results[0].image, other.image)
        for other in results
    )
    assert all(result.name == "a" and result.image.dtype == dtype for result in results)


def test_patches_are_everywhere():
    image = torch.arange(30.0).reshape(5, 6)
    corners = {int(data.Patches((4, 3))(Sample("a", image), seeded(k)).image[0, 0]) for k in range(100)}
    assert corners == {0, 1, 2, 3, 6, 7, 8, 9}
    whole = data.Patches((5, 6))(Sample("a", image), seeded())
    assert torch.equal(whole.image, image)
    volume = torch.arange(60.0).reshape(2, 5, 6)
    cut = data.Patches(2)(Sample("a", volume), seeded()).image
    assert torch.equal(cut[1] - cut[0], torch.full((2, 2), 30.0))
    with pytest.raises(ValueError, match=r"size \(6, 6\) must fit into the images, got a of \(5, 6\)"):
        data.Patches(6)(Sample("a", image), seeded())
    with pytest.raises(ValueError, match="Patches: size must be at least 1, got 0"):
        data.Patches(0)


@pytest.mark.parametrize("transform", [data.Patches(4), data.RandomRotation(5)])
def test_transforms_that_kspace_cannot_follow(transform):
    with pytest.raises(ValueError, match="sample scan comes with k-space or coil maps, which do not follow"):
        transform(measured(), seeded())


@pytest.mark.parametrize(
    "transform", [data.RandomFlip(), data.RandomRotate90(), data.RandomScaleIntensity(0.5, 2)]
)
@pytest.mark.parametrize("shape", [(8, 8), (9, 9), (8, 7)])
def test_kspace_and_maps_follow(transform, shape):
    sample = measured(*shape)
    seen = set()
    for seed in range(12):
        image, kspace, maps = transform(sample, seeded(seed))[1:4]
        coil_images = torch.fft.fftshift(
            torch.fft.ifft2(torch.fft.ifftshift(kspace, dim=(1, 2)), norm="ortho"), dim=(1, 2)
        )
        torch.testing.assert_close(coil_images, maps * image, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close((maps.conj() * coil_images).sum(0), image, rtol=1e-5, atol=1e-5)
        assert image.shape == shape
        seen.add(image[0, 0].item())
    assert len(seen) >= (2 if shape[0] != shape[1] else 3)


def test_all_orientations():
    image = torch.arange(9.0).reshape(3, 3)
    change = data.Compose([data.RandomFlip([-1]), data.RandomRotate90()])
    assert (
        len({tuple(change(Sample("a", image), seeded(k)).image.flatten().tolist()) for k in range(100)}) == 8
    )
    flips = {
        tuple(data.RandomFlip([-2])(Sample("a", image), seeded(k)).image[:, 0].tolist()) for k in range(20)
    }
    assert flips == {(0, 3, 6), (6, 3, 0)}
    with pytest.raises(ValueError, match=r"axes must be of -2 and -1, got \(0,\)"):
        data.RandomFlip([0])


@pytest.mark.parametrize("shape", [(64, 64), (48, 72)])
def test_rotation_turns_without_shearing(shape):
    from scipy.ndimage import rotate

    y, x = torch.meshgrid(*(torch.arange(n) - (n - 1) / 2 for n in shape), indexing="ij")
    image = torch.exp(-((x - 8) ** 2 + (y + 5) ** 2) / 30)
    angle = 17.0
    generator = seeded()
    drawn = -angle + 2 * angle * torch.rand((), generator=seeded(), dtype=torch.float64).item()
    turned = data.RandomRotation(angle)(Sample("a", image), generator).image
    expected = [rotate(image.numpy(), sign * drawn, reshape=False, order=3) for sign in (1, -1)]
    assert min(np.abs(turned.numpy() - one).max() for one in expected) < 0.02
    stack = torch.stack([image * (1 + 1j), image * 1j])
    both = data.RandomRotation(angle)(Sample("a", stack), seeded()).image
    torch.testing.assert_close(both[0].real, turned, rtol=0, atol=0.02)
    assert turned.min() >= 0
    assert torch.equal(both[1].real, torch.zeros(shape))
    assert data.RandomRotation(0)(Sample("a", image), seeded()).image.sub(image).abs().max() < 1e-4
    for degrees in (-1, np.inf):
        with pytest.raises(ValueError, match="degrees must be finite and at least 0"):
            data.RandomRotation(degrees)


def test_intensity():
    factors = [
        data.RandomScaleIntensity(0.5, 2)(Sample("a", torch.ones(1, 1)), seeded(k)).image.item()
        for k in range(50)
    ]
    assert 0.5 <= min(factors) < 0.7
    assert 1.7 < max(factors) <= 2
    for low, high in ((0, 1), (2, 1), (1, np.inf), (np.nan, 1)):
        with pytest.raises(ValueError, match="0 < low <= high is needed"):
            data.RandomScaleIntensity(low, high)


def test_the_loader_gives_the_same_samples_whatever_the_workers(mixed):
    dataset = data.ImageFolder(
        [mixed / "volume.nii.gz", mixed / "b" / "slices.npy", mixed / "a" / "deep" / "stack.tif"]
    )
    runs = []
    for workers in (0, 1, 3):
        loader = DataLoader(dataset, batch_size=3, num_workers=workers, collate_fn=data.collate)
        batches = list(loader)
        runs.append(
            ([name for batch in batches for name in batch.names], torch.cat([b.image for b in batches]))
        )
    for names, images in runs[1:]:
        assert names == runs[0][0] == dataset.names
        assert torch.equal(images, runs[0][1])
