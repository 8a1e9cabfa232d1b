"""Parallel MRI: our backends against plain torch.fft, centred transforms, sigpy and deepinv.

Floors at 16 coils of 320 x 320, R = 4 (complex64): coil maps 13.1 MB and samples 3.3 MB read once, the image twice;
two transforms of 80 radix operations a point: 0.16 GFLOP. On a CPU core with AVX2 (32 flops a cycle at best, about 10
where additions and loads count) arithmetic binds; on an H200 the 18 MB take 4.2 us at 4.3 TB/s, the arithmetic 2.4 us.
With sampling by points all transforms are two-dimensional: twice the arithmetic, and planes between the passes.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from cases import TOLERANCE, in_turn, relative_error

import oder_fast
from gpu import Work, add_row, machine, needs_gpu, rotated, time_in_turn
from oder_fast import ops

CASES = ((1, 16, 320, 320), (8, 16, 640, 368))
# The C library's allocator told to keep what is freed: torch's large temporaries then cost no page faults.
# A process of its own finds modules where this one does: those of the tests, too.
PATH = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
KEEP = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "17179869184"}


class Scan:
    """A case with a quarter of the lines of the last axis sampled, or of all points, in every peer's form."""

    def __init__(
        self, batch: int, coils: int, height: int, width: int, points: bool = False, backend: str = "auto"
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*size: int) -> torch.Tensor:
            return torch.randn(*size, dtype=torch.complex64, generator=generator)

        self.image = draw(batch, height, width)
        maps = draw(coils, height, width)
        self.maps = (maps / maps.abs().square().sum(0).sqrt())[None]
        if points:
            mask = torch.rand(height, width, generator=generator) < 0.25
        else:
            mask = torch.zeros(1, width, dtype=torch.bool)
            mask[0, torch.randperm(width, generator=generator)[: width // 4]] = True
        # The same sampled frequencies, with their origin at n // 2 and at 0.
        self.mask = mask
        self.rolled = torch.fft.ifftshift(mask, dim=(-2, -1) if points else -1)
        self.operator = oder_fast.CartesianMRI(self.maps[0], mask, backend=backend)
        self.kspace = (
            self.operator(draw(batch, height, width)) + 0.1 * draw(batch, coils, height, width) * mask
        )
        self.data_fidelity = self.operator.least_squares(self.kspace)
        corner = oder_fast.CartesianMRI(self.maps[0], self.rolled, centered=False, backend=backend)
        # k-space for transforms without shifts that have the same gradient.
        self.corner = corner._restore(self.data_fidelity.samples)

    def ours(self, blocks: torch.Tensor | None = None) -> torch.Tensor:
        return self.data_fidelity.gradient(self.image, blocks)

    def plain(self) -> torch.Tensor:
        """torch.fft with the zero frequency at index 0."""
        spectrum = torch.fft.fft2(self.maps * self.image[:, None], norm="ortho")
        back = torch.fft.ifft2(self.rolled * spectrum - self.corner, norm="ortho")
        return (self.maps.conj() * back).sum(1)

    def centred(self) -> torch.Tensor:
        """With shifts on both sides, as fastMRI's fft2c and deepinv do it."""
        axes = (-2, -1)
        weighted = torch.fft.ifftshift(self.maps * self.image[:, None], dim=axes)
        spectrum = torch.fft.fftshift(torch.fft.fft2(weighted, norm="ortho"), dim=axes)
        residual = torch.fft.ifftshift(self.mask * spectrum - self.kspace, dim=axes)
        back = torch.fft.fftshift(torch.fft.ifft2(residual, norm="ortho"), dim=axes)
        return (self.maps.conj() * back).sum(1)

    def check(self) -> float:
        expected = Scan.centred(self)
        error = relative_error(self.ours(), expected)
        assert error < 1e-5
        assert relative_error(self.plain(), expected) < 1e-5
        return error


def sigpy_gradient(scan: Scan):
    try:
        import sigpy.mri
    except ImportError:  # pip install 'oder-fast[bench]' brings it
        return None
    sense = sigpy.mri.linop.Sense(
        scan.maps[0].numpy(), weights=scan.mask.expand(scan.image.shape[1:]).numpy()
    )
    image, kspace = scan.image[0].numpy(), scan.kspace[0].numpy()
    return lambda: sense.H * (sense * image - kspace)


def deepinv_gradient(scan: Scan, deepinv):
    if deepinv is None:
        return None
    size = tuple(scan.image.shape[1:])
    mask = scan.mask.expand(size).float()[None, None]
    physics = deepinv.physics.MultiCoilMRI(mask=mask, coil_maps=scan.maps, img_size=size)
    image = torch.view_as_real(scan.image).permute(0, 3, 1, 2).contiguous()
    kspace = torch.view_as_real(scan.kspace).permute(0, 4, 1, 2, 3).contiguous()
    return lambda: physics.A_adjoint(physics.A(image) - kspace)


def name_of(case: tuple[int, ...]) -> str:
    batch, coils, height, width = case
    return f"{batch} x {coils} coils of {height}x{width}"


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_gradient_of_lines(report, build, one_thread, case):
    scan = Scan(*case)
    scan.operator.backend = build.backend
    error = scan.check()
    report.benchmark.pedantic(scan.ours, rounds=3, warmup_rounds=1)
    times = in_turn({"ours": scan.ours, "torch.fft": scan.plain, "centred torch.fft": scan.centred}, 4)
    seconds = times.pop("ours")
    points = scan.maps.numel() * case[0]
    report.add(
        "fourier_gradient",
        build.name,
        f"{name_of(case)}, R=4 lines",
        seconds,
        rate=f"{points / seconds / 1e9:.2f}e9 coil pixels/s",
        peers=times,
        error=error,
    )


def kept(case: tuple[int, ...], points: bool) -> dict[str, float]:
    """Time in a process whose allocator keeps its memory."""
    command = [sys.executable, __file__, *map(str, case), str(int(points))]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, **PATH, **KEEP}
    )
    return json.loads(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="settings of the GNU C library")
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_gradient_with_an_allocator_that_keeps_memory(report, case):
    report.benchmark.pedantic(lambda: None)
    for points in (False, True):
        times = kept(case, points)
        seconds = times.pop("ours")
        sampling = "R=4 points" if points else "R=4 lines"
        report.add(
            "fourier_gradient",
            f"cpu-{oder_fast.build_info()['cpu']['isa']}",
            f"{name_of(case)}, {sampling}, allocator keeps memory",
            seconds,
            peers=times,
        )


