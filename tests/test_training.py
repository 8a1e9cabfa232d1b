import pytest
import torch
from torch import nn

from oder_fast.data import random_ellipses
from oder_fast.denoisers import DnCNN
from oder_fast.training import train_denoiser, train_fixed_point

pytestmark = pytest.mark.usefixtures("one_thread")


def make_batch(generator):
    return random_ellipses(4, 24, generator)[:, None]


def network():
    torch.manual_seed(0)
    return DnCNN(3, 8)


def trained(steps=12, seed=0, **settings):
    net = network()
    generator = torch.Generator().manual_seed(seed)
    losses = train_denoiser(net, make_batch, steps=steps, generator=generator, progress=False, **settings)
    return net, losses


def test_training_reduces_the_error_on_fresh_noise():
    net, losses = trained(200, sigma=(0.1, 0.1))
    assert len(losses) == 200
    clean = make_batch(torch.Generator().manual_seed(5))
    noisy = clean + 0.1 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(6))
    before, after = (((f(noisy) - clean) ** 2).mean() for f in (network(), net))
    assert after < 0.5 * before


def test_the_seed_determines_the_weights():
    torch.manual_seed(1)
    (first, first_losses), (second, second_losses) = trained(), trained()
    assert first_losses == second_losses
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert trained(seed=1)[1] != first_losses


@pytest.mark.parametrize("sigma", [(0.0, 0.0), (0.2, 0.2)])
def test_the_noise_has_the_level_asked_for(sigma):
    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, image):
            seen.append(image)
            return self.scale * image

    seen = []
    train_denoiser(Spy(), lambda g: torch.zeros(64, 1, 32, 32), steps=1, sigma=sigma, progress=False)
    assert seen[0].std().item() == pytest.approx(sigma[0], rel=0.02)


def test_the_mode_is_restored_and_training_is_on_in_between():
    modes = []
    net = network().eval()

    def spying(generator):
        modes.append(net.training)
        return make_batch(generator)

    train_denoiser(net, spying, steps=2, progress=False)
    assert modes == [True, True]
    assert not net.training


def test_an_interrupt_leaves_the_last_complete_step():
    expected = trained(0)[0]
    calls = []

    def interrupted(generator):
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(1)
        return make_batch(generator)

    net = network()
    with pytest.raises(KeyboardInterrupt):
        train_denoiser(net, interrupted, steps=5, progress=False)
    assert net.training
    changed = [not torch.equal(a, b) for a, b in zip(net.parameters(), expected.parameters(), strict=True)]
    assert all(changed)
    assert all(p.isfinite().all() for p in net.parameters())


def test_progress_goes_to_stderr(capsys):
    train_denoiser(network(), make_batch, steps=2, progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "train_denoiser" in captured.err
    assert "2/2" in captured.err


class Fixed(nn.Module):
    """Fixed point of x = a x + y by its formula; the truth below makes a = 1/2 the best."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.zeros(()))

    def forward(self, y):
        return y / (1 - self.a)


def test_train_fixed_point_minimizes_the_error_of_the_output():
    def pairs(generator):
        y = torch.rand(3, 4, 4, generator=generator)
        return y, 2 * y

    model = Fixed()
    losses = train_fixed_point(
        model,
        pairs,
        steps=200,
        learning_rate=0.02,
        generator=torch.Generator().manual_seed(0),
        progress=False,
    )
    assert model.a.item() == pytest.approx(0.5, abs=0.01)
    assert losses[-1] < 1e-3 * losses[0]


def test_train_fixed_point_takes_complex_images():
    def pairs(generator):
        y = torch.randn(3, 4, 4, dtype=torch.complex64, generator=generator)
        return y, 2 * y

    model = Fixed()
    options = {"steps": 200, "learning_rate": 0.02, "generator": torch.Generator().manual_seed(0)}
    train_fixed_point(model, pairs, progress=False, **options)
    assert model.a.item() == pytest.approx(0.5, abs=0.01)


def test_train_fixed_point_refuses_magnitudes_of_complex_images():
    def pairs(generator):
        y = torch.randn(3, 4, 4, dtype=torch.complex64, generator=generator)
        return y, y.abs()

    with pytest.raises(TypeError, match="must return complex images"):
        train_fixed_point(Fixed(), pairs, steps=1, progress=False)


def test_gradients_are_clipped():
    def pairs(generator):
        return torch.full((1, 1, 1), 1e6), torch.zeros(1, 1, 1)

    norms = []
    model = Fixed()
    step = torch.optim.Adam.step

    def spying(self, *args, **kwargs):
        norms.append(model.a.grad.abs().item())
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", spying)
        train_fixed_point(model, pairs, steps=2, clip_norm=0.5, progress=False)
    assert norms == pytest.approx([0.5, 0.5])


def test_a_loss_that_is_no_number_stops_the_training():
    with pytest.raises(RuntimeError, match=r"the loss is nan at step 0; lower learning_rate=0\.001"):
        train_denoiser(network(), lambda g: torch.full((1, 1, 8, 8), torch.nan), steps=3, progress=False)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"steps": -1}, "train_denoiser: steps must not be negative, got -1"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0, got 0.0"),
        ({"clip_norm": -1.0}, "clip_norm must be above 0"),
        ({"sigma": (0.2, 0.1)}, "sigma must be two numbers 0 <= low <= high"),
        ({"sigma": (-0.1, 0.1)}, "sigma must be two numbers 0 <= low <= high"),
        ({"sigma": (0.0, float("nan"))}, "sigma must be two numbers 0 <= low <= high"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        trained(**{"steps": 1, **settings})


def test_nothing_to_train():
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        train_denoiser(network().requires_grad_(False), make_batch, steps=1, progress=False)
