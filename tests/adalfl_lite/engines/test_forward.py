"""The forward-mode meta-gradient against double backward, finite differences and torch.optim itself."""

import copy

import pytest
import torch
from torch import nn

from adalfl_lite.engines import forward
from adalfl_lite.losses.network import LossNetwork
from adalfl_lite.losses.task import task_loss
from tests.shorthand import forward_mode_step, unrolled_step

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "dampening": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.3),
    "nesterov + weight decay": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-3),
    "maximize": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.5, maximize=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "two groups": lambda p: torch.optim.Adam([{"params": (q := list(p))[:2], "lr": 0.1}, {"params": q[2:]}], lr=0.01),
}


def mlp():
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4))


def convnet():
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 4)
    )


def dropout_net():
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.4), nn.Linear(16, 4))


MODELS = {"mlp": (mlp, (6,)), "convnet with BatchNorm": (convnet, (1, 6, 6)), "dropout": (dropout_net, (6,))}


def make(model_name, kind="classification", seed=0):
    torch.manual_seed(seed)
    build, shape = MODELS[model_name]
    model = build().double().train()
    network = LossNetwork(kind, anchored=kind == "regression").double()

    def batch(n=8):
        x = torch.randn(n, *shape, dtype=torch.float64)
        return x, torch.randint(4, (n,)) if kind == "classification" else torch.randn(n, 4, dtype=torch.float64)

    return model, network, batch


def relative_difference(a, b):
    a, b = (torch.cat([t.flatten() for t in ts]) for ts in (a, b))
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("kind", ["classification", "regression"])
@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("model_name", MODELS)
def test_forward_mode_equals_double_backward(model_name, optimizer_name, kind, monkeypatch):
    monkeypatch.setattr(forward, "KEPT_FAN_IN", 0)  # these models are small
    model, network, batch = make(model_name, kind)
    other, loss = copy.deepcopy(model), task_loss(kind)
    optimizer, other_optimizer = (OPTIMIZERS[optimizer_name](m.parameters()) for m in (model, other))
    for step in range(3):  # the first step has empty optimizer state, the later ones do not
        data, meta = batch(), batch()
        torch.manual_seed(step)
        fast = forward_mode_step(model, network, optimizer, data, meta, loss)
        torch.manual_seed(step)
        slow = unrolled_step(other, network, other_optimizer, [data], meta, loss)
        tolerance = 1e-5 if optimizer_name == "rmsprop" else 1e-10  # torch's differentiable path counts in float32
        assert relative_difference(fast.meta_gradient, slow.meta_gradient) < tolerance
        assert relative_difference([fast.meta_loss], [slow.meta_loss]) < tolerance
        assert relative_difference(fast.meta_gradient, [torch.zeros_like(g) for g in fast.meta_gradient]) > 0
        for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("optimizer_name", ["momentum", "adam"])
def test_meta_gradient_equals_finite_differences(optimizer_name):
    """Independent of autograd's double backward: move φ, repeat the step, and see the task loss change."""
    model, network, batch = make("mlp")
    data, meta = batch(), batch()
    direction = [torch.randn_like(p) for p in network.parameters()]

    def task_loss_after_step(shift):
        moved, moved_network = copy.deepcopy(model), network.clone()
        with torch.no_grad():
            for p, d in zip(moved_network.parameters(), direction, strict=True):
                p.add_(d, alpha=shift)
        optimizer = OPTIMIZERS[optimizer_name](moved.parameters())
        loss = moved_network(moved(data[0]), data[1])
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            return task_loss("classification")(moved(meta[0]), meta[1]).item()

    eps = 1e-5
    numeric = (task_loss_after_step(eps) - task_loss_after_step(-eps)) / (2 * eps)
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    result = forward_mode_step(model, network, optimizer, data, meta, task_loss("classification"))
    exact = sum((g * d).sum() for g, d in zip(result.meta_gradient, direction, strict=True)).item()
    assert exact == pytest.approx(numeric, rel=1e-5)


class ByAutograd(LossNetwork):
    """A loss network whose derivatives are not taken in closed form, for that it may be another function."""


