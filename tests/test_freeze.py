"""`frozen`: one map for each solve, whatever happens to the module meanwhile."""

import copy
import functools
import itertools
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, parametrize, prune

from oder_fast.denoisers import AtNoiseLevel, DnCNN, UNet, frozen
from oder_fast.deqred import DEQRED
from oder_fast.fixed_point import Implicit, JacobianFree, Picard, Unrolled
from oder_fast.operators import ParallelBeamCT

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.(spectral|weight)_norm` is deprecated:FutureWarning"),
    # Solves and adjoint solves of a few iterations are compared.
    pytest.mark.filterwarnings("ignore::oder_fast.NotConvergedWarning"),
]

SMALL = (4, 8)
CT = ParallelBeamCT(16, 12)
DIFFERENTIATIONS = [Implicit(), JacobianFree(), Unrolled()]


class Changing(nn.Module):
    """Every layer whose map depends on the training flag or changes with each call."""

    def __init__(self):
        super().__init__()
        self.new = parametrizations.spectral_norm(nn.Conv2d(1, 4, 3, padding=1))
        self.batch = nn.BatchNorm2d(4)
        self.instance = nn.InstanceNorm2d(4, track_running_stats=True)
        self.drop = nn.Dropout2d(0.5)
        self.alpha = nn.AlphaDropout(0.5)
        self.noisy = nn.RReLU()
        self.legacy = nn.utils.spectral_norm(nn.Conv2d(4, 2, 3, padding=1))

    def forward(self, x):
        x = self.instance(self.batch(self.new(x)))
        return self.legacy(self.noisy(self.alpha(self.drop(x))))


class Noisy(nn.Module):
    """Dropout and a spectral norm, which a subclass calls in a way of its own."""

    def __init__(self):
        super().__init__()
        self.conv = parametrizations.spectral_norm(nn.Conv2d(1, 1, 3, padding=1))
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.conv(x))


@pytest.fixture
def changing():
    torch.manual_seed(0)
    return Changing()


@pytest.fixture
def noisy():
    torch.manual_seed(0)
    return Noisy()


@pytest.fixture
def image():
    return torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(0))


def flags(module):
    return [m.training for m in module.modules()]


def model_of(denoiser, **options):
    settings = {"tau": 0.05, "solver": Picard(6, 1e-12), "on_failure": "ignore", **options}
    return DEQRED(denoiser, **settings)


def data():
    return CT(torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(0)))


def gradients(model, y):
    model.zero_grad()
    model(y, CT).square().sum().backward()
    return [p.grad.clone() for p in model.parameters()]


# ------------------------------------------------------------------ one map


@pytest.mark.parametrize("training", [True, False])
def test_frozen_gives_one_map_and_leaves_the_network_as_it_was(changing, image, training):
    changing(image)
    changing.train(training)
    before = flags(changing)
    with frozen(changing) as fixed:
        state = copy.deepcopy(changing.state_dict())
        assert torch.equal(fixed(image), fixed(image))
        assert flags(changing) == before
    assert all(torch.equal(state[key], value) for key, value in changing.state_dict().items())
    torch.testing.assert_close(fixed(image), changing.eval()(image))


def test_only_what_changes_is_switched_off(changing):
    changing.add_module("plain", nn.Conv2d(1, 1, 1))
    with frozen(changing) as fixed:
        assert fixed.training
        assert fixed.plain.training
        assert not any(m.training for m in (fixed.batch, fixed.drop, fixed.alpha, fixed.noisy, fixed.legacy))


@pytest.mark.parametrize("name", ["new", "legacy"])
def test_a_spectral_norm_takes_the_power_iteration_of_one_forward_pass(changing, name):
    twin = copy.deepcopy(changing)
    layer = getattr(changing, name)
    getattr(twin, name)(torch.zeros(1, layer.in_channels, 3, 3))
    start = copy.deepcopy(layer.state_dict())
    with frozen(changing) as fixed, frozen(fixed) as again:
        assert torch.equal(again.new.weight, fixed.new.weight)
    vectors = [key for key in start if key.endswith(("_u", "_v"))]
    assert len(vectors) == 2
    for key in vectors:
        assert not torch.equal(layer.state_dict()[key], start[key])
        torch.testing.assert_close(layer.state_dict()[key], getattr(twin, name).state_dict()[key])


def test_a_network_that_cannot_change_is_given_itself():
    denoiser = DnCNN(depth=3, width=4)
    with frozen(denoiser) as fixed:
        assert fixed is denoiser


def pruned(conv):
    prune.l1_unstructured(conv, "weight", amount=0.5)
    return conv


@pytest.mark.parametrize(
    "computed",
    [
        parametrizations.spectral_norm,
        parametrizations.weight_norm,
        parametrizations.orthogonal,
        nn.utils.spectral_norm,
        nn.utils.weight_norm,
        pruned,
        lambda conv: parametrizations.spectral_norm(parametrizations.weight_norm(conv)),
    ],
)
def test_a_computed_weight_is_computed_once_with_its_graph(computed, image):
    torch.manual_seed(0)
    layer = computed(nn.Conv2d(1, 2, 3)).eval()
    expected = layer(image)
    wanted = torch.autograd.grad(expected.square().sum(), list(layer.parameters()))
    with frozen(layer) as fixed:
        with torch.no_grad():
            assert torch.equal(fixed(image), expected)
        weight = fixed.weight
        output = fixed(image)
        assert fixed.weight is weight
    gradient = torch.autograd.grad(output.square().sum(), list(layer.parameters()))
    torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("differentiation", DIFFERENTIATIONS)
@pytest.mark.parametrize(
    "computed",
    [
        parametrizations.spectral_norm,
        pytest.param(nn.utils.spectral_norm, marks=pytest.mark.exhaustive),
    ],
)
def test_a_power_iteration_leaves_the_graphs_of_earlier_solves(computed, differentiation):
    torch.manual_seed(0)
    model, y = model_of(computed(nn.Conv2d(1, 1, 3, padding=1)), differentiation=differentiation), data()
    first = model(y, CT)
    expected = torch.autograd.grad(first.square().sum(), list(model.parameters()), retain_graph=True)
    model(y, CT)
    found = torch.autograd.grad(first.square().sum(), list(model.parameters()))
    torch.testing.assert_close(found, expected)


# ------------------------------------------------------------------ what else a module may do


def test_hooks_and_weights_shared_between_layers_stay(image):
    class Tied(Noisy):
        def __init__(self):
            super().__init__()
            self.twin = self.conv
            self.other = nn.Conv2d(1, 1, 3, padding=1)
            self.other.bias = self.conv.bias

        def forward(self, x):
            return super().forward(self.other(self.twin(x)))

    tied, seen = Tied(), []
    with frozen(tied) as fixed:
        assert fixed.twin is fixed.conv
        assert fixed.other.weight is tied.other.weight
        assert fixed.other.bias is fixed.conv.bias
        handle = tied.conv.register_forward_hook(lambda *_: seen.append(1))
        fixed(image)
        assert len(seen) == 2
        handle.remove()
        fixed(image)
        assert len(seen) == 2


class InList(Noisy):
    def __init__(self):
        super().__init__()
        self.layers = [self.conv, {"last": (self.drop,)}]

    def forward(self, x):
        return self.layers[1]["last"][0](self.layers[0](x))


class ByMethod(Noisy):
    def __init__(self):
        super().__init__()
        self.call = functools.partial(self.denoise, scale=2)

    def denoise(self, x, scale):
        return self.drop(self.conv(x)) * scale

    def forward(self, x):
        return self.call(x)


class ByClosure(Noisy):
    def __init__(self):
        super().__init__()
        self.call = lambda x, drop=self.drop: drop(self.conv(x))

    def forward(self, x):
        return self.call(x)


class ByParent(Noisy):
    """The child calls its parent's layers; a weak reference keeps it out of the parent's own tree."""

    def __init__(self):
        super().__init__()
        self.child = nn.Identity()
        self.child.parent = weakref.ref(self)
        self.child.also = [self]

    def forward(self, x):
        assert self.child.also == [self]
        return self.child.parent().drop(self.conv(x))


class ByHook(Noisy):
    """The hook stores what the forward pass reads."""

    def __init__(self):
        super().__init__()
        self.drop.register_forward_hook(self.store)
        self.conv.register_forward_pre_hook(lambda module, args: setattr(self, "input", args[0]))

    def store(self, module, args, output):
        self.features = output

    def forward(self, x):
        super().forward(x)
        return self.features + self.input


@pytest.mark.parametrize("kind", [InList, ByMethod, ByClosure, ByParent, ByHook])
def test_layers_are_frozen_however_they_are_reached(kind, image):
    torch.manual_seed(0)
    denoiser = kind()
    with frozen(denoiser) as fixed:
        first = fixed(image)
        with torch.no_grad():
            denoiser.conv.bias += 1
        torch.testing.assert_close(fixed(image), denoiser.eval()(image))
        assert not torch.equal(first, fixed(image))


class Pipeline:
    """Not a module, but holds one."""

    def __init__(self, network):
        self.network = network
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        return self.network(x)

    def denoise(self, x):
        return self(x)


def closure(network):
    return lambda x: network(x)


@pytest.mark.parametrize(
    "wrap",
    [
        closure,
        Pipeline,
        lambda network: Pipeline(network).denoise,
        lambda network: network.forward,
        lambda network: functools.partial(network),
        lambda network: AtNoiseLevel(lambda x, sigma: network(x), 0.1),
    ],
)
def test_callables_that_hold_a_module_are_frozen(wrap, noisy, image):
    denoiser = wrap(noisy)
    with frozen(denoiser) as fixed:
        assert torch.equal(fixed(image), fixed(image))
        output = fixed(image)
    torch.testing.assert_close(output, noisy.eval()(image))
    if isinstance(denoiser, Pipeline):
        assert denoiser.calls == 3


def test_attributes_that_modules_set_arrive_in_the_denoiser(image):
    class Stateful(Noisy):
        calls = 0

        def forward(self, x):
            self.calls += 1
            if not hasattr(self, "layers"):
                self.layers = list(self.children())
                self.scale = nn.Conv2d(1, 1, 1)
                self.offset = None
            elif hasattr(self, "offset"):
                del self.offset
            return self.scale(self.layers[1](self.layers[0](x)))

    stateful = Stateful()
    stateful.offset = 1
    with frozen(stateful) as fixed:
        fixed(image)
        fixed(image)
    assert stateful.calls == 2
    assert not hasattr(stateful, "offset")
    # No copy outlives its solve in the denoiser.
    assert stateful.layers == [stateful.conv, stateful.drop]
    assert stateful.scale is fixed.scale


def test_attributes_arrive_after_an_error_too(noisy, image):
    def fail():
        with frozen(noisy) as fixed:
            fixed.seen = True
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert noisy.seen


def test_a_copy_of_a_denoiser_that_changes_later_does_not(noisy, image):
    with frozen(noisy.eval()) as fixed:
        noisy.train()
        assert torch.equal(fixed(image), fixed(image))


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_lazy_layers_make_themselves_in_the_first_solve(noisy):
    model, y = model_of(nn.Sequential(nn.LazyConv2d(1, 3, padding=1), noisy)), data()
    assert all(gradient.abs().max() > 0 for gradient in gradients(model, y))
    assert torch.equal(model.eval()(y, CT), model(y, CT))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_scripted_layers_stay_themselves(noisy, image):
    scripted = torch.jit.script(nn.Conv2d(1, 1, 3, padding=1))
    with frozen(nn.Sequential(noisy, scripted)) as fixed:
        assert fixed[1] is scripted
        assert fixed(image).shape == image.shape


# ------------------------------------------------------------------ solves beside each other


class Interrupted(nn.Module):
    """In the middle of each call of a layer, let another thread run a job."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.other_thread = SimpleNamespace(jobs=[])
        # After the hooks that compute weights.
        layer.register_forward_pre_hook(lambda *_: self.interrupt())

    def interrupt(self):
        jobs, self.other_thread.jobs = self.other_thread.jobs, []
        with ThreadPoolExecutor(1) as thread:
            for job in jobs:
                thread.submit(job).result()
        self.other_thread.jobs = jobs

    def forward(self, x):
        return 0.5 * self.layer(x)


@pytest.mark.parametrize("independent", [True, False])
@pytest.mark.parametrize(
    "differentiation", [Implicit(Picard(6, 1e-12)), pytest.param(Unrolled(), marks=pytest.mark.exhaustive)]
)
@pytest.mark.parametrize(
    "computed",
    [
        parametrizations.spectral_norm,
        pytest.param(nn.utils.spectral_norm, marks=pytest.mark.exhaustive),
        pytest.param(nn.utils.weight_norm, marks=pytest.mark.exhaustive),
        pytest.param(pruned, marks=pytest.mark.exhaustive),
    ],
)
def test_a_solve_beside_another_keeps_its_gradients(computed, differentiation, independent):
    def model():
        torch.manual_seed(0)
        layer = computed(nn.Conv2d(1, 1, 3, padding=1)).eval()
        return model_of(Interrupted(layer), differentiation=differentiation)

    @torch.no_grad()
    def infer():
        images.append(serving(y, CT))

    def train():
        found.append(gradients(trained, y))

    y, trained, images, found = data(), model(), [], []
    serving = model() if independent else trained
    infer()
    train()
    # A whole solve in the middle of each of a training step's calls, and the other way round.
    trained.denoiser.other_thread.jobs = [infer]
    train()
    trained.denoiser.other_thread.jobs = []
    serving.denoiser.other_thread.jobs = [train]
    infer()
    assert len(images) > 5
    assert len(found) > 5
    for image, gradient in itertools.product(images, found):
        torch.testing.assert_close(image, images[0], rtol=0, atol=0)
        torch.testing.assert_close(gradient, found[0], rtol=0, atol=0)


def test_a_solve_is_one_map_whatever_mode_another_thread_sets():
    y, layer = data(), nn.Dropout(0.5).eval()
    model = model_of(Interrupted(layer))
    expected = model(y, CT)
    model.denoiser.other_thread.jobs = [lambda: model.train(not model.training)]
    assert torch.equal(model(y, CT), expected)
    assert torch.equal(model(y, CT), expected)


@pytest.mark.parametrize("differentiation", DIFFERENTIATIONS)
def test_a_solve_does_not_use_the_cache_that_its_caller_has_open(differentiation):
    torch.manual_seed(0)
    model, y = model_of(UNet(SMALL).eval(), differentiation=differentiation), data()
    expected = gradients(model, y)
    with parametrize.cached():
        with torch.no_grad():
            model(y, CT)
        torch.testing.assert_close(gradients(model, y), expected, rtol=0, atol=0)
        other = model_of(UNet(SMALL).eval(), differentiation=differentiation)
        assert all(gradient.abs().max() > 0 for gradient in gradients(other, y))


# ------------------------------------------------------------------ what else wraps modules


@pytest.mark.parametrize("how", ["torch.compile(denoiser)", "denoiser.compile", "torch.compile(wrapped)"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
# The compiler looks at the gradient of each tensor that it is given.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_denoiser_is_compiled_once_for_all_solves(noisy, how):
    noisy.eval()
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    noisy.drop.train()
    model, y = model_of(noisy), data()
    expected = model(y, CT)
    if how == "denoiser.compile":
        noisy.compile(backend=backend)
    else:
        model.denoiser = torch.compile(
            noisy if how == "torch.compile(denoiser)" else nn.Sequential(noisy), backend=backend
        )
    for _ in range(10):
        torch.testing.assert_close(model(y, CT), expected, rtol=1e-3, atol=1e-3)
    assert len(graphs) == 1


def test_a_denoiser_of_other_weights_is_solved_with_those():
    torch.manual_seed(0)
    model, y = model_of(UNet(SMALL).eval()), data()
    weights = {name: value.detach() * 1.1 for name, value in model.named_parameters()}
    weights = {name: value.requires_grad_() for name, value in weights.items()}
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in expected.named_parameters():
            weight.copy_(weights[name])
    wanted = gradients(expected, y)
    torch.func.functional_call(model, weights, (y, CT)).square().sum().backward()
    torch.testing.assert_close([weight.grad for weight in weights.values()], wanted)


def test_weights_updated_in_place_are_those_of_the_next_solve():
    torch.manual_seed(0)
    model, y = model_of(UNet(SMALL).eval()), data()
    first = model(y, CT)
    with torch.no_grad():
        for weight in model.parameters():
            weight *= 1.1
    second = model(y, CT)
    assert not torch.equal(first, second)
    assert torch.equal(second, copy.deepcopy(model)(y, CT))


def test_a_distributed_denoiser_sums_its_gradients(noisy, tmp_path):
    y = data()
    expected = gradients(model_of(copy.deepcopy(noisy).eval()), y)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        distributed, reduced = DistributedDataParallel(noisy.eval()), []

        def reduce(_, bucket):
            reduced.append(bucket)
            future = torch.futures.Future()
            future.set_result(2 * bucket.buffer())
            return future

        distributed.register_comm_hook(None, reduce)
        model = model_of(distributed)
        for _ in range(2):
            found = gradients(model, y)
            torch.testing.assert_close(found, [2 * gradient for gradient in expected])
        assert len(reduced) == 2
    finally:
        torch.distributed.destroy_process_group()
