"""Every registered operator on every backend that runs here: values, gradients, transposes, strides, registration."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, TOLERANCE, VIEWS, dot_test, relative_error, viewed
from torch import Tensor
from torch.autograd import forward_ad

ALL = [
    pytest.param(case, shape, id=f"{case.name}-{k}")
    for case in CASES
    for k, shape in enumerate((*case.shapes, *case.large))
]
FIRST = [pytest.param(case, case.shapes[2], id=case.name) for case in CASES]


def slow(suffix):
    """All of them; the first tier takes one of each stem, whose code the others share."""
    first = ("red_update", *(case.name for case in CASES if case.name.endswith(suffix)))
    marks = [[] if case.name in first else [pytest.mark.exhaustive] for case in CASES]
    cases = [pytest.param(c, c.shapes[2], id=c.name, marks=m) for c, m in zip(CASES, marks, strict=True)]
    return pytest.mark.parametrize(("case", "shape"), cases)


def results(value) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def widen(value):
    """To the dtype in which the reference defines the result."""
    if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
        return value
    return value.to(torch.complex128 if value.is_complex() else torch.float64)


def dtypes_of(case, build):
    return [d for d in build.dtypes if case.takes(d)]


@pytest.mark.parametrize(("case", "shape"), ALL)
def test_values_equal_the_reference(case, shape, fastest, generator):
    build = fastest
    for dtype in dtypes_of(case, build):
        args, options = case.make_inputs(shape, dtype, build.device, generator)
        got = results(case.function(*args, **options, backend=build.backend))
        wide = {k: widen(v) for k, v in options.items()}
        expected = results(case.function(*map(widen, args), **wide, backend="reference"))
        for one, other in zip(got, expected, strict=True):
            assert relative_error(one, other) < TOLERANCE[dtype], dtype


@pytest.mark.parametrize(("case", "shape"), FIRST)
def test_gradients_equal_those_of_the_reference(case, shape, build, generator):
    for dtype in dtypes_of(case, build):
        args, options = case.make_inputs(shape, dtype, build.device, generator)

        def gradients(args, options, backend, case=case):
            args = [
                a.detach().requires_grad_() if k in case.differentiable else a for k, a in enumerate(args)
            ]
            if options.get("previous") is not None:
                options = options | {"previous": options["previous"].detach().requires_grad_()}
            out = results(case.function(*args, **options, backend=backend))[:2]
            # Sums arrive as expanded gradients, the second result with weights of its own.
            loss = sum(
                (k + 1) * (o.abs().square() if o.is_complex() else o.square()).sum()
                for k, o in enumerate(out)
            )
            inputs = [args[k] for k in case.differentiable]
            if options.get("previous") is not None:
                inputs.append(options["previous"])
            return torch.autograd.grad(loss + out[0].real.sum(), inputs)

        got = gradients(args, options, build.backend)
        wide = {k: widen(v) for k, v in options.items()}
        expected = gradients([widen(a) for a in args], wide, "reference")
        for one, other in zip(got, expected, strict=True):
            assert relative_error(one, other) < 20 * TOLERANCE[dtype], dtype


@pytest.mark.parametrize(("case", "shape"), [p for p in ALL if p.values[0].adjoint is not None])
def test_adjoint_is_the_exact_transpose(case, shape, build, generator):
    for dtype in dtypes_of(case, build):
        (x, *rest), options = case.make_inputs(shape, dtype, build.device, generator)
        options["backend"] = build.backend
        out = case.function(x, *rest, **options)
        y = torch.randn(out.shape, dtype=widen(out.cpu()).dtype, generator=generator).to(out)
        error = dot_test(
            lambda v: case.function(v, *rest, **options), case.adjoint(x, *rest, **options), x, y
        )
        assert error < TOLERANCE[dtype], dtype


def plain(value):
    """A copy in memory of its own, in order."""
    if not isinstance(value, Tensor):
        return value
    return value.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)


def real_inner(a, b):
    return sum((x.conj() * y).real.sum() for x, y in zip(a, b, strict=True))


# Of torch's own forward-mode derivatives.
@pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")
@pytest.mark.parametrize(("case", "shape"), FIRST)
def test_transforms_of_torch_func(case, shape, build, generator):
    args, options = case.make_inputs(shape, case.dtype, build.device, generator)
    options["backend"] = build.backend
    inputs = tuple(args[k] for k in case.differentiable)

    def function(*inputs):
        full = list(args)
        for k, value in zip(case.differentiable, inputs, strict=True):
            full[k] = value
        # The last result of red_update has no derivative.
        return tuple(results(case.function(*full, **options))[:2])

    def random(values):
        return tuple(torch.randn(v.shape, dtype=v.dtype, generator=generator).to(v) for v in values)

    values = function(*inputs)
    weights, tangents = random(values), random(inputs)
    outputs, vjp = torch.func.vjp(function, *inputs)
    again, along = torch.func.jvp(function, inputs, tangents)
    for one, other, third in zip(values, outputs, again, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, third)
    gradients = vjp(weights)
    leaves = tuple(v.detach().requires_grad_() for v in inputs)
    expected = torch.autograd.grad(function(*leaves), leaves, weights)
    for one, other in zip(gradients, expected, strict=True):
        assert relative_error(one, other) < 1e-6
    size = sum(float(a.norm()) * float(w.norm()) for a, w in zip(along, weights, strict=True))
    assert abs(real_inner(along, weights) - real_inner(tangents, gradients)) < 1e-5 * size
    # Forward-mode derivatives without a transform.
    with forward_ad.dual_level():
        duals = function(*(forward_ad.make_dual(v, t) for v, t in zip(inputs, tangents, strict=True)))
        for dual, tangent in zip(duals, along, strict=True):
            assert relative_error(forward_ad.unpack_dual(dual).tangent, tangent) < 1e-6
    # Several at once, of a gradient too; along another axis, and of the first argument alone.
    first, *rest = inputs
    many = torch.stack((first, tangents[0]), -1)
    gradient = lambda x: torch.func.vjp(lambda v: function(v, *rest), x)[1](weights)[0]  # noqa: E731
    for f in (lambda x: function(x, *rest)[0], gradient):
        got = torch.func.vmap(f, in_dims=-1)(many)
        for k, one in enumerate((first, tangents[0])):
            assert relative_error(got[k], f(one)) < 1e-6
    # Twice differentiated.
    energy = lambda x: sum(v.abs().square().sum() for v in function(x, *rest))  # noqa: E731
    if not first.is_complex():
        _, curvature = torch.func.jvp(torch.func.grad(energy), (first,), (tangents[0],))
        _, moved = torch.func.jvp(lambda x: function(x, *rest), (first,), (tangents[0],))
        twice = 2 * real_inner(moved, moved)
        assert abs((curvature * tangents[0]).sum() - twice) < 1e-5 * twice


@pytest.mark.parametrize(("case", "shape"), FIRST)
def test_any_view_of_memory_is_taken(case, shape, build, generator):
    made, others = case.make_inputs(shape, case.dtype, build.device, generator)
    for name, view in VIEWS.items():
        args = [viewed(view, a) for a in made]
        options = {k: viewed(view, v) for k, v in others.items()}
        dense = [plain(a) for a in args], {k: plain(v) for k, v in options.items()}
        for backend in (build.backend, "reference"):
            got = results(case.function(*args, **options, backend=backend))
            expected = results(case.function(*dense[0], **dense[1], backend=backend))
            for one, other in zip(got, expected, strict=True):
                assert relative_error(one, other) <= TOLERANCE[case.dtype], (name, backend)


@pytest.mark.parametrize(("case", "shape"), FIRST)
def test_gradients_may_arrive_as_any_view_of_memory(case, shape, build, generator):
    args, options = case.make_inputs(shape, case.dtype, build.device, generator)
    inputs = [args[k].requires_grad_() for k in case.differentiable if args[k].ndim]
    out = results(case.function(*args, **options, backend=build.backend))[:2]
    grads = [torch.randn(o.shape, dtype=o.dtype, device=o.device) for o in out]
    for name, view in VIEWS.items():
        arriving = [viewed(view, g) for g in grads]
        got = torch.autograd.grad(out, inputs, arriving, retain_graph=True)
        expected = torch.autograd.grad(out, inputs, list(map(plain, arriving)), retain_graph=True)
        for one, other in zip(got, expected, strict=True):
            assert relative_error(one, other) <= TOLERANCE[case.dtype], name


@pytest.mark.parametrize(("case", "shape"), FIRST)
def test_empty_batch_gives_an_empty_result(case, shape, build, generator):
    empty = dict(shape, image=(0, *shape["image"][1:]))
    args, options = case.make_inputs(empty, case.dtype, build.device, generator)
    for result in results(case.function(*args, **options, backend=build.backend)):
        assert result.shape[0] == 0


@slow("_gradient")
def test_gradcheck_and_gradgradcheck(case, shape, generator):
    for dtype in filter(case.takes, (torch.float64, torch.complex128)):
        args, options = case.make_inputs(case.tiny, dtype, "cpu", generator)
        inputs = tuple(args[k].clone().requires_grad_() for k in case.differentiable)

        def call(*inputs, case=case, args=args, options=options):
            full = list(args)
            for k, value in zip(case.differentiable, inputs, strict=True):
                full[k] = value
            return tuple(results(case.function(*full, **options, backend="cpu"))[:2])

        assert torch.autograd.gradcheck(call, inputs)
        assert torch.autograd.gradgradcheck(call, inputs)


@slow("_forward")
def test_opcheck(case, shape, generator):
    args, options = case.make_inputs(shape, case.dtype, "cpu", generator)
    calls = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "oder_fast":
                calls.append((function, args, kwargs or {}))
            return function(*args, **(kwargs or {}))

    with Spy():
        case.function(*args, **options, backend="cpu")
    assert calls
    for function, inner, named in calls:
        floats = [
            a.clone().requires_grad_()
            if isinstance(a, Tensor) and (a.is_floating_point() or a.is_complex())
            else a
            for a in inner
        ]
        # What describes the scan, and momentum, are not differentiated.
        for k, argument in enumerate(function._schema.arguments):
            if (
                argument.name in ("angles", "coil_maps", "transfer", "depths", "auto", "pairs", "momentum")
                and floats[k] is not None
            ):
                floats[k] = floats[k].detach()
        torch.library.opcheck(function, tuple(floats), named)


@slow("_forward")
def test_compiles_without_a_graph_break(case, shape, generator):
    args, options = case.make_inputs(shape, case.dtype, "cpu", generator)

    def call(*args):
        return tuple(results(case.function(*args, **options, backend="cpu")))

    # All cases share the code of `call`, and a function is compiled only so often.
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for one, other in zip(compiled(*args), call(*args), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_bits_do_not_depend_on_the_number_of_threads(case, fastest, generator):
    build = fastest
    threads = torch.get_num_threads()
    for shape in case.large:
        args, options = case.make_inputs(shape, case.dtype, build.device, generator)
        try:
            runs = []
            for n in (1, 2, 3):
                torch.set_num_threads(n)
                runs.append(results(case.function(*args, **options, backend=build.backend)))
        finally:
            torch.set_num_threads(threads)
        for run in runs[1:]:
            for one, other in zip(run, runs[0], strict=True):
                assert torch.equal(one, other)