def test_gradient_of_points(report, build, one_thread):
    scan = Scan(*CASES[0], points=True)
    scan.operator.backend = build.backend
    error = scan.check()
    report.benchmark.pedantic(scan.ours, rounds=3, warmup_rounds=1)
    times = in_turn({"ours": scan.ours, "torch.fft": scan.plain, "centred torch.fft": scan.centred}, 4)
    seconds = times.pop("ours")
    report.add(
        "fourier_gradient", build.name, f"{name_of(CASES[0])}, R=4 points", seconds, peers=times, error=error
    )


def test_other_packages(report, one_thread, deepinv):
    scan = Scan(*CASES[0])
    scan.check()
    report.benchmark.pedantic(scan.ours, rounds=3, warmup_rounds=1)
    candidates = {
        "sigpy Sense": sigpy_gradient(scan),
        "deepinv MultiCoilMRI": deepinv_gradient(scan, deepinv),
    }
    candidates = {name: call for name, call in candidates.items() if call is not None}
    if not candidates:
        pytest.skip("neither sigpy nor deepinv is installed")
    for name, call in candidates.items():
        result = torch.as_tensor(call())
        if not result.is_complex():
            result = torch.view_as_complex(result.permute(0, 2, 3, 1).contiguous())
        assert relative_error(result.reshape(scan.image.shape), scan.ours()) < 1e-5, name
    times = in_turn({"ours": scan.ours, **candidates}, 4)
    report.add("fourier_gradient", "cpu", f"{name_of(CASES[0])}, R=4 lines", times.pop("ours"), peers=times)


def test_minibatches(report, one_thread):
    scan = Scan(*CASES[0])
    four = torch.tensor([1, 6, 11, 15])
    report.benchmark.pedantic(lambda: scan.ours(four), rounds=3, warmup_rounds=1)
    times = in_turn({"four": lambda: scan.ours(four), "all": scan.ours}, 2)
    shape = f"{name_of(CASES[0])}, R=4 lines, 4 coils a step"
    report.add("fourier_gradient", "cpu", shape, times["four"], peers={"all 16 coils": times["all"]})


