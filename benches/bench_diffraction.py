"""Diffraction tomography: our gradient, by illuminations and through Gram matrices, against plain torch.

Floors at 32 illuminations, 8 slices of 256 x 256 (complex64), pupils of 13 % of the plane: a transform of the slices
and back, 84 MFLOP; per illumination and frequency in its pupil two waves (about 60 operations) and 2 x 8 slices of two
complex products (256), 90 MFLOP in all. In memory: the slices' spectra twice (4.2 MB each), the data's within the
pupils (2.2 MB). On a CPU core arithmetic binds; on an H200 the kernel's 13 MB take 3 us at 4.3 TB/s, its arithmetic 1.3
us at 67 TFLOP/s. Through Gram matrices 8 x 8 products per frequency replace the illuminations.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

import oder_fast
from oder_fast import ops
from oder_fast.data import led_ring
from oder_fast.testing import in_turn, relative_error

CASES = ((256, 32, 8), (512, 89, 8))
# The C library's allocator told to keep what is freed: torch's large temporaries then cost no page faults.
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
        self.spectra = self.operator.prepare(self.intensities)
        self.right = torch.fft.fft2(self.operator.adjoint(self.intensities), norm="ortho")
        if peers:
            self.phase, self.absorption = self._stored()

    def _stored(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Transfer functions of the real and of the imaginary part, (L, Z, H, W)."""
        idt, shape = self.operator, (len(self.operator.transfer), *self.operator.image_shape)
        stored = torch.empty(shape, dtype=torch.complex64), torch.empty(shape, dtype=torch.complex64)
        k = torch.arange(shape[2])
        for one in range(shape[0]):
            scan = (idt.transfer[one : one + 1], idt.depths, idt.support[one : one + 1], idt.optics, shape[3])
            here = ops.transfer_at(*scan, k[:, None], k)[0]
            there = ops.transfer_at(*scan, -k[:, None], -k)[0].conj()
            stored[0][one] = here + there
            stored[1][one] = 1j * (here - there)
        return stored

    def ours(self, blocks: torch.Tensor | None = None) -> torch.Tensor:
        return ops.diffraction_gradient(
            self.image,
            self.spectra,
            *self.operator._scan,
            blocks,
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


def add_both(report, face: str, shape: str, times: dict[str, float], error: float | None = None) -> None:
    ours, gram = times.pop("ours"), times.pop("gram")
    report.add("diffraction_gradient", face, shape, ours, peers=times, error=error)
    report.add("diffraction_gram", face, shape, gram, peers=times)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_gradient(report, face, one_thread, case):
    if case != CASES[0] and face.name == "cpu-baseline":
        pytest.skip("long enough with the other faces")
    scan = Scan(*case)
    scan.operator.backend = face.backend
    error = scan.check()
    report.benchmark.pedantic(scan.ours, rounds=3, warmup_rounds=1)
    rounds = 5 if case == CASES[0] else 2
    add_both(report, face.name, name_of(case), in_turn(scan.candidates(), 4, rounds), error)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="settings of the GNU C library")
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_gradient_with_an_allocator_that_keeps_memory(report, case):
    report.benchmark.pedantic(lambda: None)
    command = [sys.executable, __file__, *map(str, case)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **KEEP})
    face = f"cpu-{oder_fast.build_info()['cpu']['isa']}"
    add_both(report, face, f"{name_of(case)}, allocator keeps memory", json.loads(done.stdout))


def test_minibatches(report, one_thread):
    scan = Scan(256, 64, 8, peers=False)
    few = torch.arange(0, 64, 8)
    report.benchmark.pedantic(lambda: scan.ours(few), rounds=3, warmup_rounds=1)

    def transforms():
        return torch.fft.ifft2(torch.fft.fft2(scan.image))

    times = in_turn(
        {"few": lambda: scan.ours(few), "all": scan.ours, "gram": scan.gram, "transforms": transforms}, 3
    )
    report.add(
        "diffraction_gradient",
        "cpu",
        f"{name_of((256, 64, 8))}, 8 a step",
        times["few"],
        peers={"all 64": times["all"], "all through Gram matrices": times["gram"]},
        note=f"of which the slices' transforms are {1e3 * times['transforms']:.1f} ms",
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
    folder = os.path.dirname(os.path.abspath(__file__))
    run = subprocess.run(
        [sys.executable, "-c", MEMORY], check=True, capture_output=True, text=True, cwd=folder
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


if __name__ == "__main__":
    torch.set_num_threads(1)
    one = Scan(*map(int, sys.argv[1:]))
    one.check()
    print(json.dumps(in_turn(one.candidates(), 4, 2)))
