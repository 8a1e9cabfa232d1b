"""What the fast form is timed against: version 0.1, and deepinv; and the problem that all of them solve.

CT of 256 x 256 pixels, 90 views, 50 dB, the official U-Net, trained on noise for a minute, so that the fixed point exists:
it is solved for to 1e-6 in double precision, with the gradient of the squared error in the weights. That takes some
minutes, once: all is kept in a folder. Version 0.1 runs by an interpreter that has it, named by ODER_FAST_01.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from oder_fast import DEQRED, Anderson, GradientStep, Implicit, ParallelBeamCT, UNet
from oder_fast.data import add_gaussian_noise, random_ellipses
from oder_fast.denoisers import frozen

SIZE, VIEWS, TAU = 256, 90, 0.002
PRECISE = Anderson(200, 1e-6, memory=10)


def distance(image, reference):
    return float((image - reference).norm() / reference.norm())


def _train(steps=400):
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(1)
    unet = UNet().to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(unet.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        clean = random_ellipses(2, 64, g, texture=0.01)[:, None]
        noisy = clean + 0.1 * torch.rand(2, 1, 1, 1, generator=g) * torch.randn(clean.shape, generator=g)
        optimizer.zero_grad()
        (unet(noisy) - clean).square().mean().backward()
        optimizer.step()
        schedule.step()
    return unet


class Problem:
    """The problem, its solution and the gradient in the weights."""

    def __init__(self, nonnegative=False):
        folder = Path(os.environ.get("ODER_FAST_PEERS") or Path(tempfile.gettempdir()) / "oder-fast-peers")
        self.path = folder / f"problem{'-nonnegative' * nonnegative}.pt"
        self.nonnegative = nonnegative
        self.ct = ParallelBeamCT(SIZE, VIEWS)
        self.norm = self.ct.norm_squared()
        if not self.path.exists():
            self._solve(folder)
        saved = torch.load(self.path, weights_only=True)
        self.weights, self.y, self.truth, self.start = (saved[k] for k in ("weights", "y", "truth", "start"))
        self.image, self.gradient = saved["image"], saved["gradient"]
        self.unet = self.network()
        self.optimizer = torch.optim.Adam(self.unet.parameters(), 1e-4)

    def network(self):
        unet = UNet().to(memory_format=torch.channels_last)
        unet.load_state_dict(self.weights)
        return unet

    def _solve(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        weights = folder / "unet.pt"
        if not weights.exists():
            torch.save(_train().state_dict(), weights)
        self.weights = torch.load(weights, weights_only=True)
        g = torch.Generator().manual_seed(0)
        truth = random_ellipses(1, SIZE, g)
        y = add_gaussian_noise(self.ct(truth), 50, g)
        start = self.ct.fbp(y).clamp(min=0) if self.nonnegative else self.ct.fbp(y)
        unet, ct = self.network().double(), copy.deepcopy(self.ct).double()
        model = self.model(unet, solver=PRECISE, differentiation=Implicit(PRECISE), on_failure="raise")
        solution = model(y.double(), ct, start.double(), return_solution=True)
        (solution.value - truth).square().sum().backward()
        assert bool(solution.adjoint[-1].converged.all())
        with torch.no_grad():
            form = self.model(unet, step=GradientStep(), solver=Anderson(1, 1e-30))
            there = form(y.double(), ct, solution.value.detach(), return_solution=True)
        # A step of the gradient form is a few thousandths of a step of the proximal form.
        assert float(there.residual) < 1e-8, there
        gradient = torch.cat([p.grad.flatten() for p in unet.parameters()])
        saved = {"weights": self.weights, "y": y, "truth": truth, "start": start, "tau": TAU}
        saved |= {"nonnegative": self.nonnegative, "image": solution.value.detach().float()}
        torch.save(saved | {"gradient": gradient.float()}, self.path)

    def model(self, unet=None, **options):
        options = {
            "tau": TAU,
            "nonnegative": self.nonnegative,
            "normalize": False,
            "on_failure": "ignore",
        } | options
        return DEQRED(self.unet if unet is None else unet, **options)

    def denoiser_seconds(self):
        """Of one call."""
        image = self.start[:, None]
        with torch.no_grad(), frozen(self.unet) as fixed:
            fixed(image)
            begin = time.perf_counter()
            fixed(image)
        return time.perf_counter() - begin

    def step(self, image_of):
        """Seconds of a training step, and its gradient; all take it at the same weights."""
        self.unet.load_state_dict(self.weights)
        begin = time.perf_counter()
        self.optimizer.zero_grad()
        (image_of() - self.truth).square().sum().backward()
        self.optimizer.step()
        seconds = time.perf_counter() - begin
        return seconds, torch.cat([p.grad.flatten() for p in self.unet.parameters()])

    def ours(self, **options):
        model = self.model(**options)
        return lambda: model(self.y, self.ct, self.start)


class Old:
    """Version 0.1 in a process of its own."""

    def __init__(self, problem, **environment):
        command = [
            os.environ["ODER_FAST_01"],
            str(Path(__file__).with_name("version_01.py")),
            str(problem.path),
        ]
        # Not from the folder of this version, which would be imported in its place.
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=tempfile.gettempdir(),
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )

    def __call__(self, *command):
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()


def tomography(deepinv, size, views, **accuracy):
    """Return deepinv's parallel-beam CT, as quick as it gets."""
    return deepinv.physics.Tomography(
        angles=views,
        img_width=size,
        circle=False,
        normalize=False,
        adjoint_via_backprop=False,
        parallel_computation=False,
        **accuracy,
    )


