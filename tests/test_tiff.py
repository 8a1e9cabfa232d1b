"""TIFF files hold what their pages hold, whatever a header says of them."""

import struct
import uuid

import numpy as np
import pytest
import tifffile

from oder_fast import data

VALUES = np.random.default_rng(0).integers(1, 60000, (6, 20, 24)).astype(np.uint16)
GREY = (VALUES[0] // 256).astype(np.uint8)


def write_pages(path, pages, **options):
    with tifffile.TiffWriter(path, **options) as writer:
        for page in pages:
            writer.write(page, photometric="minisblack", contiguous=False)


def images(path):
    return [sample.image.numpy() for sample in data.ImageFolder([path], scale="none")]


def check(path, expected, shape=None):
    found = images(path)
    assert len(found) == len(expected)
    for one, values in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, values)
    if shape is not None:
        array = data.read_array(path)
        assert tuple(array.shape) == shape
        np.testing.assert_array_equal(array.reshape(-1, *expected[0].shape), np.stack(expected))


@pytest.mark.parametrize("options", [{}, {"bigtiff": True}, {"byteorder": ">"}])
def test_pages_written_one_by_one(tmp_path, options):
    write_pages(tmp_path / "loop.tif", VALUES, **options)
    check(tmp_path / "loop.tif", VALUES, (6, 20, 24))
    np.testing.assert_array_equal(data.read_image(tmp_path / "loop.tif", frame=4).image, VALUES[4])
    with pytest.raises(ValueError, match=r"loop\.tif: it holds 6 frames, frame 6 is not among them"):
        data.read_image(tmp_path / "loop.tif", frame=6)
    with pytest.raises(
        ValueError, match=r"loop\.tif: it holds an array of shape \(6, 20, 24\), not a two-dim"
    ):
        data.read_image(tmp_path / "loop.tif")


def test_appended_pages_and_stacks(tmp_path):
    for part in (VALUES[:2], VALUES[2:4], VALUES[4:]):
        tifffile.imwrite(tmp_path / "a.tif", part, append=True, photometric="minisblack")
    check(tmp_path / "a.tif", VALUES, (6, 20, 24))


