"""u = J_f w: the exact pass against central differences and torch's own formulas, the approximate one against it."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from adalfl_lite.engines.finite_difference import finite_difference_tangent
from adalfl_lite.engines.tangents import LayerOutputs, output_tangent
from adalfl_lite.learn.online import OnlineLoss
from adalfl_lite.passes import Buffers, forward, replaced
from tests.models import Apply


def convnet(affine=True, running=True):
    norm = nn.BatchNorm2d(4, affine=affine, track_running_stats=running)
    return nn.Sequential(nn.Conv2d(2, 4, 3), norm, nn.Tanh(), nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8))


MODELS = {
    "affine": convnet,
    "not affine": lambda: convnet(affine=False),
    "no running statistics": lambda: convnet(running=False),
    "evaluation mode": lambda: convnet().eval(),
    "on the inputs": lambda: nn.Sequential(nn.BatchNorm2d(2), *convnet()),
}


def make(build, dtype=torch.float64):
    torch.manual_seed(0)
    model = build().to(dtype)
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    tangents = {id(p): (p.detach(), torch.randn_like(p)) for p in model.parameters()}
    return model, tangents, torch.randn(5, 2, 6, 6, dtype=dtype)


def buffers(model):
    return Buffers(model).fresh()


def call(model, tensors, x):
    with replaced(model, tensors):
        return model(x)


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_the_exact_tangent_is_torchs_and_leaves_the_model_alone(build):
    model, tangents, x = make(build)
    before = buffers(model)
    u = output_tangent(model, buffers(model), tangents, x, None)
    assert all(torch.equal(b, before[id(b)]) for b in model.buffers())
    with forward_ad.dual_level():
        duals = {key: forward_ad.make_dual(*pair) for key, pair in tangents.items()}
        expected = forward_ad.unpack_dual(call(model, {**buffers(model), **duals}, x)).tangent
    torch.testing.assert_close(u, expected, rtol=1e-11, atol=1e-11)
    assert u.norm() > 1


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-2)])
def test_the_finite_difference_is_near_it(build, dtype, tolerance):
    model, tangents, x = make(build, dtype)
    exact = output_tangent(model, buffers(model), tangents, x, None)
    with torch.no_grad():
        prediction = call(model, buffers(model), x)
    u = finite_difference_tangent(model, buffers(model), tangents, x, None, prediction)
    assert 0 < (u - exact).norm() < tolerance * exact.norm()


def test_no_direction_no_change():
    model, tangents, x = make(convnet)
    still = {key: (theta, torch.zeros_like(theta)) for key, (theta, _) in tangents.items()}
    prediction = call(model, buffers(model), x)
    assert not finite_difference_tangent(model, buffers(model), still, x, None, prediction).any()
    assert not output_tangent(model, buffers(model), still, x, None).any()


def test_running_statistics_move_once_as_in_a_plain_pass():
    """On the copies it is given; so a pass over the training batch repeats the training pass."""
    model, tangents, x = make(convnet)
    state = buffers(model)
    output_tangent(model, state, tangents, x, None)
    model(x)
    for buffer in model.buffers():
        torch.testing.assert_close(state[id(buffer)], buffer)


def test_an_autocast_around_it_does_not_keep_old_weights():
    """Within a user's own autocast torch would reuse the cast of a weight until that ends, through the step of θ."""
    model = nn.Linear(3, 2)
    x, bfloat16 = torch.randn(4, 3), torch.bfloat16
    with torch.autocast("cpu", dtype=bfloat16):
        forward(model, x, bfloat16)
        with torch.no_grad():
            model.weight.mul_(3)
        found = forward(model, x, bfloat16)
    assert torch.equal(found, forward(model, x, bfloat16)) and found.dtype == torch.float32


class Twice(nn.Module):
    """A layer that is used twice, one called by keywords, a frozen one, a frozen weight, and changes in place."""

    def __init__(self):
        super().__init__()
        self.first, self.grouped = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, groups=2, stride=2)
        self.layer, self.frozen, self.last = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, x):
        x = self.first(x).relu_()
        parameters = {"weight": self.grouped.weight, "bias": self.grouped.bias}
        x = torch.tanh(nn.functional.conv2d(input=x, **parameters, stride=2, groups=2))
        x = torch.tanh(self.layer(torch.tanh(self.layer(x.flatten(1)))))
        return self.last(torch.tanh(self.frozen(x)))


