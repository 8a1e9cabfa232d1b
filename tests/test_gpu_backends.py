"""The GPU backends without a GPU: CUDA kernels run on the host, Triton kernels interpreted, both compiled."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from cases import CASES, TOLERANCE, angles_over, relative_error

import oder_fast
from oder_fast.ops import Detector, backends

TESTS = Path(__file__).resolve().parent
CSRC = TESTS.parent / "csrc"


def load(name):
    spec = importlib.util.spec_from_file_location(name, TESTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cuda_host, operators = load("cuda_host"), load("test_operators")
radon, red_update = load("test_radon"), load("test_red_update")

# What every backend must pass, here for the CUDA kernels on the host.
test_cuda_gradients = operators.test_gradients_equal_those_of_the_reference
test_cuda_adjoint = operators.test_adjoint_is_the_exact_transpose
test_cuda_strides = operators.test_any_view_of_memory_is_taken
test_cuda_empty_batch = operators.test_empty_batch_gives_an_empty_result
test_cuda_dense_matrix = radon.test_equals_a_dense_matrix
test_cuda_ellipses = radon.test_ellipses_have_their_analytic_radon_transform
test_cuda_pixel_size = radon.test_pixel_size_is_a_unit_of_length
test_cuda_minibatches = radon.test_minibatches_average_to_the_full_gradient
test_cuda_formula = red_update.test_equals_the_formula
test_cuda_projection = red_update.test_projection_clips_and_keeps_nan
test_cuda_large_images = red_update.test_large_images_go_past_the_caches


class HostBuild:
    """A GPU backend on CPU tensors, as the fixture `build` describes backends."""

    def __init__(self, backend):
        self.name = f"{backend}-host"
        self.backend, self.device, self.dtypes = backend, "cpu", backends.DTYPES[backend]


@pytest.fixture(scope="module")
def module():
    return cuda_host.build()


@pytest.fixture
def build(module):
    with backends.use_module("cuda", module):
        yield HostBuild("cuda")


interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="with a GPU the Triton kernels run there, compiled"
)
BOTH = pytest.mark.parametrize("backend", ["cuda", pytest.param("triton", marks=interpreted)])
SLOW_TRITON = pytest.mark.parametrize(
    "backend", ["cuda", pytest.param("triton", marks=[interpreted, pytest.mark.exhaustive])]
)


@pytest.fixture
def use(module):
    """Choose a GPU backend by name."""
    return lambda backend: backends.use_module("cuda", module) if backend == "cuda" else nullcontext()


def compare(case, shape, dtype, backend, generator):
    args, options = case.make_inputs(shape, dtype, "cpu", generator)
    got = operators.results(case.function(*args, **options, backend=backend))
    wide = {k: operators.widen(v) for k, v in options.items()}
    expected = operators.results(case.function(*map(operators.widen, args), **wide, backend="reference"))
    for one, other in zip(got, expected, strict=True):
        assert relative_error(one, other) < TOLERANCE[dtype]


# ------------------------------------------------------------------ CUDA

# A block each: many views (two chunks of the gather), many lines (strips of one group), wide images (tiles of
# a line), tiles of rows that are copied by fours, detectors that sit beside the image.
COPIED_BY_FOURS = {"image": (3, 41, 100), "angles": angles_over(7), "bins": 113, "offset": 0.25}
TILED = (
    {"image": (1, 6, 5), "angles": angles_over(150), "bins": 9},
    {"image": (2, 4, 700), "angles": angles_over(5, start=0.2), "bins": 90, "spacing": 8.3},
    {"image": (1, 700, 8), "angles": angles_over(3, start=1.2), "bins": 710},
    COPIED_BY_FOURS,
    {"image": (4, 3, 130), "angles": angles_over(300), "bins": 9, "spacing": 16.0},
    {"image": (1, 33, 32), "angles": angles_over(6), "bins": 10, "offset": 14.0},
)
# Of the transforms: a long radix last, one stage of it; dense stages last, in the middle, first; many coils of few
# columns; fewer lanes for long transforms; the same of points, whose second transform is that of a row.
FOURIER_TILED = (
    {"image": (1, 368, 3), "coils": 3},
    {"image": (2, 3, 23), "coils": 2, "axis": -1, "own": True},
    {"image": (1, 5, 323), "coils": 2, "axis": -1},
    {"image": (1, 58, 5), "coils": 5},
    {"image": (1, 899, 2), "coils": 2},
    {"image": (1, 31, 3), "coils": 17},
    {"image": (1, 60, 4), "coils": 33, "axis": -2},
    {"image": (1, 3, 40), "coils": 17, "axis": -1},
    {"image": (1, 143, 21), "coils": 12},
    {"image": (1, 1, 2048), "coils": 2, "axis": -1},
    {"image": (1, 5000, 1), "coils": 2},
    {"image": (1, 34, 37), "coils": 3, "points": True},
    {"image": (1, 3, 1600), "coils": 2, "points": True},
    {"image": (2, 2, 323), "coils": 2, "points": True, "own": True},
    {"image": (1, 3, 368), "coils": 2, "points": True},
    {"image": (1, 17, 34), "coils": 3, "points": True},
    {"image": (1, 20, 19), "coils": 2, "points": True},
)
# Two blocks across a row and two chunks of illuminations; one group of slices, two, and three parts of them; depths of
# their own and functions in memory, all of them and parts.
DIFFRACTION_TILED = (
    {"image": (1, 3, 4, 300), "lights": 70},
    {"image": (2, 8, 9, 12), "lights": 5},
    {"image": (1, 34, 5, 11), "lights": 3},
    {"image": (1, 5, 7, 10), "lights": 3, "uneven": True},
    {"image": (1, 20, 6, 11), "lights": 2, "uneven": True},
    {"image": (1, 18, 10, 7), "lights": 2, "stored": True},
)


SHAPES = pytest.mark.parametrize(
    ("case", "shape"),
    [pytest.param(c, s, id=f"{c.name}-{k}") for c in CASES for k, s in enumerate(c.shapes)],
)


@SHAPES
def test_cuda_values(case, shape, build, generator):
    for dtype in operators.dtypes_of(case, build):
        compare(case, shape, dtype, build.backend, generator)


def tiled(stem, shapes):
    """Cases of an operator at each of the shapes."""
    return [
        pytest.param(case, shape, id=f"{case.name}-{'x'.join(map(str, shape['image']))}")
        for case in CASES
        for shape in shapes
        if case.name.startswith(stem)
    ]


@pytest.mark.parametrize(
    ("case", "shape"),
    tiled("radon", TILED) + tiled("fourier", FOURIER_TILED) + tiled("diffraction", DIFFRACTION_TILED),
)
def test_cuda_tiles(case, shape, build, generator):
    compare(case, shape, case.dtype, build.backend, generator)
    if shape is COPIED_BY_FOURS:
        for dtype in (torch.bfloat16, torch.float16):
            compare(case, shape, dtype, build.backend, generator)


def test_cuda_refuses_what_exceeds_shared_memory(build):
    image, lines = torch.zeros(1, 12000, 1, dtype=torch.complex64), torch.tensor([[0]])
    with pytest.raises(ValueError, match="length 12000 does not fit into the shared memory"):
        oder_fast.ops.fourier_forward(image, image[:, None], lines, backend=build.backend)
    mask = torch.ones(1, 1, 12000, dtype=torch.bool)
    with pytest.raises(ValueError, match="length 12000 does not fit into the shared memory"):
        oder_fast.ops.fourier_gradient(image.mT, None, image.mT[None], mask, backend=build.backend)
    volume, depths = torch.zeros(1, 8193, 1, 1, dtype=torch.complex64), torch.zeros(8193).double()
    light, support = torch.zeros(1, 2).double(), torch.tensor([[[0, 1]]], dtype=torch.int32)
    with pytest.raises(ValueError, match="at most 8192 unevenly spaced slices, got 8193"):
        oder_fast.ops.diffraction_forward(
            volume, light, depths, support, oder_fast.ops.Optics(0.4, 2.0, 1.0, 1.0), backend=build.backend
        )


def test_cuda_white_noise_at_full_size(build, generator):
    """Positions in plain float32 would miss this by a factor of ten."""
    angles, size = angles_over(9, start=0.1), (512, 512)
    image = torch.randn(1, *size, generator=generator)
    sinogram = torch.randn(1, 9, 729, generator=generator)
    forward = oder_fast.ops.radon_forward(image, angles, Detector(729), backend="cuda")
    expected = oder_fast.ops.radon_forward(image.double(), angles, Detector(729), backend="reference")
    assert relative_error(forward, expected) < 1e-6
    adjoint = oder_fast.ops.radon_adjoint(sinogram, angles, Detector(729), size, backend="cuda")
    expected = oder_fast.ops.radon_adjoint(
        sinogram.double(), angles, Detector(729), size, backend="reference"
    )
    assert relative_error(adjoint, expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cuda_storage_rounds_as_torch_does(dtype, build, generator):
    x = torch.arange(65536).to(torch.uint16).view(dtype)
    x = x[x.isfinite()][None]
    other = x[:, torch.randperm(x.shape[1], generator=generator)]
    zero = torch.zeros_like(x)
    same = oder_fast.ops.red_update(x, zero, zero, 0.0, 0.0, backend="cuda").image
    assert torch.equal(same, x)
    moved = oder_fast.ops.red_update(x, other, zero, 1.0, 0.0, backend="cuda").image
    assert torch.equal(moved, (x.float() - other.float()).to(dtype))


@pytest.mark.parametrize("shift", [1, 2, 3])
def test_cuda_takes_misaligned_memory(shift, build, generator):
    """Slices that start inside a 16-byte run, alike for all operands and not."""
    for shifts in ([shift] * 4, [shift, 0, 2 * shift, 1]):
        x, g, d, p = (torch.randn(400, generator=generator)[s : s + 315].view(3, 105) for s in shifts)
        got = oder_fast.ops.red_update(x, g, d, 0.3, 0.7, previous=p, momentum=0.5, backend="cuda")
        x, g, d, p = (v.double() for v in (x, g, d, p))
        expected = oder_fast.ops.red_update(x, g, d, 0.3, 0.7, previous=p, momentum=0.5, backend="reference")
        for one, other in zip(got, expected, strict=True):
            assert relative_error(one, other) < 1e-6


ORDERS = ("forward", "reverse", "1", "2")
TINY = {
    # Two strips a group and two tiles a line; two chunks of views; two images a block.
    "radon": (
        TILED[0],
        {"image": (2, 40, 330), "angles": angles_over(260), "bins": 33, "spacing": 10.4},
    ),
    "red": ({"image": (2, 5, 29)},),
    # Three stages and two rounds of coils, of images that are transposed and not; a dense stage; points.
    "fourier": (
        {"image": (2, 3, 60), "coils": 11, "axis": -1},
        {"image": (2, 29, 5), "coils": 3, "own": True},
        {"image": (2, 15, 12), "coils": 2, "points": True, "own": True},
    ),
    # Two chunks of illuminations; two blocks across a row and two parts of the slices; depths of their own; pupils that
    # end where a warp does.
    "diffraction": (
        {"image": (2, 5, 6, 10), "lights": 70},
        {"image": (1, 17, 5, 140), "lights": 3},
        {"image": (1, 9, 7, 6), "lights": 2, "uneven": True},
        {"image": (1, 2, 14, 280), "lights": 40},
    ),
}


def outcomes(module, monkeypatch, order, stems=tuple(TINY)):
    """Results of the operators at shapes that need all barriers, or what stopped them."""
    monkeypatch.setenv("ODER_HOST_ORDER", order)
    generator = torch.Generator().manual_seed(0)
    found = []
    with backends.use_module("cuda", module):
        for case in CASES:
            stem = case.name.partition("_")[0]
            for shape in TINY[stem] if stem in stems else ():
                args, options = case.make_inputs(shape, case.dtype, "cpu", generator)
                try:
                    found += operators.results(case.function(*args, **options, backend="cuda"))
                except RuntimeError as error:
                    found.append(error)
    return found


def differ(some, others):
    return any(
        isinstance(a, Exception) or isinstance(b, Exception) or not torch.equal(a, b)
        for a, b in zip(some, others, strict=True)
    )


@pytest.mark.exhaustive
def test_cuda_bits_do_not_depend_on_the_order_of_threads(module, monkeypatch):
    first = outcomes(module, monkeypatch, ORDERS[0])
    for order in ORDERS[1:]:
        assert not differ(outcomes(module, monkeypatch, order), first)


# Statements to leave out, and conditions to spoil, one at a time.
OMITTED = ("__syncthreads();", "wait_for_copies();")
SPOILED = (
    ("i < height && lane < lines", "i < height && lane < lines - 1"),
    ("r < lines", "r < lines - 1"),
    ("lane >= lanes || e >= rays.end", "lane >= lanes || e >= rays.end - 1"),
    ("d >= scan.n_bins", "d >= scan.n_bins - 1"),
    ("thread < n_views", "thread < n_views - 1"),
    ("i >= scan.height || j >= scan.width", "i >= scan.height || j >= scan.width - 1"),
    ("k < head", "k < head - 1"),
    ("k < runs", "k < runs - 1"),
    ("k < length", "k < length - 1"),
    ("p < red.n_partials", "p < red.n_partials - 1"),
    ("u < count", "u < count - 1"),
    ("task < n_tasks", "task < n_tasks - 1"),
    ("row < share.n", "row < share.n - 1"),
    ("i <= half", "i < half"),
    ("l < lines.n", "l < lines.n - 1"),
    ("pad < lines.n", "pad < lines.n - 1"),
    ("used >= scan.n_used", "used >= scan.n_used - 1"),
    ("round < last_round", "round < last_round - 1"),
    ("first_column + j >= width", "first_column + j >= width - 1"),
    ("m < width", "m < width - 1"),
    ("row < lanes && first_row + row < n", "row < lanes && first_row + row < n - 1"),
    ("j < common.columns", "j < common.columns - 1"),
    ("j + 1 == common.columns", "j + 2 == common.columns"),
    ("mirrored(j, scan.width)", "mirrored(j, scan.width) - (j > 1)"),
    ("mirrored(j, gram.width)", "mirrored(j, gram.width) - (j > 1)"),
    ("first + thread < n_used", "first + thread < n_used - 1"),
    ("m < count", "m < count - 1"),
    ("z < n_depths", "z < n_depths - 1"),
    ("n > kGroup", "n > kGroup + 1"),
    ("z >= kGroup", "z > kGroup"),
    ("end[0] > first", "end[0] > first + 1"),
    ("end[1] > first", "end[1] > first + 1"),
    ("32 + m", "31 + m"),
    ("group >= slices", "group >= slices - 1"),
    ("z >= 0", "z > 0"),
    ("k < slices", "k < slices - 1"),
    ("k >= slices", "k >= slices - 1"),
    ("i >= height", "i >= height - 1"),
    ("j < gram.columns", "j < gram.columns - 1"),
    ("k < gram.rows", "k < gram.rows - 1"),
    ("apart < n", "apart < n - 1"),
    ("y < n && z < n", "y < n && z < n - 1"),
    ("y0 + y >= n", "y0 + y >= n - 1"),
)
PLANTED = """
inline void wait_in_vain() { __syncthreads(); }
inline bool planted(int site) {
  const char* at = std::getenv("ODER_PLANTED");
  return at && std::atoi(at) == site;
}
"""


@pytest.mark.exhaustive
def test_cuda_planted_bugs_are_caught(monkeypatch):
    """Every barrier and every wait is needed, and seen to be, and so is the end of every loop."""
    sites = []

    def plant(site, template):
        sites.append(site)
        return template.format(len(sites) - 1)

    def change(name, text):
        if name == "cuda_host.h":
            return text + PLANTED
        if name == "red_update_cuda.cu":
            old = "if (lane == 0) {"
            assert text.count(old) == 1
            text = text.replace(old, old + " if (planted(1000)) wait_in_vain();")
        if name.endswith(".cu"):
            for statement in OMITTED:
                first, *rest = text.split(statement)
                text = first
                for k, piece in enumerate(rest):
                    text += plant(f"{name}: {statement} {k}", "if (!planted({})) ") + statement + piece
            for old, new in SPOILED:
                if old in text:
                    assert text.count(old) == 1, old
                    text = text.replace(old, plant(f"{name}: {new}", f"(planted({{}}) ? ({new}) : ({old}))"))
        return text

    module = cuda_host.build(change)
    assert len(sites) == len(SPOILED) + 22
    right = {stem: outcomes(module, monkeypatch, ORDERS[0], [stem]) for stem in TINY}
    assert not any(isinstance(r, Exception) for found in right.values() for r in found)
    missed = []
    for k, site in enumerate(sites):
        monkeypatch.setenv("ODER_PLANTED", str(k))
        stem = site.partition("_")[0]
        if not any(differ(outcomes(module, monkeypatch, order, [stem]), right[stem]) for order in ORDERS):
            missed.append(site)
    assert not missed
    monkeypatch.setenv("ODER_PLANTED", "1000")
    with (
        backends.use_module("cuda", module),
        pytest.raises(RuntimeError, match="some of its threads do not reach"),
    ):
        oder_fast.ops.red_update(*torch.zeros(3, 1, 8), 0.1, 1.0, backend="cuda")


RESOURCES = TESTS / "kernel_resources.json"


def assert_no_more_resources(compiler, group, found):
    """Compare registers and bytes of shared memory with the committed table; ODER_FAST_RECORD=1 writes it anew."""
    table = json.loads(RESOURCES.read_text())
    if os.environ.get("ODER_FAST_RECORD") == "1":
        table.setdefault(compiler, {})[group] = found
        text = json.dumps(table, indent=1, sort_keys=True)
        # A kernel a line.
        RESOURCES.write_text(re.sub(r"\[\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2]", text) + "\n")
        return
    # Another release of a compiler allocates otherwise.
    recorded = table.get(compiler, {}).get(group)
    if recorded is None:
        return
    assert found.keys() == recorded.keys(), "record the kernels of today with ODER_FAST_RECORD=1"
    worse = {
        k: (recorded[k], n)
        for k, n in found.items()
        if any(a > b for a, b in zip(n, recorded[k], strict=True))
    }
    assert not worse, f"registers or shared memory, recorded and now: {worse}"


@pytest.mark.exhaustive
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH: nothing to compile with")
@pytest.mark.parametrize(
    "stem", sorted(path.name.removesuffix("_cuda.cu") for path in CSRC.glob("*_cuda.cu"))
)
def test_cuda_compiles_without_spills(stem, tmp_path):
    kernels = (CSRC / f"{stem}_cuda.cu").read_text().count("ODER_KERNEL")
    architectures = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in (80, 90, 100)]
    command = ["nvcc", "--threads=2", "-std=c++17", "-O3", "-Xptxas=-v", *architectures]
    report = subprocess.run(
        [*command, "-c", CSRC / f"{stem}_cuda.cu", "-o", tmp_path / "out.o"],
        check=True,
        capture_output=True,
        text=True,
    ).stderr
    report = subprocess.run(["c++filt"], input=report, check=True, capture_output=True, text=True).stdout
    entries = re.findall(
        r"Compiling entry function '([^']+)' for '(\w+)'\n.*?Used (\d+) registers(?:[^\n]*?(\d+) bytes smem)?",
        report,
        re.S,
    )
    found = {
        f"{arch} {kernel.replace('(anonymous namespace)::', '').removeprefix('void ').rpartition('(')[0]}": [
            int(used),
            int(shared or 0),
        ]
        for kernel, arch, used, shared in entries
    }
    assert len(found) >= 3 * kernels
    release = re.search(r"release .* V([\d.]+)", subprocess.check_output(["nvcc", "--version"], text=True))[1]
    assert_no_more_resources(f"nvcc {release}", stem, found)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
    assert len(registers) >= 3 * kernels
    assert set(spills) == {("0", "0")}
    assert "warning" not in report
    # Blocks of 512 threads in all share the 65536 registers of a multiprocessor; 384 where parts of the slices are
    # summed, or slices are not evenly spaced.
    if stem == "diffraction":
        assert sum(n > 128 for n in registers) <= 12
        assert max(registers) <= 168
    # Three blocks of 256 threads do; two of the kernels with long radices.
    elif stem != "red_update":
        assert sum(n > 80 for n in registers) == (6 if stem == "fourier" else 0)
        assert max(registers) <= 128


# ------------------------------------------------------------------ Triton


def slow(first, cases=CASES):
    """Cases at all shapes; `first` tells those of the first tier, from a case's name and a shape's number."""
    return pytest.mark.parametrize(
        ("case", "shape"),
        [
            pytest.param(c, s, id=f"{c.name}-{k}", marks=[] if first(c.name, k) else [pytest.mark.exhaustive])
            for c in cases
            for k, s in enumerate(c.shapes)
        ],
    )


# Interpreted kernels are slow. Those of diffraction are one kernel in all directions: depths of their own are taken in
# one of them.
UNEVEN = ("diffraction_gradient", 2)


@interpreted
@slow(lambda name, k: (name, k) == UNEVEN or k in ((0, 3) if name.startswith("diffraction") else (2, 3)))
def test_triton_values(case, shape, generator):
    compare(case, shape, case.dtype, "triton", generator)


STORED = [(name, torch.bfloat16) for name in ("radon_forward", "radon_adjoint", "red_update")]


@interpreted
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(c, d, id=f"{c.name}-{d}", marks=[] if (c.name, d) in STORED else pytest.mark.exhaustive)
        for c in CASES
        for d in (torch.bfloat16, torch.float16, torch.complex64)
        # Those of its own dtype are compared above.
        if c.takes(d) and d != c.dtype
    ],
)
def test_triton_storage(case, dtype, generator):
    compare(case, case.shapes[2], dtype, "triton", generator)


@interpreted
@slow(
    # Values within rounding of the reference have adjoints within rounding, too.
    lambda name, k: name == "fourier_forward" and k == 2,
    [c for c in CASES if c.adjoint is not None],
)
def test_triton_adjoint(case, shape, generator):
    operators.test_adjoint_is_the_exact_transpose(case, shape, HostTriton(), generator)


class HostTriton(HostBuild):
    def __init__(self):
        super().__init__("triton")
        self.dtypes = (torch.float32, torch.complex64)


@pytest.mark.exhaustive
def test_triton_compiles_ahead_of_time(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, TESTS / "triton_aot.py"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    assert {row["kernel"] for row in rows} == {
        "_diffraction_kernel",
        "_diffraction_gram_kernel",
        "_radon_views_kernel",
        "_radon_project_kernel",
        "_radon_gather_kernel",
        "_fourier_transform_kernel",
        "_fourier_combine_kernel",
        "_red_update_kernel",
        "_red_finish_kernel",
    }
    import triton

    found = {f"{k} {row['kernel']} {row['storage']} {row['constants']}": row for k, row in enumerate(rows)}
    found = {name: [row["registers"], row["shared"]] for name, row in found.items()}
    assert_no_more_resources(f"triton {triton.__version__}", "sm_90", found)
    # Sine and cosine reduce large angles in local memory.
    assert not [row for row in rows if row["local"] and row["kernel"] != "_radon_views_kernel"]


# ------------------------------------------------------------------ both


@BOTH
def test_views_out_of_range_count_as_zero(backend, use, generator):
    image = torch.randn(2, 9, 12, generator=generator)
    sinogram = torch.randn(2, 4, 15, generator=generator)
    angles, views = angles_over(4, start=0.3), torch.tensor([7, 2, -1])
    with use(backend):
        got = torch.ops.oder_fast.radon_gradient(image, sinogram, angles, views, 15, [1.0, 0.0, 1.0], backend)
    alone = (
        oder_fast.ops.radon_gradient(image.double(), sinogram.double(), angles, Detector(15), views[1:2]) / 3
    )
    assert relative_error(got, alone) < 2e-6


@BOTH
def test_angle_that_is_no_number_counts_as_zero(backend, use, generator):
    image = torch.randn(1, 6, 7, generator=generator)
    angles = torch.tensor([math.nan, 0.5, math.inf], dtype=torch.float64)
    with use(backend):
        got = torch.ops.oder_fast.radon_forward(image, angles, 9, [1.0, 0.0, 1.0], backend)
        back = torch.ops.oder_fast.radon_adjoint(got, angles, 6, 7, [1.0, 0.0, 1.0], backend)
    assert torch.equal(got[:, ::2], torch.zeros(1, 2, 9))
    expected = oder_fast.ops.radon_forward(image.double(), angles[1:2], Detector(9))
    assert relative_error(got[:, 1:2], expected) < 2e-6
    assert (
        relative_error(back, oder_fast.ops.radon_adjoint(expected, angles[1:2], Detector(9), (6, 7))) < 2e-6
    )


@SLOW_TRITON
@pytest.mark.parametrize(
    ("bins", "spacing", "offset", "start"),
    [
        (40, 0.02, 0.0, 0.0),
        (9, 1e-6, 0.5, 0.1),
        (5, 9.0, 0.0, 0.2),
        (3, 300.0, 1.0, 0.3),
        (4, 1e9, 5e8, 0.1),
        (5, 1.0, 1e12, 0.0),
        (23, 1.0, 0.0, 12345.678),
    ],
)
def test_detectors_beyond_the_usual(bins, spacing, offset, start, backend, use, generator):
    image = torch.randn(1, 14, 17, generator=generator)
    angles = angles_over(4, start=start)
    sinogram = torch.randn(1, 4, bins, generator=generator)
    scan, options = (angles, Detector(bins, spacing, offset)), {"backend": backend}
    with use(backend):
        forward = oder_fast.ops.radon_forward(image, *scan, **options)
        adjoint = oder_fast.ops.radon_adjoint(sinogram, *scan, (14, 17), **options)
        back = oder_fast.ops.radon_backproject(sinogram, *scan, (14, 17), **options)
    options["backend"] = "reference"
    wide = sinogram.double()
    for got, expected in (
        (forward, oder_fast.ops.radon_forward(image.double(), *scan, **options)),
        (adjoint, oder_fast.ops.radon_adjoint(wide, *scan, (14, 17), **options)),
        (back, oder_fast.ops.radon_backproject(wide, *scan, (14, 17), **options)),
    ):
        assert relative_error(got, expected) < 1e-5


@BOTH
@pytest.mark.parametrize("spacing", [0.57, 0.7, 0.75])
def test_pixels_at_whole_bins_read_no_bin_beside_the_detector(spacing, backend, use):
    angles = torch.tensor([math.pi, math.pi / 2, -math.pi / 2], dtype=torch.float64)
    for size in ((1, 63), (63, 1)):
        with use(backend):
            got = oder_fast.ops.radon_adjoint(
                torch.ones(1, 3, 65),
                angles,
                Detector(65, spacing),
                size,
                backend=backend,
            )
        expected = oder_fast.ops.radon_adjoint(
            torch.ones(1, 3, 65).double(),
            angles,
            Detector(65, spacing),
            size,
            backend="reference",
        )
        assert relative_error(got, expected) < 1e-6


@BOTH
@pytest.mark.parametrize("axis", [-2, pytest.param(-1, marks=pytest.mark.exhaustive)])
def test_coils_and_lines_out_of_range_count_as_nothing(axis, backend, use, generator):
    def draw(*size):
        return torch.randn(*size, dtype=torch.complex64, generator=generator)

    image, maps, samples = draw(2, 9, 9), draw(1, 4, 9, 9), draw(2, 4, 5, 9)
    lines, coils = torch.tensor([[3, -7, 0, 9, 10**12]]), torch.tensor([7, 2, -1])
    mask = torch.rand(2, 9, 9, generator=generator) < 0.5
    points, op = draw(2, 4, 9, 9), torch.ops.oder_fast
    # Nor does a map count whose coil is not used.
    some = maps.clone()
    some[:, 0] = float("nan")
    for sampling, data in ((lines, samples), (mask, points)):
        with use(backend):
            got = op.fourier_gradient(image, data, some, sampling, coils, axis, backend)
            forward = op.fourier_forward(image, maps, sampling, axis, backend)
            back = op.fourier_adjoint(data, maps, sampling, axis, backend)
        if sampling is lines:
            sampling, data = lines[:, ::2][:, :2], data[:, :, ::2][:, :, :2]
            assert torch.equal(forward[:, :, [1, 3, 4]], torch.zeros(2, 4, 3, 9, dtype=torch.complex64))
            forward = forward[:, :, ::2][:, :, :2]
        options = {"axis": axis, "backend": "reference"}
        alone = oder_fast.ops.fourier_gradient(image, data, maps, sampling, coils[1:2], **options) / 3
        assert relative_error(got, alone) < 2e-6
        assert relative_error(forward, oder_fast.ops.fourier_forward(image, maps, sampling, **options)) < 2e-6
        assert relative_error(back, oder_fast.ops.fourier_adjoint(data, maps, sampling, **options)) < 2e-6


@BOTH
def test_illuminations_out_of_range_count_as_zero(backend, use, generator):
    case = next(c for c in CASES if c.name == "diffraction_gradient")
    args, _ = case.make_inputs({"image": (2, 2, 6, 8), "lights": 3}, torch.complex64, "cpu", generator)
    image, spectra, transfer, depths, support, _, optics = args
    blocks = torch.tensor([7, 2, -1, 10**12])
    with use(backend):
        got = torch.ops.oder_fast.diffraction_gradient(
            image, spectra, transfer, depths, support, blocks, optics, backend
        )
    wide = (image.to(torch.complex128), spectra.to(torch.complex128), transfer, depths, support)
    alone = oder_fast.ops.diffraction_gradient(*wide, blocks[1:2], optics, backend="reference") / 4
    assert relative_error(got, alone) < 2e-6


@SLOW_TRITON
def test_gram_matrices_of_any_numbers(backend, use, generator):
    """Whole planes of them, half the sampling rate included, which no pupil would hold."""

    def draw(*size):
        return torch.randn(*size, dtype=torch.complex64, generator=generator)

    for n, height, width, rows, columns in (
        (3, 6, 8, 5, 4),
        (9, 5, 7, 5, 4),
        (1, 4, 6, 1, 1),
        (2, 1, 5, 1, 3),
        (2, 6, 1, 3, 1),
    ):
        args = (
            draw(2, n, height, width),
            draw(n, height, width),
            draw(n, n, rows, columns),
            draw(2, n, height, width),
        )
        with use(backend):
            got = oder_fast.ops.diffraction_gram(*args, backend=backend)
        expected = oder_fast.ops.diffraction_gram(*map(operators.widen, args), backend="reference")
        assert relative_error(got, expected) < 2e-6


@BOTH
@pytest.mark.parametrize("case", [c for c in CASES if c.name.startswith("fourier")], ids=lambda c: c.name)
def test_coil_maps_in_half_precision(case, backend, use, generator):
    """Exact for the maps that were rounded, which are off by 2^-11 at most."""
    for shape in case.shapes[:3]:
        args, options = case.make_inputs(shape, torch.complex64, "cpu", generator)
        at = 1 if case.name in ("fourier_forward", "fourier_adjoint") else 2
        whole = args[at]
        half = torch.view_as_complex(torch.view_as_real(whole).half())
        rounded = torch.view_as_complex(torch.view_as_real(half).float())
        given, exact = ([*args[:at], maps, *args[at + 1 :]] for maps in (half, rounded))
        with use(backend):
            got = operators.results(case.function(*given, **options, backend=backend))
        for inputs, tolerance in ((exact, 2e-6), (args, 2e-3)):
            wide = {k: operators.widen(v) for k, v in options.items()}
            expected = operators.results(
                case.function(*map(operators.widen, inputs), **wide, backend="reference")
            )
            for one, other in zip(got, expected, strict=True):
                assert relative_error(one, other) < tolerance


@BOTH
def test_half_precision_maps_of_some_coils_have_a_gradient(backend, use, generator):
    case = next(c for c in CASES if c.name == "fourier_gradient")
    (image, samples, maps, *rest), options = case.make_inputs(
        case.shapes[1], torch.complex64, "cpu", generator
    )
    half = torch.view_as_complex(torch.view_as_real(maps).half())
    rounded = torch.view_as_complex(torch.view_as_real(half).float())

    def gradients(maps, backend):
        inputs = [v.clone().requires_grad_() for v in (image, samples)]
        loss = case.function(*inputs, maps, *rest, **options, backend=backend).abs().square().sum()
        return torch.autograd.grad(loss, inputs)

    with use(backend):
        got = gradients(half, backend)
    for one, other in zip(got, gradients(rounded, "reference"), strict=True):
        assert relative_error(one, other) < 2e-5
