"""What the paper claims, measured: the experiments on small problems, the claims, the command."""

from __future__ import annotations

import csv
import math

import numpy as np
import pytest
import torch

from oder_fast import DEQRED, Picard
from oder_fast.cli import main
from oder_fast.data import cell_like, random_ellipses
from oder_fast.reproduce import EXPERIMENTS, Claim, Report, applications, cost, theory
from oder_fast.reproduce.report import power_law
from oder_fast.viz import new_figure


@pytest.fixture
def small(monkeypatch, one_thread):
    for name, value in {
        "SIZE": 12,
        "VIEWS": 20,
        "SIZES": (5, 10),
        "ITERATIONS": 1200,
        "BURN_IN": 100,
        "GRADIENTS": 12,
        "ADJOINT_ITERATIONS": 60,
        "OFFICIAL_ITERATIONS": 120,
        "RUNS": 5,
        "MINIBATCH": 10,
    }.items():
        monkeypatch.setattr(theory, name, value)


def test_dense_matrices_and_the_package_have_the_same_fixed_point_and_gradient(small):
    experiment = theory.Experiment()
    model, blur = experiment._model(None, 400)
    x = model(experiment.y, experiment.scans["uniform"])
    expected = experiment.theory.fixed_point
    assert (x[0] - expected).norm() < 1e-6 * expected.norm()
    (gradient,) = torch.autograd.grad((experiment.weights * x).sum(), blur.added)
    assert (gradient[0, 0] - experiment.theory.gradient).norm() < 1e-2 * gradient.norm()


def test_minibatches_of_all_views_have_no_floor(small):
    experiment = theory.Experiment()
    assert experiment.forward_floor(20, "uniform") < 1e-8
    assert experiment.gradient_floor(20, "stratified") < 1e-2 * experiment.theory.gradient.norm()


def test_the_floor_of_few_views_is_near_its_bound(small):
    experiment = theory.Experiment()
    for sampling in ("uniform", "stratified"):
        bound = experiment.theory.floor(experiment.theory.forward_deviations, 5, sampling)
        assert 0.7 * bound < experiment.forward_floor(5, sampling) < 1.1 * bound


def test_the_effective_size_counts_what_is_drawn_without_replacement():
    # The variance of a mean of w of b numbers without replacement, over all subsets of two of four.
    numbers = torch.tensor([1.0, 2.0, 4.0, 9.0], dtype=torch.float64)
    means = torch.combinations(numbers, 2).mean(1)
    population = (numbers - numbers.mean()).square().mean()
    assert float((means - numbers.mean()).square().mean()) == pytest.approx(
        float(population) / theory.effective(2, 4)
    )


def test_claims_hold_in_their_range_alone():
    assert Claim("a", 1.0, 1.0, 2.0).holds
    assert not Claim("a", 2.1, 1.0, 2.0).holds
    assert not Claim("a", math.nan).holds
    assert str(Claim("ratio", 0.5, 0.25)) == "PASS  ratio: 0.5 (at least 0.25)"
    assert str(Claim("ratio", 3.0, 1, 2)) == "FAIL  ratio: 3 (at least 1 and at most 2)"


def test_an_exponent_is_that_of_the_power_law():
    assert power_law([1, 4, 16], [3.0, 1.5, 0.75]) == pytest.approx(-0.5)


