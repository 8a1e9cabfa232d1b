"""
Your own operator
=================

A measurement of your own is a class with `forward` and `adjoint`. Here it is a camera out of focus: a convolution. A
closed form for the inner problem, four lines more, saves the iterations of conjugate gradients.
"""

# %%
# The convolution is circular, so that a Fourier transform diagonalizes it: with the transfer function h,
#
# .. math:: A x = F^{-1} (h \cdot F x), \qquad A^H y = F^{-1} (\bar h \cdot F y), \qquad
#     (A^H A + w)^{-1} b = F^{-1} \frac{F b}{|h|^2 + w}

import matplotlib.pyplot as plt
import skimage.data
import torch

from oder_fast import DEQRED, MeasurementOperator, choose_weight
from oder_fast.data import add_gaussian_noise, psnr


class Defocus(MeasurementOperator):
    """Convolve images with a disc."""

    def __init__(self, size, radius):
        super().__init__()
        self.image_shape = self.data_shape = (size, size)
        rows, columns = torch.meshgrid(*[torch.fft.fftfreq(size) * size] * 2, indexing="ij")
        # The border of the disc is smooth over a pixel.
        disc = (radius + 0.5 - torch.hypot(rows, columns)).clamp(0, 1)
        self.register_buffer("transfer", torch.fft.rfft2(disc / disc.sum()))

    def _filter(self, image, by):
        return torch.fft.irfft2(by * torch.fft.rfft2(image), s=self.image_shape)

    def forward(self, x):
        return self._filter(x, self.transfer)

    def adjoint(self, y):
        return self._filter(y, self.transfer.conj())

    def norm_squared(self):
        return float(self.transfer.abs().square().max())


# %%
# The adjoint is the exact transpose, as a dot test shows: a mistake there would bias every fixed point.

camera = Defocus(128, radius=3.0)
generator = torch.Generator().manual_seed(0)
u, v = torch.randn(2, 1, 128, 128, generator=generator)
print(float((camera(u) * v).sum()), float((u * camera.adjoint(v)).sum()))

# %%
# A photograph of 128 x 128 pixels, blurred, with noise at 40 dB. The weight of total variation is chosen from the
# data.

x = torch.from_numpy(skimage.data.camera()[40:296:2, 130:386:2] / 255).float()[None]
y = add_gaussian_noise(camera(x), 40, generator)
choice = choose_weight(y, camera, tau=0.03, bounds=(1e-4, 1.0), nonnegative=True)
model = choice.model
solution = model(y, camera, return_solution=True)
print(choice)
print(f"{solution.denoiser_calls} calls of the denoiser, {solution.operator_calls:g} of the operator")

# %%
# The closed form belongs to the data fidelity, a `LeastSquares`: `solve` returns the solution of (A^H A + weight) x =
# rhs. It ignores the arguments that only iterations need. Where pixels are held at 0 (`free`) there is no closed
# form, and the conjugate gradients of the base class stay.

from oder_fast.operators import LeastSquares


class DefocusLeastSquares(LeastSquares):
    """The data fidelity of `Defocus`, whose inner problem is solved by division in the spectrum."""

    def solve(self, rhs, weight, start, tolerance, free=None):
        if free is not None:
            return super().solve(rhs, weight, start, tolerance, free)
        self.calls += 1
        return self.operator._filter(rhs, 1 / (self.operator.transfer.abs().square() + weight))


class FastDefocus(Defocus):
    """`Defocus` with the closed form."""

    def least_squares(self, y):
        return DefocusLeastSquares(self, y)


fast = FastDefocus(128, radius=3.0)
unconstrained = DEQRED(model.denoiser, tau=0.03)
for operator in (camera, fast):
    solved = unconstrained(y, operator, return_solution=True)
    print(
        f"{type(operator).__name__}: {solved.denoiser_calls} calls of the denoiser, {solved.operator_calls:g} of the "
        f"operator, {psnr(solved.value, x):.2f} dB"
    )

# %%
# The blurred image, total variation, and what the inverse filter alone makes of the noise, with the weight that is
# best for it in hindsight.

tikhonov = max(
    (
        fast.least_squares(y).solve(fast.adjoint(y), torch.tensor(w), None, None)
        for w in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    ),
    key=lambda image: psnr(image, x),
)
images = {
    "Truth": x,
    "Measured": y,
    "Tikhonov, best weight": tikhonov,
    "RED, total variation": solution.value,
}
fig, axes = plt.subplots(2, 4, figsize=(10.5, 5.4), layout="constrained")
for k, (name, image) in enumerate(images.items()):
    axes[0, k].imshow(image[0], cmap="gray", vmin=0, vmax=1)
    axes[0, k].set_title(name if k == 0 else f"{name}\n{psnr(image, x):.2f} dB")
    if k:
        error = axes[1, k].imshow((image - x)[0], cmap="RdBu_r", vmin=-0.3, vmax=0.3)
for axis in axes.flat:
    axis.set_axis_off()
fig.colorbar(error, ax=axes[1], label="error")
plt.show()
