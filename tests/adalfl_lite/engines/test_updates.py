"""The functional updates against torch.optim's own numbers, and their pullbacks against autograd."""

import copy

import pytest
import torch

from adalfl_lite.engines.updates import check_differentiable, functional_update, update_pullback
from adalfl_lite.passes import optimizer_parameters

EXACT = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "maximize": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, maximize=True, weight_decay=0.1),
    "tensor lr": lambda p: torch.optim.SGD(p, lr=torch.tensor(0.1), momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True, maximize=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.3),
}
BY_TWIN = {
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, lr_decay=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.1),
}
OPTIMIZERS = {**EXACT, **BY_TWIN}


def parameters_and_gradients(steps=3):
    generator = torch.Generator().manual_seed(0)

    def draw():
        return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in [(3, 2), (4,)]]

    return [p.requires_grad_(True) for p in draw()], [draw() for _ in range(steps)]


def take_steps(optimizer, gradients):
    for step in gradients:
        for parameter, gradient in zip(optimizer_parameters(optimizer), step, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_several_functional_updates_give_the_parameters_of_torch(name):
    parameters, gradients = parameters_and_gradients()
    optimizer = OPTIMIZERS[name](parameters)
    theta, state = [p.detach().clone() for p in parameters], None
    for step in gradients:  # state None, then carried along
        theta, state = functional_update(optimizer, theta, step, state)
    take_steps(optimizer, gradients)
    for ours, theirs in zip(theta, parameters, strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-6 if name in BY_TWIN else 1e-12, atol=1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_functional_update_starts_from_the_optimizers_state_and_leaves_it_alone(name):
    parameters, gradients = parameters_and_gradients()
    optimizer = OPTIMIZERS[name](parameters)
    take_steps(optimizer, gradients[:2])
    before = copy.deepcopy(optimizer.state_dict())
    values = [p.detach().clone() for p in parameters]
    updated, _ = functional_update(optimizer, values, gradients[2])
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for key, entries in before["state"].items():
        for entry, value in entries.items():
            assert value is after["state"][key][entry] or torch.equal(value, after["state"][key][entry])
    assert all(torch.equal(value, p) for value, p in zip(values, parameters, strict=True))
    take_steps(optimizer, gradients[2:])
    for ours, theirs in zip(updated, parameters, strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-6 if name in BY_TWIN else 1e-12, atol=1e-12)


@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_pullback_is_the_numerical_derivative_of_torchs_step(name, steps_before):
    """⟨v, U(θ, g + h e) − U(θ, g − h e)⟩ / 2h = ⟨(∂U/∂g)ᵀ v, e⟩, with U the optimizer's own in-place step."""
    torch.manual_seed(0)
    parameters, gradients = parameters_and_gradients()
    optimizer = OPTIMIZERS[name](parameters)
    take_steps(optimizer, gradients[:steps_before])
    last, v = gradients[2], [torch.randn_like(p) for p in parameters]
    direction = [torch.randn_like(p) for p in parameters]
    w = update_pullback(optimizer, last)(v)
    h, ends = 1e-6, []
    for sign in (h, -h):
        moved = [p.detach().clone().requires_grad_(True) for p in parameters]
        twin = OPTIMIZERS[name](moved)
        twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        take_steps(twin, [[g + sign * e for g, e in zip(last, direction, strict=True)]])
        ends.append(moved)
    numeric = sum((a * (p - q)).sum().item() / (2 * h) for a, p, q in zip(v, *ends, strict=True))
    exact = sum((a * e).sum().item() for a, e in zip(w, direction, strict=True))
    assert exact == pytest.approx(numeric, rel=1e-4, abs=1e-6)
    if steps_before or "sgd" in type(optimizer).__name__.lower():
        assert abs(exact) > 1e-4  # a first step of Adam and its like is the gradient's sign: no slope


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_parameter_without_a_gradient_stays_and_has_no_pullback(name):
    parameters, gradients = parameters_and_gradients(1)
    optimizer = OPTIMIZERS[name](parameters)
    values = [p.detach().clone() for p in parameters]
    some = [None, gradients[0][1]]
    updated, _ = functional_update(optimizer, values, some)
    assert torch.equal(updated[0], values[0]) and not torch.equal(updated[1], values[1])
    (w,) = update_pullback(optimizer, some)([torch.ones(4, dtype=torch.float64)])
    assert w.shape == (4,) and w.abs().sum() > 0


@pytest.mark.parametrize("name", ["adam", "amsgrad", "adamw", "rmsprop", "adagrad"])
def test_a_gradient_entry_of_zero_has_a_finite_pullback(name):
    """Adam's √v̂ has an infinite slope at zero; an entry the batch did not reach must not make everything NaN."""
    parameters, gradients = parameters_and_gradients(1)
    gradients[0][1][2] = 0.0
    options = {"weight_decay": 0.0} if "adam" in name else {}
    optimizer = OPTIMIZERS[name](parameters)
    for group in optimizer.param_groups:
        group.update(options)
    w = update_pullback(optimizer, gradients[0])([torch.ones_like(p) for p in parameters])
    assert all(torch.isfinite(x).all() for x in w)
    assert w[1][2] == 0


def test_parameters_come_in_the_order_of_the_groups():
    a, b, c = (torch.zeros(n, requires_grad=True) for n in (1, 2, 3))
    optimizer = torch.optim.SGD([{"params": [c, a]}, {"params": [b]}], lr=0.1)
    assert [len(p) for p in optimizer_parameters(optimizer)] == [3, 1, 2]


def test_what_cannot_be_differentiated_is_refused_by_name():
    parameters, _ = parameters_and_gradients(1)
    check_differentiable(torch.optim.SGD(parameters, lr=0.1))
    with pytest.raises(TypeError, match="LBFGS has no differentiable update; use one"):
        check_differentiable(torch.optim.LBFGS(parameters))
    with pytest.raises(TypeError, match="must be a torch.optim.Optimizer, got float"):
        check_differentiable(0.1)