def test_two_threads(report):
    if torch.get_num_threads() < 2:
        pytest.skip("one core")
    before = torch.get_num_threads()
    report.benchmark.pedantic(lambda: None)
    for points in (False, True):
        scan = Scan(*CASES[0], points=points)

        def with_threads(n, scan=scan):
            def run():
                torch.set_num_threads(n)
                scan.ours()

            return run

        times = in_turn({"two": with_threads(2), "one": with_threads(1)}, 2)
        sampling = "R=4 points" if points else "R=4 lines"
        report.add(
            "fourier_gradient",
            "cpu, 2 threads",
            f"{name_of(CASES[0])}, {sampling}",
            times["two"],
            peers={"one thread": times["one"]},
        )
    torch.set_num_threads(before)


MEMORY = """
import ctypes, torch
from bench_fourier import CASES, Scan
torch.set_num_threads(1)
def peak():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) * 1024
for case, points in ((CASES[0], False), ((1, 16, 640, 368), False), (CASES[0], True)):
    small, scan = Scan(1, 1, 16, 16, points), Scan(*case, points, "reference")
    small.ours()
    scan.operator.backend = "cpu"
    ctypes.CDLL(None).malloc_trim(0)
    open("/proc/self/clear_refs", "w").write("5")
    before = peak()
    result = scan.ours()
    print(case[2], case[3], int(points), peak() - before - result.numel() * 8)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self")
def test_peak_memory(report):
    """Beyond inputs and output: the strips of a thread for lines, three planes for points."""
    run = subprocess.run(
        [sys.executable, "-c", MEMORY], check=True, capture_output=True, text=True, env={**os.environ, **PATH}
    )
    report.benchmark.pedantic(lambda: None)
    for line in run.stdout.splitlines():
        height, width, points, extra = map(int, line.split())
        assert extra < 2**20 + (3.3 * height * width * 8 if points else 0)
        report.add(
            "fourier_gradient",
            "cpu, 1 thread",
            f"1 x 16 coils of {height}x{width}, R=4 {'points' if points else 'lines'}",
            None,
            note=f"peak memory beyond inputs and output {extra / 2**20:.2f} MiB",
        )


# ------------------------------------------------------------------ on a GPU

# Coils that a block of fourier_lines_kernel transforms side by side, whose products it adds up in pairs.
SLOTS = 4


def radices(n: int) -> list[int]:
    """Return the radix stages of a transform, as fourier_plan in csrc/fourier.h has them."""
    twos = (n & -n).bit_length() - 1
    eights = 0 if twos == 4 else (twos - 4) // 3 if twos % 3 == 1 and twos >= 4 else twos // 3
    rest = twos - 3 * eights
    plan = [4] * (rest // 2) + [2] * (rest % 2) + [8] * eights
    odd, prime = n >> twos, 3
    while odd > 1:
        if odd % prime == 0:
            plan.append(prime)
            odd //= prime
        else:
            prime += 2
    return plan or [1]


def butterflies(n: int) -> float:
    """Operations of a transform for each of its n numbers, as they are usually counted."""
    return 5 * math.log2(n)


def lines_work(batch: int, coils: int, n: int, width: int, n_lines: int) -> list[Work]:
    """fourier_lines_kernel, n the length of the transform.

    Bytes: coil maps (shared by the images) and samples once, the image twice. Operations for each number of each coil: two
    transforms, 5 log2 n each, and 16 for the products with the maps, the residual and the sum. Accesses to shared memory of
    8 bytes, by s radix stages: 4 s - 2, 4 more where the last radix is above 8, and half a one for the sum over four coils;
    roots of unity come on top, 2 (s - 1) at half the price, since half a warp shares one.

    | at, R = 4 | memory | arithmetic | shared memory | floor on an H200 |
    |---|---|---|---|---|
    | 1 x 16 x 320 x 320 | 18.0 MB, 4.2 us | 0.16 Gflop, 2.4 us | 164 MB, 4.9 us | 4.9 us |
    | 8 x 16 x 640 x 368 | 120.6 MB, 28.0 us | 3.05 Gflop, 45.6 us | 3.98 GB, 119 us | 119 us |

    Shared memory binds, closely followed by device memory with one image; with several they share the coil maps. Hence radices
    of 8 (and up to 23) in registers, the first stage reading image and map and the last one back writing products, the
    residual formed in the registers of the middle stage, where a thread keeps its rows: nothing but maps, samples and the
    image passes through memory, and the transform along the sampled lines is not made at all. The sm_90 code of nvcc 13.0 has
    some 137 instructions for each number of each coil at 320 = 8 * 8 * 5, 6.7 us by themselves with one image: lanes without
    a coil go along with a neighbour instead of being asked at each access, and offsets in a plane have 32 bits.
    """
    numbers, plan = float(batch) * coils * n * width, radices(n)
    s = len(plan)
    moved = 8.0 * (coils * n * width + batch * coils * n_lines * width + 2 * batch * n * width)
    accesses = 4 * s - 2 + 4 * (plan[-1] > 8) + 2 / SLOTS + (s - 1)
    return [Work(moved, numbers * (2 * butterflies(n) + 16), numbers * 8 * accesses)]


def points_work(batch: int, coils: int, height: int, width: int, share: float, l2: int) -> list[Work]:
    """fourier_lines_kernel forward, fourier_points_kernel, fourier_lines_kernel back.

    Bytes: coil maps, image and samples once; of samples at random points every piece of 32 bytes that holds one, 68 % of all
    at R = 4. Between the kernels the planes of all coils are written and read twice, through memory where the L2 cache does
    not hold them.

    | at, R = 4 | memory | arithmetic | shared memory | floor on an H200 |
    |---|---|---|---|---|
    | 1 x 16 x 320 x 320 | 23.7 MB, 5.5 us | 0.31 Gflop, 4.6 us | 348 MB, 10.4 us | 11.7 us |
    | 8 x 16 x 640 x 368 | 1.19 GB, 277 us | 5.98 Gflop, 89 us | 7.60 GB, 227 us | 289 us |

    The floor is the sum of three. With one image shared memory binds, with several the planes between the kernels. Hence half
    the transform fused with the coil maps and the other half with the residual: each plane is written and read twice, in place,
    where cuFFT and pointwise kernels take four such passes for the transforms alone and more around them.
    """
    numbers = float(batch) * coils * height * width
    planes = 8 * numbers if 8 * numbers > l2 else 0.0
    touched = 1 - (1 - share) ** 4
    maps, samples, image = 8.0 * coils * height * width, 8 * touched * numbers, 8.0 * batch * height * width
    s, t = len(radices(height)), len(radices(width))
    return [
        Work(maps + image + planes, numbers * (butterflies(height) + 8), numbers * 8 * (2.5 * s - 2.5)),
        Work(2 * planes + samples, numbers * (2 * butterflies(width) + 4), numbers * 8 * (5 * t - 1)),
        Work(image + planes, numbers * (butterflies(height) + 8), numbers * 8 * (2.5 * s - 0.5 + 2 / SLOTS)),
    ]


def on_gpu(scan: Scan) -> Scan:
    for name, value in vars(scan).items():
        if isinstance(value, torch.Tensor):
            setattr(scan, name, value.cuda())
    scan.operator.cuda()
    scan.data_fidelity = scan.operator.least_squares(scan.kspace)
    return scan


@needs_gpu
@pytest.mark.parametrize("points", [False, True], ids=["lines", "points"])
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_gpu_gradient(report, case, points):
    batch, coils, height, width = case
    scan = on_gpu(Scan(*case, points))
    if points:
        work = points_work(*case, 0.25, machine().l2)
    else:
        work = lines_work(batch, coils, width, height, width // 4)
    sets = rotated(scan, sum(w.bytes for w in work))

    def gradient(scan: Scan, backend: str, kind: torch.dtype = torch.complex64) -> torch.Tensor:
        mri = scan.operator
        image, samples, maps = (v.to(kind) for v in (scan.image, scan.data_fidelity.samples, mri.coil_maps))
        return ops.fourier_gradient(image, samples, maps, mri.sampling, axis=mri._axis, backend=backend)

    ours = {backend: lambda k, backend=backend: gradient(sets[k], backend) for backend in ("cuda", "triton")}
    expected = gradient(scan, "reference", torch.complex128)
    errors = {name: relative_error(call(0), expected) for name, call in ours.items()}
    assert max(errors.values()) < TOLERANCE[torch.complex64], errors
    assert relative_error(scan.plain(), expected) < 1e-5
    assert relative_error(scan.centred(), expected) < 1e-5
    report.benchmark.pedantic(lambda: None)
    candidates = ours | {
        "call by call": ours["cuda"],
        "torch.fft": lambda k: sets[k].plain(),
        "centred torch.fft": lambda k: sets[k].centred(),
    }
    times = time_in_turn(candidates, len(sets), eager=["call by call"])
    sampling = "R=4 points" if points else "R=4 lines"
    add_row(report, "fourier_gradient", f"{name_of(case)}, {sampling}", times, work, errors["cuda"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    *sizes, with_points = map(int, sys.argv[1:])
    one = Scan(*sizes, points=bool(with_points))
    one.check()
    print(
        json.dumps(in_turn({"ours": one.ours, "torch.fft": one.plain, "centred torch.fft": one.centred}, 4))
    )