class Deepinv:
    """deepinv's algorithms on the problem, by its own operator or by ours.

    Best of what was tried: its quicker, approximate adjoint, views one by one (0.16 s for A^T A, 0.36 s by default, on
    one core of a Xeon), the denoiser channels-last, Anderson's absolute ridges small for both solves, the start that we
    have, inner solves only as accurate as the outer ones need.
    """

    def __init__(self, deepinv, problem, our_operator, inner=1e-3, inner_steps=50):
        self.deepinv, self.problem = deepinv, problem
        ct = problem.ct
        accuracy = {"max_iter": inner_steps, "tol": inner}
        if our_operator:
            normal = ct.least_squares(torch.zeros_like(problem.y)).normal

            class Adapter(deepinv.physics.LinearPhysics):
                def A(self, x, **_):
                    return ct(x[:, 0])[:, None]

                def A_adjoint(self, y, **_):
                    return ct.adjoint(y[:, 0])[:, None]

                def A_adjoint_A(self, x, **_):
                    return normal(x[:, 0])[:, None]

            self.physics, self.y = Adapter(**accuracy), problem.y[:, None]
        else:
            self.physics = tomography(deepinv, SIZE, VIEWS, **accuracy)
            # The same geometry: its projections of the truth are ours but for the discretisation.
            assert distance(self.physics.A(problem.truth[:, None])[:, 0].mT, ct(problem.truth)) < 0.02
            # Data of its own, with the noise that ours have: they would not be consistent with ours to within the noise.
            self.y = self.physics.A(problem.truth[:, None]) + (problem.y - ct(problem.truth)).mT[:, None]

    def fixed_point(self):
        """The fixed point for its operator and data: ours finds it with any operator."""
        if self.y.shape[2:] == self.problem.y.shape[1:]:
            return self.problem.image
        with torch.no_grad():
            solution = self.problem.model(solver=Anderson(30, 1e-4))(
                self.y, self.physics, self.problem.image[:, None], return_solution=True
            )
        assert bool(solution.converged.all()), solution.message
        return solution.value[:, 0]

    def model(self, algorithm, n, adjoint=None, anderson=True):
        """`algorithm` "HQS": our map; "PGD": x = D(x - A^T(A x - y) / |A|^2), another fixed point; n iterations."""
        optim, unet = self.deepinv.optim, self.problem.unet

        class AtLevel(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.network = unet

            def forward(self, x, sigma):
                return self.network(x)

        proximal = algorithm == "HQS"
        model = getattr(optim, algorithm)(
            data_fidelity=optim.L2(),
            prior=optim.PnP(denoiser=AtLevel()),
            stepsize=1 / (self.problem.norm * (TAU if proximal else 1)),
            sigma_denoiser=0.0,
            g_first=proximal,
            max_iter=n,
            thres_conv=1e-30,
            early_stop=False,
            custom_init=lambda y, physics: self.problem.start[:, None],
            anderson_acceleration=optim.AndersonAccelerationConfig(5, 1.0, 1e-8) if anderson else None,
            DEQ=adjoint
            and optim.DEQConfig(
                anderson_acceleration_backward=anderson,
                history_size_backward=8,
                eps_backward=1e-8,
                max_iter_backward=adjoint,
            ),
            trainable_params=[],
        )
        return lambda: model(self.y, self.physics)[:, 0]