def convolutions(layer, *shape):
    return nn.Sequential(
        *(nn.Flatten(2), nn.Unflatten(2, shape), layer(2, 3, 2, padding=1), nn.Tanh()),
        *(layer(3, 2, 2, bias=False), nn.Flatten(1)),
    )


KEPT = {**MODELS, "many ways": Twice, "1d": lambda: convolutions(nn.Conv1d, 36)}
KEPT["3d"] = lambda: convolutions(nn.Conv3d, 3, 3, 4)


class Products(TorchDispatchMode):
    """Counts the products of layers."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.convolution, torch.ops.aten.addmm, torch.ops.aten.mm)
        return func(*args, **(kwargs or {}))


def both_ways(model, tangents, x, state, fan_in=0):
    """u and its products, without and with what an earlier pass kept."""
    with torch.no_grad(), LayerOutputs(fan_in) as outputs:
        call(model, {**state, **buffers(model)}, x)
    with Products() as alone:
        expected = output_tangent(model, {**state, **buffers(model)}, tangents, x, None)
    with Products() as kept:
        u = output_tangent(model, {**state, **buffers(model)}, tangents, x, None, outputs)
    return expected, alone.count, u, kept.count


@pytest.mark.parametrize("name", KEPT)
def test_outputs_that_were_kept_are_not_computed_again(name):
    model, tangents, x = make(KEPT[name])
    state = {}
    if name == "many ways":
        for frozen in ("frozen.weight", "frozen.bias", "last.weight", "grouped.bias"):
            key = id(model.get_parameter(frozen))
            state[key] = tangents.pop(key)[0]
    expected, alone, u, kept = both_ways(model, tangents, x, state)
    torch.testing.assert_close(u, expected, rtol=1e-12, atol=1e-12)
    assert u.norm() > 1
    expected = {"many ways": (16, 12), "on the inputs": (6, 4)}.get(name, (5, 3))  # a first layer has no Wẋ
    assert (alone, kept) == expected  # not kept: what was changed in place, or has a tangent for its bias alone


def test_only_outputs_with_many_inputs_are_kept():
    model, tangents, x = make(convnet)  # a convolution of 18 inputs, a linear layer of 64
    saved = {}
    for fan_in in (18, 19, 64, 65):
        expected, alone, u, kept = both_ways(model, tangents, x, {}, fan_in)
        torch.testing.assert_close(u, expected, rtol=1e-12, atol=1e-12)
        saved[fan_in] = alone - kept
    assert saved == {18: 2, 19: 1, 64: 1, 65: 0}


class Faint(nn.Module):
    """A loss of one weight, times a factor that leaves little of it."""

    kind = "classification"

    def __init__(self, factor):
        super().__init__()
        self.weight, self.factor = nn.Parameter(torch.ones(())), factor

    def forward(self, prediction, target):
        return self.factor * self.weight * nn.functional.cross_entropy(prediction, target)


def trebled(x):
    """The identity, whose gradient a hook makes three times as large."""
    x = x.clone()
    if x.requires_grad:
        x.register_hook(lambda gradient: 3 * gradient)
    return x


def step_of(engine, factor, *layers):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), *layers, nn.Linear(8, 3))
    online = OnlineLoss(model, Faint(factor), torch.optim.SGD(model.parameters(), lr=0.1), engine=engine)
    batches = [(torch.randn(20, 6), torch.randint(3, (20,))) for _ in range(2)]
    return online.step(*batches)


@pytest.mark.parametrize("factor", [1e-30, 1e-38, 1e-41, 1e-43, 1e-45])
@pytest.mark.parametrize("engine", ["forward", "shared", "unrolled", "finite-difference"])
def test_numbers_too_small_to_be_normal_are_no_disagreement(engine, factor):
    """A learned loss that has nothing left to say has gradients of a few units in the last place there is."""
    for _ in range(3):
        step_of(engine, factor)


@pytest.mark.parametrize("factor", [1.0, 1e-10, 1e-20, 1e-25])
def test_a_backward_pass_that_is_none_is_found_in_small_numbers_too(factor):
    with pytest.raises(NotImplementedError, match="disagree"):
        step_of("forward", factor, Apply(trebled))
