"""Diffraction tomography: our gradient, by illuminations and through Gram matrices, against plain torch.

Floors at 32 illuminations, 8 slices of 256 x 256 (complex64), pupils of 13 % of the plane: a transform of the slices
and back, 84 MFLOP; per illumination and frequency in its pupil two waves (about 60 operations) and 2 x 8 slices of two
complex products (256), 90 MFLOP in all. In memory: the slices' spectra twice (4.2 MB each), the data's within the
pupils (2.2 MB). On a CPU core arithmetic binds; on an H200 the kernel's 10.7 MB take 2.5 us at 4.3 TB/s, its arithmetic
0.9 us at 67 TFLOP/s. Through Gram matrices 8 x 8 products per frequency replace the illuminations.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from cases import in_turn, relative_error

import oder_fast
from gpu import Work, add_row, needs_gpu, rotated, time_in_turn
from oder_fast import ops
from oder_fast.data import led_ring
from oder_fast.operators import _matrices

CASES = ((256, 32, 8), (512, 89, 8))
# The C library's allocator told to keep what is freed: torch's large temporaries then cost no page faults.
# A process of its own finds modules where this one does: those of the tests, too.
PATH = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
KEEP = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "17179869184"}
OPTICS = {"wavelength": 0.6, "numerical_aperture": 0.25, "medium_index": 1.33, "pixel_size": 0.5}


class Scan:
    """A case in every peer's form."""

    def __init__(
        self, size: int, lights: int, slices: int, *, peers: bool = True, backend: str = "auto"
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        third = lights // 3
        rings = [led_ring(lights - third, 0.24), led_ring(third, 0.12)]
        self.operator = oder_fast.DiffractionTomography(
            (size, size), [3.0 * z for z in range(slices)], torch.cat(rings), backend=backend, **OPTICS
        )
        shape = (1, slices, size, size)
        self.image, other = (torch.randn(shape, dtype=torch.complex64, generator=generator) for _ in range(2))
        self.intensities = self.operator(other)
        self.spectra = torch.fft.rfft2(self.intensities, norm="ortho")
        self.right = torch.fft.fft2(self.operator.adjoint(self.intensities), norm="ortho")
        if peers:
            self.phase, self.absorption = self._stored()

    def _stored(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Transfer functions of the real and of the imaginary part, (L, Z, H, W)."""
        idt, shape = self.operator, (len(self.operator.transfer), *self.operator.image_shape)
        device = idt.transfer.device
        stored = tuple(torch.empty(shape, dtype=torch.complex64, device=device) for _ in range(2))
        k = torch.arange(shape[2], device=device)
        for one in range(shape[0]):
            scan = _matrices.Scan(idt.transfer, idt.depths, idt.support, idt.optics, shape[3]).only(one)
            here = _matrices.transfer_at(scan, k[:, None], k)[0]
            there = _matrices.transfer_at(scan, -k[:, None], -k)[0].conj()
            stored[0][one] = here + there
            stored[1][one] = 1j * (here - there)
        return stored

    def ours(self, illuminations: torch.Tensor | None = None) -> torch.Tensor:
        return ops.diffraction_gradient(
            self.image,
            self.spectra,
            *self.operator._scan,
            illuminations,
            self.operator.optics,
            backend=self.operator.backend,
        )

    def gram(self) -> torch.Tensor:
        matrices = self.operator._gram_matrices(self.image)
        return ops.diffraction_gram(self.image, *matrices, self.right, backend=self.operator.backend)

    def one_by_one(self) -> torch.Tensor:
        """The same, one illumination after another: less memory."""
        real, imaginary = torch.fft.fft2(self.image[0].real), torch.fft.fft2(self.image[0].imag)
        phase, absorption = torch.zeros_like(real), torch.zeros_like(real)
        for one, (p, a) in enumerate(zip(self.phase, self.absorption, strict=True)):
            residual = torch.fft.ifft2((p * real + a * imaginary).sum(0)).real - self.intensities[0, one]
            spectrum = torch.fft.fft2(residual)
            phase += p.conj() * spectrum
            absorption += a.conj() * spectrum
        return torch.complex(torch.fft.ifft2(phase).real, torch.fft.ifft2(absorption).real)[None]

    def batched(self) -> torch.Tensor:
        """The usual: stored transfer functions and a pair of transforms per illumination, all at once."""
        real, imaginary = torch.fft.fft2(self.image[0].real), torch.fft.fft2(self.image[0].imag)
        field = (self.phase * real + self.absorption * imaginary).sum(1)
        spectrum = torch.fft.fft2(torch.fft.ifft2(field).real - self.intensities[0])[:, None]
        phase, absorption = ((h.conj() * spectrum).sum(0) for h in (self.phase, self.absorption))
        return torch.complex(torch.fft.ifft2(phase).real, torch.fft.ifft2(absorption).real)[None]

    def half(self) -> torch.Tensor:
        """The same among half spectra, without transforms per illumination."""
        size = self.image.shape[-1]
        columns = size // 2 + 1
        real = torch.fft.rfft2(self.image[0].real, norm="ortho")
        imaginary = torch.fft.rfft2(self.image[0].imag, norm="ortho")
        phase, absorption = torch.zeros_like(real), torch.zeros_like(real)
        for one, (p, a) in enumerate(zip(self.phase, self.absorption, strict=True)):
            p, a = p[..., :columns], a[..., :columns]
            residual = (p * real + a * imaginary).sum(0) - self.spectra[0, one]
            phase += p.conj() * residual
            absorption += a.conj() * residual
        parts = (torch.fft.irfft2(part, (size, size), norm="ortho") for part in (phase, absorption))
        return torch.complex(*parts)[None]

    def candidates(self) -> dict:
        return {
            "ours": self.ours,
            "gram": self.gram,
            "usual torch": self.batched,
            "one by one": self.one_by_one,
            "torch, half spectra": self.half,
        }

    def check(self) -> float:
        expected = self.one_by_one()
        errors = [
            relative_error(call(), expected) for call in (self.ours, self.gram, self.half, self.batched)
        ]
        assert max(errors) < 1e-5
        return errors[0]


def name_of(case: tuple[int, ...]) -> str:
    size, lights, slices = case
    return f"{lights} illuminations, {slices} x {size}x{size}"


def add_both(report, backend: str, shape: str, times: dict[str, float], error: float | None = None) -> None:
    ours, gram = times.pop("ours"), times.pop("gram")
    report.add("diffraction_gradient", backend, shape, ours, peers=times, error=error)
    report.add("diffraction_gram", backend, shape, gram, peers=times)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_gradient(report, build, one_thread, case):
    if case != CASES[0] and build.name == "cpu-baseline":
        pytest.skip("long enough with the other backends")
    scan = Scan(*case)
    scan.operator.backend = build.backend
    error = scan.check()
    report.benchmark.pedantic(scan.ours, rounds=3, warmup_rounds=1)
    rounds = 5 if case == CASES[0] else 2
    add_both(report, build.name, name_of(case), in_turn(scan.candidates(), 4, rounds), error)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="settings of the GNU C library")
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_gradient_with_an_allocator_that_keeps_memory(report, case):
    report.benchmark.pedantic(lambda: None)
    command = [sys.executable, __file__, *map(str, case)]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, **PATH, **KEEP}
    )
    backend = f"cpu-{oder_fast.build_info()['cpu']['isa']}"
    add_both(report, backend, f"{name_of(case)}, allocator keeps memory", json.loads(done.stdout))


def test_minibatches(report, one_thread):
    scan = Scan(256, 64, 8, peers=False)
    few = torch.arange(0, 64, 8)
    report.benchmark.pedantic(lambda: scan.ours(few), rounds=3, warmup_rounds=1)

    def transforms():
        support = scan.operator.support
        return ops.diffraction._inverse(
            ops.diffraction._transform(scan.image, support, "cpu"), support, "cpu"
        )

    def library_transforms():
        return torch.fft.ifft2(torch.fft.fft2(scan.image))

    times = in_turn(
        {
            "few": lambda: scan.ours(few),
            "all": scan.ours,
            "gram": scan.gram,
            "transforms": transforms,
            "library": library_transforms,
        },
        5,
    )
    report.add(
        "diffraction_gradient",
        "cpu",
        f"{name_of((256, 64, 8))}, 8 a step",
        times["few"],
        peers={"all 64": times["all"], "all through Gram matrices": times["gram"]},
        note=f"of which the slices' transforms are {1e3 * times['transforms']:.1f} ms, those of torch "
        f"{1e3 * times['library']:.1f} ms",
    )


def test_two_threads(report):
    if torch.get_num_threads() < 2:
        pytest.skip("one core")
    before = torch.get_num_threads()
    report.benchmark.pedantic(lambda: None)
    scan = Scan(*CASES[0], peers=False)

    def with_threads(n):
        def run():
            torch.set_num_threads(n)
            scan.ours()

        return run

    results = []
    for n in (1, 2):
        torch.set_num_threads(n)
        results.append(scan.ours())
    assert torch.equal(*results)
    times = in_turn({"two": with_threads(2), "one": with_threads(1)}, 2)
    torch.set_num_threads(before)
    report.add(
        "diffraction_gradient",
        "cpu, 2 threads",
        name_of(CASES[0]),
        times["two"],
        peers={"one thread": times["one"]},
    )


MEMORY = """
import ctypes, torch
from bench_diffraction import CASES, Scan
torch.set_num_threads(1)
def peak():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) * 1024
scan = Scan(*CASES[1], peers=False)
scan.ours(torch.tensor([0]))
ctypes.CDLL(None).malloc_trim(0)
open("/proc/self/clear_refs", "w").write("5")
before = peak()
result = scan.ours()
print(peak() - before - result.numel() * 8)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self")
def test_peak_memory(report):
    """Beyond inputs and output: spectra of the slices, and never anything of illuminations x slices x pixels."""
    run = subprocess.run(
        [sys.executable, "-c", MEMORY], check=True, capture_output=True, text=True, env={**os.environ, **PATH}
    )
    report.benchmark.pedantic(lambda: None)
    extra, (size, lights, slices) = int(run.stdout), CASES[1]
    assert extra < 5 * slices * size * size * 8
    stored = lights * slices * size * size * 8
    report.add(
        "diffraction_gradient",
        "cpu, 1 thread",
        name_of(CASES[1]),
        None,
        note=f"peak memory beyond inputs and output {extra / 2**20:.0f} MiB; stored transfer functions would take "
        f"{stored / 2**20:.0f} MiB",
    )


# ------------------------------------------------------------------ on a GPU


def gradient_work(size: int, slices: int, pairs: float) -> list[Work]:
    """diffraction_kernel, between the transforms of the slices; `pairs` of illumination and frequency in its pupil.

    Bytes: spectra of the slices read and written once, of the data what lies in the pupils. Operations of a pair: two waves and
    their wavenumber, 74, and for each slice 8 to gather and 8 to give back (Horner's scheme and its transpose). Instructions
    of a pair at 8 slices in the sm_90 code of nvcc 13.0: 161 where both signs of a frequency lie in the pupil, else 209.

    | at 8 slices | pairs | memory | arithmetic | instructions | floor on an H200 |
    |---|---|---|---|---|---|
    | 32 illuminations, 256 x 256 | 0.29e6 | 10.7 MB, 2.5 us | 0.06 Gflop, 0.9 us | 1.5 us | 2.5 us |
    | 89 illuminations, 512 x 512 | 3.2e6 | 59.0 MB, 13.7 us | 0.64 Gflop, 9.6 us | 17.2 us | 17.2 us |

    Memory binds, of many illuminations instructions. Hence transfer functions made in registers (stored ones would be read: 16
    bytes for each pair and slice), as a geometric progression along the slices; half the spectrum, both signs of a frequency in
    one thread; the spectra of up to 8 slices and their sums in registers over all illuminations; only illuminations gone
    through whose pupil reaches a warp's columns; roots and quotients as the chip approximates them, sine and cosine by
    polynomials over half a turn.
    """
    moved, operations = 16.0 * slices * size * size + 8 * pairs, pairs * (74 + 16 * slices)
    return [Work(moved, operations, instructions=pairs * (53 + 16 * slices))]


def gram_work(size: int, slices: int, used: float, paired: float) -> list[Work]:
    """diffraction_gram_kernel; `used` and `paired` are shares of the plane: in any pupil, and where there are pairs.

    Bytes: data and gradient, spectra and Toeplitz matrices where used, pairs in half the plane. Operations: 8 for each of the
    entries of both matrices.

    | at 8 slices | memory | arithmetic | floor on an H200 |
    |---|---|---|---|
    | 32 illuminations, 256 x 256 | 15.1 MB, 3.5 us | 0.02 Gflop, 0.3 us | 3.5 us |
    | 89 illuminations, 512 x 512 | 61.1 MB, 14.2 us | 0.09 Gflop, 1.3 us | 14.2 us |

    Memory binds. Hence Toeplitz matrices by their first columns (8 numbers of 64), frequencies in no pupil skipped, pairs of one
    half plane for both signs, nothing read twice.
    """
    plane = float(size * size)
    moved = 16 * slices + 8 * slices * used + 8 * (1 + (slices - 1) * used) + 4 * slices**2 * paired
    return [Work(moved * plane, 8 * slices**2 * (used + paired) * plane)]


def on_gpu(case: tuple[int, ...]) -> Scan:
    scan = Scan(*case, peers=False)
    scan.operator.cuda()
    for name, value in vars(scan).items():
        if isinstance(value, torch.Tensor):
            setattr(scan, name, value.cuda())
    scan.phase, scan.absorption = scan._stored()
    scan.matrices = scan.operator._gram_matrices(scan.image)
    return scan


def kernel_alone(scan: Scan, name: str, data: torch.Tensor | None, *arguments) -> torch.Tensor:
    """Launch the kernel of an operator without the transforms of the slices."""
    gradient = torch.empty_like(scan.image)
    given = map(ops.diffraction._pairs, (scan.image, data, gradient))
    ops.diffraction._launch(name, scan.image, "cuda", *given, *arguments)
    return gradient


@needs_gpu
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_gpu_gradient(report, case):
    size, _, slices = case
    scan = on_gpu(case)
    idt = scan.operator
    spans = (idt.support[..., 1] - idt.support[..., 0]).clamp(min=0)
    by_pairs = gradient_work(size, slices, float(spans.sum()))
    auto, pairs = scan.matrices
    paired = 2 * pairs[0, 0].numel() / size**2
    by_gram = gram_work(size, slices, auto[0].ne(0).float().mean().item(), paired)
    sets = rotated(scan, by_pairs[0].bytes)

    def gradient(k, backend):
        s = sets[k]
        optics = s.operator.optics
        return ops.diffraction_gradient(s.image, s.spectra, *s.operator._scan, None, optics, backend=backend)

    def gram(k, backend):
        s = sets[k]
        return ops.diffraction_gram(s.image, *s.matrices, s.right, backend=backend)

    def alone(k):
        s = sets[k]
        scanned = ops.diffraction._scan(s.image, *s.operator._scan, None, list(s.operator.optics))
        return kernel_alone(s, "diffraction_gradient", s.spectra, *scanned)

    def gram_alone(k):
        s = sets[k]
        auto, pairs = s.matrices
        matrices = map(ops.diffraction._pairs, (auto, pairs))
        return kernel_alone(s, "diffraction_gram", s.right, *matrices, *s.image.shape, *pairs.shape[2:])

    wide = (v.to(torch.complex128) for v in (scan.image, scan.spectra))
    expected = ops.diffraction_gradient(*wide, *idt._scan, None, idt.optics, backend="reference")
    peers = {
        "usual torch": lambda k: sets[k].batched(),
        "torch, half spectra": lambda k: sets[k].half(),
        "one by one": lambda k: sets[k].one_by_one(),
    }
    assert max(relative_error(call(0), expected) for call in peers.values()) < 1e-5
    report.benchmark.pedantic(lambda: None)
    for op, call, kernel, work in (
        ("diffraction_gradient", gradient, alone, by_pairs),
        ("diffraction_gram", gram, gram_alone, by_gram),
    ):
        ours = {
            backend: lambda k, call=call, backend=backend: call(k, backend) for backend in ("cuda", "triton")
        }
        errors = {name: relative_error(run(0), expected) for name, run in ours.items()}
        assert max(errors.values()) < 1e-5, errors
        candidates = ours | {"kernel": kernel, "call by call": ours["cuda"]} | peers
        times = time_in_turn(candidates, len(sets), eager=["call by call"])
        alone_seconds, whole = times.pop("kernel"), times["cuda"]
        add_row(report, f"{op}, its kernel", name_of(case), {"cuda": alone_seconds}, work)
        seconds, peer_times = times.pop("cuda"), times
        by_call = peer_times.pop("call by call")
        note = f"transforms of the slices {1e6 * (whole - alone_seconds):.0f} us; {1e6 * by_call:.0f} us called without a graph"
        report.add(op, "cuda", name_of(case), seconds, peers=peer_times, error=errors["cuda"], note=note)


if __name__ == "__main__":
    torch.set_num_threads(1)
    one = Scan(*map(int, sys.argv[1:]))
    one.check()
    print(json.dumps(in_turn(one.candidates(), 4, 2)))