@pytest.mark.parametrize("step", [forward_mode_step, unrolled_step])
@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("model_name", MODELS)
def test_base_update_is_torch_optim_bit_for_bit(model_name, optimizer_name, step):
    """With φ frozen, θ, BatchNorm buffers and optimizer state are those of the plain loop, in float32."""
    model, _, batch = make(model_name)
    network = ByAutograd("classification")
    model, network = model.float(), network.float()
    plain = copy.deepcopy(model)
    optimizer, plain_optimizer = (OPTIMIZERS[optimizer_name](m.parameters()) for m in (model, plain))
    batches = [[t.float() if t.is_floating_point() else t for t in batch()] for _ in range(8)]
    torch.manual_seed(5)
    for data, meta in zip(batches[::2], batches[1::2], strict=True):
        step(
            model, network, optimizer, data if step is forward_mode_step else [data], meta, task_loss("classification")
        )
    torch.manual_seed(5)
    for inputs, targets in batches[::2]:
        plain_optimizer.zero_grad()
        network(plain(inputs), targets).backward()
        plain_optimizer.step()
    for (name, a), b in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    for ours, theirs in zip(
        optimizer.state_dict()["state"].values(), plain_optimizer.state_dict()["state"].values(), strict=True
    ):
        for key, value in ours.items():
            assert value is None and theirs[key] is None or torch.equal(value, theirs[key]), key


def test_several_inner_steps_against_finite_differences():
    model, network, batch = make("mlp")
    batches, meta = [batch() for _ in range(4)], batch()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    start = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        prediction = copy.deepcopy(model)(batches[0][0])
    result = unrolled_step(model, network, optimizer, batches, meta, task_loss("classification"))
    assert torch.allclose(result.prediction, prediction)
    assert torch.allclose(result.training_loss, network(prediction, batches[0][1]).detach())
    direction = [torch.randn_like(p) for p in network.parameters()]

    def after(shift):
        model.load_state_dict(start)
        moved = network.clone()
        with torch.no_grad():
            for p, d in zip(moved.parameters(), direction, strict=True):
                p.add_(d, alpha=shift)
        return unrolled_step(
            model, moved, torch.optim.Adam(model.parameters(), lr=0.01), batches, meta, task_loss("classification")
        ).meta_loss.item()

    numeric = (after(1e-5) - after(-1e-5)) / 2e-5
    exact = sum((g * d).sum() for g, d in zip(result.meta_gradient, direction, strict=True)).item()
    assert exact == pytest.approx(numeric, rel=1e-5)


def test_output_tangent_is_the_output_change_along_the_meta_direction():
    """u for plain SGD is −α J_f ∇L_T: compare with a small step of the parameters."""
    model, network, batch = make("mlp")
    data, meta = batch(), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    start = copy.deepcopy(model)
    u = forward_mode_step(model, network, optimizer, data, meta, task_loss("classification")).output_tangent
    task_loss("classification")(model(meta[0]), meta[1]).backward()
    outputs = []
    for sign in (1e-6, -1e-6):
        moved = copy.deepcopy(start)
        with torch.no_grad():
            for p, q in zip(moved.parameters(), model.parameters(), strict=True):
                p.add_(q.grad, alpha=-0.1 * sign)
            outputs.append(moved(data[0]))
    assert torch.allclose(u, (outputs[0] - outputs[1]) / 2e-6, atol=1e-8)


def test_frozen_layers_and_unused_parameters():
    model, network, batch = make("mlp")
    model[0].requires_grad_(False)
    model.register_parameter("unused", nn.Parameter(torch.ones(3, dtype=torch.float64)))
    other = copy.deepcopy(model)
    data, meta = batch(), batch()
    make_optimizer = OPTIMIZERS["momentum"]
    fast = forward_mode_step(
        model, network, make_optimizer(model.parameters()), data, meta, task_loss("classification")
    )
    slow = unrolled_step(other, network, make_optimizer(other.parameters()), [data], meta, task_loss("classification"))
    assert relative_difference(fast.meta_gradient, slow.meta_gradient) < 1e-10
    assert torch.equal(model.unused, torch.ones(3, dtype=torch.float64))


def test_optimizer_of_another_model_is_refused():
    model, network, batch = make("mlp")
    optimizer = torch.optim.SGD(mlp().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="not in the model"):
        forward_mode_step(model, network, optimizer, batch(), batch(), task_loss("classification"))


def test_optimizer_without_differentiable_update_is_refused():
    model, network, batch = make("mlp")
    with pytest.raises(TypeError, match="LBFGS has no differentiable update"):
        forward_mode_step(
            model, network, torch.optim.LBFGS(model.parameters()), batch(), batch(), task_loss("classification")
        )
