"""Configurations: what is read, and what is refused with which words."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from oder_fast.training import ConfigurationError, Trainer, l1_loss, mse_loss, read_configuration, ssim_loss
from oder_fast.training.configuration import CT, IDT, MRI, differences
from oder_fast.training.losses import total_loss
from oder_fast.training.scans import make_scan

LEAST = {"operator": {"kind": "ct"}, "data": {"phantoms": {"kind": "ellipses"}}}
LENSES = {
    "depths": [0, 2.5],
    "rings": [[8, 0.5]],
    "pixel_size": 0.2,
    "wavelength": 0.5,
    "numerical_aperture": 0.6,
    "medium_index": 1.33,
}


def test_defaults_are_those_of_the_paper_s_code():
    read = read_configuration(LEAST)
    assert read.operator == CT(angles=90, snr=50.0)
    assert (read.red.step, read.red.tau) == ("proximal", 0.002)
    assert read.training.learning_rate == read.pretraining.learning_rate == 1e-4
    assert read.pretraining.sigma == pytest.approx(5 / 255)
    assert read.training.loss == {"mse": 1.0}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.yaml", "operator: {kind: ct, angles: 30}\ndata:\n  phantoms: {kind: ellipses}\ntraining: {learning_rate: 1e-3}\n"),
        ("a.toml", '[operator]\nkind = "ct"\nangles = 30\n[data.phantoms]\nkind = "ellipses"\n[training]\nlearning_rate = 1e-3\n'),
    ],
)  # fmt: skip
def test_files(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    read = read_configuration(path)
    assert read.operator.angles == 30
    assert read.training.learning_rate == 1e-3
    assert read_configuration(path, ["operator.angles=[0, 0.5]"]).operator.angles == [0.0, 0.5]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "operator: [", "a.yaml: not YAML"),
        ("a.toml", "operator = [", "a.toml: not TOML"),
        ("a.json", "{}", "must end in .yaml, .yml or .toml"),
        ("a.yaml", "- 1", "must hold settings by name, got list"),
        ("a.yaml", "", "must hold settings by name, got NoneType"),
        ("a.yaml", "operator: {kind: ct}", "a.yaml: missing key data"),
        ("a.yaml", "data: {phantoms: {kind: cells}}", "a.yaml: missing key operator"),
    ],
)
def test_files_that_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigurationError, match=message):
        read_configuration(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_configuration(tmp_path / "missing.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.lerning_rate=1", "unknown key training.lerning_rate; did you mean learning_rate"),
        ("operator.angels=3", "unknown key operator.angels; did you mean angles"),
        ("trainig.steps=3", "unknown key trainig; did you mean training"),
        ("data.phantoms.kid=3", "unknown key data.phantoms.kid; did you mean kind"),
        ("xyz=3", "unknown key xyz$"),
        ("training.steps=-1", "training.steps: input should be greater than or equal to 0, got -1"),
        ("training.steps=2.5", "training.steps: input should be a valid integer.*got 2.5"),
        ("training.learning_rate=.inf", "training.learning_rate: input should be a finite number, got inf"),
        ("red.tau=.nan", "red.tau: input should be a finite number, got nan"),
        ("denoiser=3", "denoiser: must hold settings by name, got 3"),
        (
            "training.loss=mae",
            "training.loss.mae: input should be 'mse', 'l1', 'ssim', 'splitting', 'sure' or 'contraction'",
        ),
        ("operator.kind=pet", "operator.kind: must be ct, mri or idt, got 'pet'"),
        ("training.loss={}", "training.loss: "),
        ("pretraining.sigma=[0.1, 0.05]", "sigma must be the least and then the largest"),
        ("seed=abc", "seed: input should be a valid integer"),
        ("data.train=folder", "data: needs either train .files. or phantoms"),
        ("data={}", "data: needs either train .files. or phantoms"),
        ("data={train: a, kspace: true, patch: 3}", "k-space cannot be cut into patches"),
        ("red.tau=0", "red.tau: input should be greater than 0, got 0"),
        ("red.cuda_graph=true", "unknown key red.cuda_graph"),
        ("red.step_sise=0.1", "unknown key red.step_sise; did you mean step_size"),
        ("red.step_size=0.1", "red: step_size is for step: gradient, got step: proximal"),
        ("red.variance_reduction=true", "red: variance_reduction is for step: gradient"),
        (
            "red={differentiation: unrolled, adjoint_tolerance: 1e-2}",
            "adjoint_tolerance is for differentiation: implicit",
        ),
        (
            "red={step: gradient, minibatch_size: 3, solver: anderson}",
            "anderson takes no minibatches of gradient steps",
        ),
        ("data={train: a, kspace: true, select: {echo: 1}}", "select takes .*contrast.*, got 'echo'"),
        ("data={train: a, kspace: true, select: {contrast: -1}}", "data.select.contrast: input should be gr"),
        ("data={train: a, select: {contrast: 1}}", "select is for k-space; set kspace: true"),
        ("training", "'training' must be written key=value"),
        ("training.steps=[", "not a YAML value"),
    ],
)
def test_what_is_refused(override, message):
    with pytest.raises(ConfigurationError, match=message):
        read_configuration(LEAST, [override])


LAUGHS = "a0: &a0 [x, x, x]\n" + "".join(
    f"a{k + 1}: &a{k + 1} [{', '.join([f'*a{k}'] * 9)}]\n" for k in range(12)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2", "not YAML: line 2: seed is set twice"),
        ("data: {workers: 1, 'workers': 2}", "line 1: workers is set twice"),
        (LAUGHS, "must hold at most 100000 values, at most 32 deep"),
        ("operator: &a [*a]", "must hold at most 100000 values, at most 32 deep"),
        ("&a {operator: *a}", "must hold at most 100000 values, at most 32 deep"),
        (f"a: {{{', '.join(f'k{k}: 1' for k in range(1001))}}}", "line 1: over 1000 keys"),
        ("[" * 2000, "not YAML: maximum recursion depth"),
        ("seed: " + "1" * 5000, "not YAML: Exceeds the limit"),
        ("seed: " + "1" * 30, "holds a whole number of more than 64 bits"),
        ("seed: 2020-13-45", "not YAML: month must be in 1..12"),
        ("a: \0", "not YAML: unacceptable character"),
        ("a: !!python/object/apply:os.system [ls]", "line 1: could not determine a constructor"),
        (b"a: h\xe9las", "not YAML: 'utf-8' codec"),
    ],
)
def test_yaml_that_is_refused_in_a_sentence(tmp_path, text, message):
    (tmp_path / "a.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigurationError, match=message) as caught:
        read_configuration(tmp_path / "a.yaml")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_yaml_with_keys_that_are_merged(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "operator: {kind: ct}\ndata: {phantoms: {kind: ellipses}}\n"
        "pretraining: &stage {steps: 3, batch_size: 2}\ntraining: {<<: *stage, steps: 4}\n"
    )
    read = read_configuration(tmp_path / "a.yaml")
    assert (read.training.steps, read.training.batch_size) == (4, 2)


@pytest.mark.parametrize(
    "override",
    [
        "operator.angles=65537",
        "operator.angles=[]",
        "operator.n_bins=65537",
        "operator.snr=1000",
        "operator={kind: mri, coils: 1025}",
        "operator={kind: mri, spokes: 65537}",
        "data.phantoms.size=16385",
        "data.phantoms.n=1000001",
        "data.patch=16385",
        "data.workers=1025",
        "denoiser={kind: dncnn, options: {depth: 257}}",
        "denoiser={kind: unet, options: {channels: [4, 8192]}}",
        "denoiser={kind: drunet, options: {blocks: 65}}",
        "denoiser={kind: drunet, options: {channels: [4, 4, 4, 4, 4, 4, 4, 4, 4]}}",
        "red.minibatch_size=65537",
        "red.max_iterations=100001",
        "red.adjoint_iterations=100001",
        "training.steps=1000000001",
        "training.batch_size=65537",
        "validation.images=101",
        "checkpoints.keep=10001",
        "threads=1025",
        "timeout=1e300",
        "output=''",
        'output="a\\0b"',
        "data.cache=''",
        "denoiser.weights=''",
    ],
)
def test_numbers_and_names_have_bounds(override):
    with pytest.raises(ConfigurationError):
        read_configuration(LEAST, [override])


def test_a_long_list_of_mistakes_is_cut_short():
    with pytest.raises(ConfigurationError) as caught:
        read_configuration(LEAST | {f"x{k}": 1 for k in range(100)})
    assert str(caught.value).endswith("and 80 more")


def test_sizes_that_come_of_several_settings():
    with pytest.raises(ValueError, match=r"CT: sinograms \(V, D\): must have at most 2147483648 values"):
        make_scan(CT(bin_spacing=1e-9)).operator((16, 16))
    with pytest.raises(ValueError, match=r"MRI: coil maps \(C, H, W\): must have"):
        make_scan(MRI(coils=1024)).operator((2**14, 2**14))
    with pytest.raises(ValueError, match=r"IDT: transfer functions \(L, Z, H, W\): must have"):
        make_scan(IDT(**LENSES)).operator((2, 2**14, 2**14))


def test_all_mistakes_are_told_at_once_and_the_caller_s_tree_stays():
    tree = {"operator": {"kind": "ct"}, "data": {"phantoms": {"kind": "ellipses"}}}
    with pytest.raises(ConfigurationError) as caught:
        read_configuration(tree, ["training.stepps=3", "red.taau=3"])
    assert str(caught.value).count("unknown key") == 2
    assert tree == LEAST


def test_kinds_of_operators():
    assert read_configuration(LEAST, ["operator={kind: mri}"]).operator == MRI()
    assert read_configuration(LEAST | {"operator": {"kind": "idt", **LENSES}}).operator == IDT(**LENSES)
    with pytest.raises(ConfigurationError, match=r"missing key operator\.depths"):
        read_configuration(LEAST, ["operator={kind: idt}"])


def test_the_configurations_of_the_documentation():
    import yaml

    page = Path(__file__).parents[1] / "docs" / "training.md"
    if not page.exists():
        pytest.skip("no documentation beside the tests")
    blocks = re.findall(r"```yaml\n(.*?)```", page.read_text(), re.S)
    assert {read_configuration(yaml.safe_load(block)).operator.kind for block in blocks} == {
        "ct",
        "mri",
        "idt",
    }


def test_differences_between_runs():
    one = read_configuration(LEAST)
    assert (
        differences(one, read_configuration(LEAST, ["output=a", "training.steps=3", "checkpoints.every=3"]))
        == []
    )
    other = read_configuration(LEAST, ["seed=4", "operator.angles=3"])
    assert differences(one, other) == ["operator.angles was 90 and is 3", "seed was 0 and is 4"]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_what_is_read_can_be_written_and_read_again():
    one = read_configuration(LEAST, ["training.loss={l1: 1, ssim: 0.2}", "pretraining.sigma=[0, 0.1]"])
    assert read_configuration(one.model_dump(mode="json")) == one


# ------------------------------------------------------------------ losses


def pair(dtype, seed=0, shape=(2, 20, 24)):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=g, dtype=dtype) for _ in range(2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_losses_against_numpy(dtype):
    x, y = pair(dtype)
    difference = (x - y).numpy()
    assert mse_loss(x, y).item() == pytest.approx((abs(difference) ** 2).mean())
    assert l1_loss(x, y).item() == pytest.approx(abs(difference).mean())
    for name in ("mse", "l1", "ssim"):
        assert total_loss({name: 1.0}, y, y).item() == pytest.approx(0, abs=1e-12)
        # One column more than the window of structural similarity is wide.
        truth = y[:, :11, :12]
        start = (truth + 0.1).detach().requires_grad_()
        assert torch.autograd.gradcheck(lambda v, n=name, y=truth: total_loss({n: 2.0}, v, y), (start,))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_ssim_against_scikit_image(dtype):
    from skimage.metrics import structural_similarity

    x, y = pair(dtype, shape=(1, 33, 40))
    a, b = (v.abs() if v.is_complex() else v for v in (x, y))
    span = float(b.max() - b.min())
    expected, full = structural_similarity(
        b[0].numpy(), a[0].numpy(), data_range=span, gaussian_weights=True, sigma=1.5,
        use_sample_covariance=False, full=True, truncate=10 / 3,
    )  # fmt: skip
    # Both leave out the edges, where the window does not fit.
    assert full.shape == (33, 40)
    assert 1 - ssim_loss(x, y).item() == pytest.approx(expected, abs=1e-6)


def test_gradients_of_zero_images_are_finite():
    for dtype in (torch.float32, torch.complex64):
        truth, image = (
            torch.zeros(1, 16, 16, dtype=dtype),
            torch.zeros(1, 16, 16, dtype=dtype, requires_grad=True),
        )
        total_loss({"mse": 1, "l1": 1, "ssim": 1}, image, truth).backward()
        assert (
            torch.view_as_real(image.grad).isfinite().all()
            if dtype.is_complex
            else image.grad.isfinite().all()
        )


def test_ssim_of_truths_with_a_small_range():
    g = torch.Generator().manual_seed(0)
    for span in (1e-2, 1e-3, 1e-4, 1e-5):
        truth = 0.5 + span * torch.rand(1, 32, 32, generator=g)
        image = truth + 0.3 * span * torch.randn(1, 32, 32, generator=g)
        found = []
        for dtype in (torch.float32, torch.float64):
            leaf = image.to(dtype).detach().requires_grad_()
            loss = ssim_loss(leaf, truth.to(dtype))
            loss.backward()
            found.append((loss.item(), leaf.grad.double()))
        assert found[0][0] == pytest.approx(found[1][0], abs=2e-2)
        assert torch.nn.functional.cosine_similarity(*(g.flatten() for _, g in found), dim=0) > 0.99


def test_numbers_without_a_point():
    read = read_configuration(LEAST, ["training.steps=1e3", "training.learning_rate=2e-4"])
    assert (read.training.steps, read.training.learning_rate) == (1000, 2e-4)


def test_losses_that_are_refused():
    x = torch.zeros(1, 8, 8)
    with pytest.raises(ValueError, match=r"image must have the shape of truth, \(1, 8, 9\), got \(1, 8, 8\)"):
        total_loss({"mse": 1}, x, torch.zeros(1, 8, 9))
    with pytest.raises(TypeError, match="both be real or both complex"):
        total_loss({"mse": 1}, x, x.to(torch.complex64))
    with pytest.raises(ValueError, match="at least 11 rows and columns"):
        ssim_loss(x, x)


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[1] / "examples").glob("*.yaml")), ids=lambda p: p.name
)
def test_examples_are_configurations(path, tmp_path):
    configuration = read_configuration(path, [f"output={tmp_path / 'run'}"])
    assert configuration.training.steps > 0
    # All that is checked before anything long starts.
    Trainer(configuration, progress=False)
