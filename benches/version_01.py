"""Version 0.1, in a process of its own: `python version_01.py PROBLEM`, by an interpreter that has it.

Reads commands, a line of JSON each, and answers each with one; `peers.Old` is the other side. `peak` is shared by both.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
import warnings
from dataclasses import dataclass


def peak(run):
    """MiB of the resident set that a second call takes beyond what is there before it."""
    run()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = _high_water()
    run()
    return _high_water() - before


def _high_water():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024


def main():
    import torch

    from oder_fast import DEQRED, Implicit, Nesterov, ParallelBeamCT, UNet

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    problem = torch.load(sys.argv[1], weights_only=True)
    y, truth, start = (problem[name] for name in ("y", "truth", "start"))
    unet = UNet().to(memory_format=torch.channels_last)
    unet.load_state_dict(problem["weights"])
    ct = ParallelBeamCT(truth.shape[-1], y.shape[1])
    common = {
        "tau": problem["tau"] * ct.norm_squared(),
        "nonnegative": problem["nonnegative"],
        "on_failure": "ignore",
    }
    reached = []

    @dataclass(frozen=True)
    class Traced(Nesterov):
        def _advance(self, fixed_point_map, state):
            step = super()._advance(fixed_point_map, state)
            reached.append(float((step.image - problem["image"]).norm() / problem["image"].norm()))
            return step

    def iterations(within, most):
        """How many iterations of the default solver come within a relative distance of the fixed point."""
        reached.clear()
        solve(most, Traced)
        return next((n for n, distance in enumerate(reached, 1) if distance <= within), None)

    def solve(n, solver=Nesterov):
        with torch.no_grad():
            model = DEQRED(ct, unet, solver=solver(n, 1e-30), **common)
            begin = time.perf_counter()
            model(y, start)
        return time.perf_counter() - begin

    def step(n):
        """A training step as the bench of 0.1 takes it: 30 of the views in an iteration, no test of convergence."""
        unet.load_state_dict(problem["weights"])
        optimizer = torch.optim.Adam(unet.parameters(), 1e-4)
        solver = Nesterov(n, 1e-4, check_every=None)
        begin = time.perf_counter()
        model = DEQRED(
            ct,
            unet,
            minibatch_size=30,
            variance_reduction=False,
            solver=solver,
            differentiation=Implicit(solver=solver),
            **common,
        )
        optimizer.zero_grad()
        (model(y, start) - truth).square().sum().backward()
        optimizer.step()
        seconds = time.perf_counter() - begin
        gradient = torch.cat([p.grad.flatten() for p in unet.parameters()])
        return seconds, float((gradient - problem["gradient"]).norm() / problem["gradient"].norm())

    commands = {
        "iterations": iterations,
        "solve": solve,
        "step": step,
        "peak": lambda n: peak(lambda: step(n)),
    }
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(commands[name](*arguments)), flush=True)


if __name__ == "__main__":
    main()