def test_the_command_writes_table_figure_and_lines(small, tmp_path, capsys, monkeypatch):
    for name, value in {"ITERATIONS": 300, "GRADIENTS": 2, "RUNS": 1}.items():
        monkeypatch.setattr(theory, name, value)
    status = main(["reproduce", "theory", "--output", str(tmp_path / "new")])
    lines = capsys.readouterr().out.splitlines()
    claims = [line for line in lines if line.startswith(("PASS  ", "FAIL  "))]
    assert len(claims) == 14
    assert status == int(any(line.startswith("FAIL") for line in claims))
    with (tmp_path / "new/theory.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["quantity"], r["sampling"], r["views"]) for r in rows] == [
        (q, s, n) for q in ("forward", "gradient") for s in ("uniform", "stratified") for n in ("5", "10")
    ]
    assert all(0 < float(r["floor"]) < 1 for r in rows)
    assert (tmp_path / "new/theory.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "new/theory.txt").read_text().splitlines() == lines[:-1]


def test_the_cost_of_gradients_and_solves_is_told(tmp_path, capsys, monkeypatch):
    small = {"SIZE": 32, "VIEWS": (20, 40), "REPEATS": 2, "WARM": 1, "MOST": 200}
    for name, value in small.items():
        monkeypatch.setattr(cost, name, value)
    status = main(["reproduce", "cost", "--output", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert [line[:6] in ("PASS  ", "FAIL  ") for line in lines[:4]] == [True] * 4
    assert status == int(any(line.startswith("FAIL") for line in lines))
    with (tmp_path / "cost.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["views"] for row in rows] == ["20", "40"]
    for row in rows:
        assert all(float(value) > 0 for value in row.values())
        calls = [float(row[f"{name}: denoiser_calls"]) for name in cost.SOLVES]
        # Counts, which no machine changes.
        assert calls[2] < min(calls[:2]) <= 200


def test_a_folder_that_cannot_be_made_is_told_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(EXPERIMENTS, "theory", None)
    (tmp_path / "file").touch()
    assert main(["reproduce", "theory", "--output", str(tmp_path / "file/folder")]) == 2
    assert "file/folder: Not a directory" in capsys.readouterr().err


def test_a_claim_that_does_not_hold_is_an_exit_status(tmp_path, monkeypatch):
    report = Report("theory", [{"a": 1}], [Claim("a", 2.0, high=1.0)], new_figure(1, 1))
    monkeypatch.setitem(EXPERIMENTS, "theory", lambda seed: report)
    assert main(["reproduce", "theory", "--output", str(tmp_path)]) == 1


# ------------------------------------------------------------------ the methods side by side


@pytest.fixture
def few(monkeypatch, one_thread):
    network = {"depth": 3, "width": 8, "bias": False}
    monkeypatch.setitem(applications.EFFORTS, "cpu", applications.Effort(network, (2, 2), (1, 2), 4, 16))
    for name, value in {
        "MOST_STEPS": 20,
        "TOLERANCE": 0.1,
        "OFFICIAL_STEPS": 5,
        "UNROLLED_STEPS": 2,
        "WEIGHTS": (1e-3, 1e-2),
        "TAUS": (1.0,),
        "ODER_TAUS": (1.0, 3.0),
    }.items():
        monkeypatch.setattr(applications, name, value)
    monkeypatch.setattr("oder_fast.training.report._curves", lambda *_: b"")


def write_images(folder, name):
    g = torch.Generator().manual_seed(0)
    shape, optics = (24, 24), applications.APPLICATIONS["idt"].operator
    draw = {
        "ct": lambda: random_ellipses(1, 24, g)[0],
        "mri": lambda: random_ellipses(1, 24, g)[0],
        "idt": lambda: cell_like(1, (len(optics["depths"]), *shape), g)[0],
    }[name]
    for part in ("train/a", "train/b", "validation/c", "test/one/d", "test/two/e", "test/two/f"):
        path = folder / f"{part}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, draw().numpy())
    return folder


@pytest.mark.parametrize(
    "name", ["ct", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("mri", "idt"))]
)
def test_all_methods_are_compared_on_images_of_a_folder(few, tmp_path, capsys, name):
    data = write_images(tmp_path / "data", name)
    status = main(["reproduce", name, "--data", str(data), "--output", str(tmp_path / "out")])
    out = capsys.readouterr().out
    assert status in (0, 1)
    assert out.count("PASS") + out.count("FAIL") == 6
    assert "3 test images of " in out
    with (tmp_path / "out" / f"{name}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["test"] for row in rows] == ["all"] * 10 + ["one"] * 10 + ["two"] * 10
    methods = [row["method"] for row in rows[:10]]
    assert len(set(methods)) == 10
    assert sum(method.startswith("ODER") for method in methods) == 3
    for row in rows:
        assert 0 < float(row["psnr"]) < 100
        assert float(row["denoiser_calls"]) >= 0
    # Means of patients go together to that of all.
    for a, one, two in zip(rows[:10], rows[10:20], rows[20:], strict=True):
        assert float(a["psnr"]) == pytest.approx((float(one["psnr"]) + 2 * float(two["psnr"])) / 3, abs=1e-3)
    # The same command finds the networks trained, and the numbers the same.
    main(["reproduce", name, "--data", str(data), "--output", str(tmp_path / "out")])
    with (tmp_path / "out" / f"{name}.csv").open(newline="") as file:
        again = list(csv.DictReader(file))
    assert [row["psnr"] for row in again] == [row["psnr"] for row in rows]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ct"], "ct needs --data FOLDER"),
        (["theory", "--data", "x"], "--data is not for theory"),
        (["ct", "--data", "missing"], "missing/validation: No such file or directory"),
    ],
)
def test_folders_are_asked_for_where_they_are_needed(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_solve_that_diverges_has_no_quality_and_is_not_chosen(few, tmp_path):
    data = write_images(tmp_path / "data", "ct")
    experiment = applications.Experiment("ct", data, tmp_path / "runs", "cpu", 0)
    expanding = applications.solving(
        DEQRED(lambda x: 30 * x + 1, tau=1.0, solver=Picard(200), on_failure="ignore")
    )
    score, image = experiment.reconstruct(experiment.test[0], expanding)
    assert math.isnan(score.psnr)
    assert image.isnan().all()
    direct = next(iter(experiment.application.direct.values()))
    assert experiment._best({"expanding": expanding, "direct": direct})[0] == "direct"
    scores = {name: [score] for name in (applications.SMOOTH, applications.DENOISED, applications.PROXIMAL)}
    scores |= {"direct": [score], applications.GRADIENT: [score], experiment.oder("1/3"): [score]}
    assert not any(claim.holds for claim in applications._claims(scores, experiment))


def test_images_of_another_kind_are_refused(few, tmp_path, capsys):
    data = write_images(tmp_path / "data", "idt")
    assert main(["reproduce", "ct", "--data", str(data), "--output", str(tmp_path / "out")]) == 2
    assert "takes real images" in capsys.readouterr().err


def test_small_scans_have_the_artefacts_of_whole_ones():
    operator, tau = applications.APPLICATIONS["ct"].of_size(0.25)
    assert operator["angles"] == applications.APPLICATIONS["ct"].operator["angles"] // 4
    assert tau == 4 * applications.APPLICATIONS["ct"].tau
    assert applications.APPLICATIONS["mri"].of_size(0.25)[1] == applications.APPLICATIONS["mri"].tau
