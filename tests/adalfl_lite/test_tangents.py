"""u = J_f w: the exact pass against central differences and torch's own formulas, the approximate one against it."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call

from adalfl_lite.tangents import finite_difference_tangent, forward, output_tangent


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
    tangents = {name: (p.detach(), torch.randn_like(p)) for name, p in model.named_parameters()}
    return model, tangents, torch.randn(5, 2, 6, 6, dtype=dtype)


def buffers(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_the_exact_tangent_is_torchs_and_leaves_the_model_alone(build):
    model, tangents, x = make(build)
    before = buffers(model)
    u = output_tangent(model, buffers(model), tangents, x, None)
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(*pair) for name, pair in tangents.items()}
        expected = forward_ad.unpack_dual(functional_call(model, {**buffers(model), **duals}, (x,))).tangent
    torch.testing.assert_close(u, expected, rtol=1e-11, atol=1e-11)
    assert u.norm() > 1


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-2)])
def test_the_finite_difference_is_near_it(build, dtype, tolerance):
    model, tangents, x = make(build, dtype)
    exact = output_tangent(model, buffers(model), tangents, x, None)
    with torch.no_grad():
        prediction = functional_call(model, buffers(model), (x,))
    u = finite_difference_tangent(model, buffers(model), tangents, x, None, prediction)
    assert 0 < (u - exact).norm() < tolerance * exact.norm()


def test_no_direction_no_change():
    model, tangents, x = make(convnet)
    still = {name: (theta, torch.zeros_like(theta)) for name, (theta, _) in tangents.items()}
    prediction = functional_call(model, buffers(model), (x,))
    assert not finite_difference_tangent(model, buffers(model), still, x, None, prediction).any()
    assert not output_tangent(model, buffers(model), still, x, None).any()


def test_running_statistics_move_once_as_in_a_plain_pass():
    """On the copies it is given; so a pass over the training batch repeats the training pass."""
    model, tangents, x = make(convnet)
    state = buffers(model)
    output_tangent(model, state, tangents, x, None)
    model(x)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(state[name], buffer)


def test_an_autocast_around_it_does_not_keep_old_weights():
    """Within a user's own autocast torch would reuse the cast of a weight until that ends, through the step of θ."""
    model = nn.Linear(3, 2)
    x, bfloat16 = torch.randn(4, 3), torch.bfloat16
    with torch.autocast("cpu", dtype=bfloat16):
        forward(model, {}, x, bfloat16)
        with torch.no_grad():
            model.weight.mul_(3)
        found = forward(model, {}, x, bfloat16)
    assert torch.equal(found, forward(model, {}, x, bfloat16)) and found.dtype == torch.float32