def test_several_series_of_an_ome_file(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.ome.tif") as writer:
        for k in range(3):
            writer.write(VALUES[2 * k : 2 * k + 2], metadata={"axes": "ZYX"}, photometric="minisblack")
    check(tmp_path / "a.ome.tif", VALUES, (6, 20, 24))


def test_a_preview_before_the_stack(tmp_path):
    write_pages(tmp_path / "a.tif", [VALUES[0, ::2, ::2].copy(), *VALUES])
    dataset = data.ImageFolder(tmp_path)
    assert dataset.shapes == [(10, 12)] + [(20, 24)] * 6
    with pytest.warns(UserWarning, match=r"a\.tif: left out, as smaller than the others: 1 of \(10, 12\)"):
        array = data.read_array(tmp_path / "a.tif")
    np.testing.assert_array_equal(array, VALUES)
    with pytest.raises(
        ValueError, match=r"a stack of \(7,\) images of \(10, 12\), \(20, 24\), not one volume"
    ):
        data.ImageFolder(tmp_path, volumes=True)


def test_pages_that_make_no_array(tmp_path):
    write_pages(tmp_path / "a.tif", [VALUES[0], VALUES[1].astype(np.float32)])
    assert len(images(tmp_path / "a.tif")) == 2
    with pytest.raises(
        ValueError, match=r"a\.tif: its images make no array: 1 of \(20, 24\) with 1 times 16 bits, 1 of"
    ):
        data.read_array(tmp_path / "a.tif")


@pytest.mark.parametrize("below", [True, False])
def test_pyramids_are_one_image(tmp_path, below):
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as writer:
        writer.write(VALUES[0], subifds=1 if below else 0)
        writer.write(VALUES[0, ::2, ::2].copy(), subfiletype=1)
    reason = "a reduced copy or a mask of another TIFF page"
    image, metadata = data.read_image(path)
    np.testing.assert_array_equal(image, VALUES[0])
    assert metadata["left_out"] == data.ImageFolder(path).left_out == {reason: 1}
    with pytest.warns(UserWarning, match=f"left out: 1 times {reason}"):
        assert data.read_array(path).shape == (20, 24)


def test_a_page_below_another_that_is_no_copy(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        writer.write(VALUES[0], subifds=1)
        writer.write(VALUES[1])
    with pytest.raises(
        ValueError, match=r"a\.tif: page 0 of \(20, 24\) has below it one of \(20, 24\), no smaller"
    ):
        data.read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("name", ["a.tif", "a.ome.tif"])
def test_hyperstacks(tmp_path, name):
    values = np.arange(2 * 3 * 4 * 20 * 24, dtype=np.uint16).reshape(2, 3, 4, 20, 24)
    tifffile.imwrite(
        tmp_path / name, values, imagej=name == "a.tif", metadata={"axes": "TZCYX"}, photometric="minisblack"
    )
    check(tmp_path / name, values.reshape(-1, 20, 24), (2, 3, 4, 20, 24))
    with pytest.raises(
        ValueError, match=r"it holds a stack of \(2, 3, 4\) images of \(20, 24\), not one volume"
    ):
        data.ImageFolder(tmp_path, volumes=True)


def test_imagej_stacks_with_one_page(tmp_path):
    """Above 4 GB, ImageJ writes the directory of the first image alone."""
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, VALUES, imagej=True, metadata={"axes": "ZYX"})
    content = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as file:
        order, offset = file.byteorder, file.pages[0].offset
    (n,) = struct.unpack_from(order + "H", content, offset)
    struct.pack_into(order + "I", content, offset + 2 + 12 * n, 0)
    path.write_bytes(content)
    check(path, VALUES, (6, 20, 24))
    np.testing.assert_array_equal(data.ImageFolder(path, scale="none", volumes=True)[0].image.real, VALUES)
    path.write_bytes(content[: len(content) // 2])
    for read in (images, data.read_array):
        with pytest.raises(ValueError, match=r"a\.tif: 5 of the 6 images that its header names are missing"):
            read(path)


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_files_cut_off_between_pages(tmp_path, compression):
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as writer:
        for page in VALUES:
            writer.write(page, contiguous=False, compression=compression)
    with tifffile.TiffFile(path) as file:
        offsets = [page.offset for page in file.pages]
    content = path.read_bytes()
    for kept in (offsets[1], offsets[3], offsets[5], offsets[5] + 7, len(content) - 10):
        path.write_bytes(content[:kept])
        for read in (images, data.read_array):
            with pytest.raises(ValueError, match=r"a\.tif: ."):
                read(path)


def test_a_chain_that_leads_back(tmp_path):
    write_pages(tmp_path / "a.tif", VALUES)
    content = bytearray((tmp_path / "a.tif").read_bytes())
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        first, last = file.pages[0].offset, file.pages[5].offset
    (n,) = struct.unpack_from("<H", content, last)
    struct.pack_into("<I", content, last + 2 + 12 * n, first)
    (tmp_path / "a.tif").write_bytes(content)
    with pytest.raises(ValueError, match="its page 6 is followed by one that came before"):
        data.ImageFolder(tmp_path)


def test_pixels_that_were_never_written(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, VALUES[0], compression="zlib", rowsperstrip=5)
    with tifffile.TiffFile(path, mode="r+b") as file:
        counts = file.pages[0].tags["StripByteCounts"]
        counts.overwrite((*counts.value[:2], 0, counts.value[3]))
    for read in (data.read_image, data.read_array):
        with pytest.raises(ValueError, match=r"a\.tif: some of its pixels were never written"):
            read(path)


# ------------------------------------------------------------------ OME


def ome(planes, attributes=""):
    return (
        '<?xml version="1.0" encoding="UTF-8"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"'
        f'{attributes}><Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYZCT" Type="uint16" SizeX="24" '
        f'SizeY="20" SizeZ="4" SizeC="1" SizeT="1"><Channel ID="Channel:0:0" SamplesPerPixel="1"/>{planes}</Pixels>'
        "</Image></OME>"
    )


def write_ome(path, values, planes, attributes=""):
    tifffile.imwrite(
        path, values, description=ome(planes, attributes), metadata=None, photometric="minisblack"
    )


@pytest.mark.parametrize(
    "planes",
    [
        '<TiffData IFD="0" PlaneCount="4"/>',
        "<TiffData/>",
        "".join(f'<TiffData FirstZ="{z}" IFD="{z}" PlaneCount="1"/>' for z in range(4)),
    ],
)
def test_planes_that_are_missing(tmp_path, planes):
    path = tmp_path / "a.ome.tif"
    write_ome(path, VALUES[:4], planes)
    check(path, VALUES[:4], (4, 20, 24))
    write_ome(path, VALUES[:2], planes)
    for read in (images, data.read_array, data.read_image):
        with pytest.raises(
            ValueError, match=r"a\.ome\.tif: 2 of the 4 planes that its .*header names are missing"
        ):
            read(path)


def test_planes_in_the_order_of_the_header(tmp_path):
    planes = "".join(f'<TiffData FirstZ="{3 - z}" IFD="{z}" PlaneCount="1"/>' for z in range(4))
    write_ome(tmp_path / "a.ome.tif", VALUES[:4], planes)
    check(tmp_path / "a.ome.tif", VALUES[3::-1], (4, 20, 24))


@pytest.fixture
def pair(tmp_path):
    """A set of two files that name each other, with two planes each."""
    ids = [str(uuid.UUID(int=k)) for k in range(2)]
    planes = "".join(
        f'<TiffData FirstZ="{z}" IFD="{z % 2}" PlaneCount="1"><UUID FileName="{z // 2}.ome.tif">urn:uuid:{ids[z // 2]}'
        "</UUID></TiffData>"
        for z in range(4)
    )
    for k in range(2):
        write_ome(tmp_path / f"{k}.ome.tif", VALUES[2 * k : 2 * k + 2], planes, f' UUID="urn:uuid:{ids[k]}"')
    return tmp_path


def test_a_set_of_files_counts_once(pair):
    dataset = data.ImageFolder(pair, scale="none")
    assert dataset.names == ["0.ome.tif[0]", "0.ome.tif[1]", "1.ome.tif[0]", "1.ome.tif[1]"]
    for sample, values in zip(dataset, VALUES, strict=False):
        np.testing.assert_array_equal(sample.image, values)
    np.testing.assert_array_equal(data.read_array(pair / "1.ome.tif"), VALUES[:4])


@pytest.mark.filterwarnings("ignore")
def test_a_set_of_files_that_is_not_complete(pair):
    (pair / "1.ome.tif").unlink()
    np.testing.assert_array_equal(images(pair / "0.ome.tif"), VALUES[:2])
    with pytest.raises(ValueError, match=r"0\.ome\.tif: 2 of the 4 planes of its OME-TIFF set are missing"):
        data.read_array(pair / "0.ome.tif")


# ------------------------------------------------------------------ colours and codecs


def test_palettes(tmp_path):
    ramp = np.arange(255, -1, -1, dtype=np.uint16) * 257
    tifffile.imwrite(tmp_path / "grey.tif", GREY, photometric="palette", colormap=np.stack([ramp] * 3))
    check(tmp_path / "grey.tif", [255 - GREY], (20, 24))
    tifffile.imwrite(
        tmp_path / "colour.tif", GREY, photometric="palette", colormap=np.stack([ramp, ramp[::-1], ramp])
    )
    for read in (images, data.read_image, data.read_array):
        with pytest.raises(ValueError, match=r"colour\.tif: it is a colour image"):
            read(tmp_path / "colour.tif")


@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_grey_as_rgb(tmp_path, planar):
    axis = 2 if planar == "contig" else 0
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.stack([GREY] * 3, axis), photometric="rgb", planarconfig=planar)
    check(path, [GREY])
    tifffile.imwrite(path, np.stack([GREY, GREY, 255 - GREY], axis), photometric="rgb", planarconfig=planar)
    with pytest.raises(ValueError, match=r"a\.tif: it is a colour image"):
        data.ImageFolder(path)


def test_samples_that_are_no_colours(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", VALUES, photometric="minisblack", planarconfig="separate")
    check(tmp_path / "a.tif", VALUES, (6, 20, 24))
    tifffile.imwrite(
        tmp_path / "b.tif", np.moveaxis(VALUES, 0, 2), photometric="minisblack", planarconfig="contig"
    )
    assert data.read_array(tmp_path / "b.tif").shape == (20, 24, 6)
    with pytest.raises(ValueError, match=r"b\.tif: it holds 6 values a pixel, neither grey nor colours"):
        data.ImageFolder(tmp_path / "b.tif")
    tifffile.imwrite(tmp_path / "c.tif", np.stack([GREY] * 4, 2), photometric="separated")
    with pytest.raises(
        ValueError, match=r"c\.tif: its photometric interpretation is 5, neither grey nor RGB"
    ):
        data.ImageFolder(tmp_path / "c.tif")


def test_low_values_that_are_shown_bright(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", GREY, photometric="miniswhite")
    image, metadata = data.read_image(tmp_path / "a.tif")
    np.testing.assert_array_equal(image, GREY)
    assert metadata["inverted"] is True


def test_a_codec_that_is_missing_is_found_at_once(tmp_path, monkeypatch):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, VALUES[0], compression="zlib")

    def missing(compressed):
        raise KeyError(f"{compressed} requires the 'imagecodecs' package")

    monkeypatch.setattr(type(tifffile.TIFF.DECOMPRESSORS), "__getitem__", lambda self, key: missing(key))
    with pytest.raises(ValueError, match=r"a\.tif: .* requires the 'imagecodecs' package"):
        data.ImageFolder(path)
