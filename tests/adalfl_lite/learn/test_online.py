"""Algorithm 2 in a user's own loop: what it does to θ and φ, what it refuses, and how it continues."""

import copy
import io
import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from adalfl_lite.checks import check_values
from adalfl_lite.learn.online import META_LEARNING_RATE, OnlineLoss
from adalfl_lite.losses.network import LossNetwork
from adalfl_lite.losses.task import task_loss

SGD = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3}


def problem(kind="classification", seed=0, dtype=torch.float32):
    """A model, a loss network and eight batches of a learnable problem."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))
    network = LossNetwork.default(kind)
    teacher = torch.randn(5, 3)
    batches = []
    for _ in range(8):
        x = torch.randn(20, 5)
        y = x @ teacher
        batches.append((x.to(dtype), y.argmax(1) if kind == "classification" else y.to(dtype)))
    return model.to(dtype).train(), network.to(dtype), batches


def learner(model, network, **options):
    return OnlineLoss(model, network, torch.optim.SGD(model.parameters(), **SGD), **options)


def flat(module):
    return torch.cat([value.detach().flatten().double() for value in module.state_dict().values()])


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_dropped_into_a_plain_loop_it_changes_both_and_reports_both_losses(kind):
    model, network, batches = problem(kind)
    online = learner(model, network, meta_learning_rate=1e-3)
    theta, phi = flat(model), flat(network)
    with torch.no_grad():
        torch.manual_seed(3)
        expected = network(copy.deepcopy(model)(batches[0][0]), batches[0][1])
    torch.manual_seed(3)
    first = online.step(batches[0], batches[1])
    torch.testing.assert_close(first.training_loss, expected)
    assert not first.training_loss.requires_grad
    assert not torch.equal(flat(model), theta) and not torch.equal(flat(network), phi)
    losses = [online.step(batches[i % 6], batches[6 + i % 2]).meta_loss.item() for i in range(60)]
    assert all(math.isfinite(loss) for loss in losses)


def test_one_step_is_the_two_equations_written_out():
    """θ' by SGD with M_φ, then φ' by SGD with the gradient of L_T at θ', by plain double backward."""
    model, network, batches = problem(dtype=torch.float64)
    model = nn.Linear(5, 3).double()
    twin, twin_network = copy.deepcopy(model), network.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    meta_optimizer = torch.optim.SGD(network.parameters(), lr=0.7)
    result = OnlineLoss(model, network, optimizer, meta_optimizer=meta_optimizer).step(batches[0], batches[1])

    (x, y), (x_meta, y_meta) = batches[:2]
    phi = list(twin_network.parameters())
    weight, bias = twin.weight, twin.bias
    gradients = torch.autograd.grad(twin_network(twin(x), y), [weight, bias], create_graph=True)
    moved = [p - 0.3 * g for p, g in zip((weight, bias), gradients, strict=True)]
    meta_loss = nn.functional.cross_entropy(x_meta @ moved[0].T + moved[1], y_meta)
    meta_gradient = torch.autograd.grad(meta_loss, phi)
    torch.testing.assert_close(result.meta_loss, meta_loss.detach())
    torch.testing.assert_close(list(model.parameters()), moved)
    torch.testing.assert_close(
        list(network.parameters()), [p - 0.7 * g for p, g in zip(phi, meta_gradient, strict=True)]
    )
    assert max((0.7 * g).abs().max() for g in meta_gradient) > 1e-4


def test_meta_learning_rate_zero_freezes_phi_and_theta_follows_torch():
    model, network, batches = problem()
    twin, phi = copy.deepcopy(model), flat(network)
    online = learner(model, network, meta_learning_rate=0.0)
    plain = torch.optim.SGD(twin.parameters(), **SGD)
    torch.manual_seed(5)
    for batch, meta_batch in zip(batches[::2], batches[1::2], strict=True):
        online.step(batch, meta_batch)
    torch.manual_seed(5)
    for x, y in batches[::2]:
        plain.zero_grad()
        network(twin(x), y).backward()
        plain.step()
    assert torch.equal(flat(network), phi)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[name], msg=name)


def test_the_engines_agree_over_several_steps_and_stay_apart_from_a_frozen_loss():
    runs = {}
    for engine, rate in (("forward", 1e-2), ("unrolled", 1e-2), ("frozen", 0.0)):
        model, network, batches = problem(dtype=torch.float64)
        online = learner(model, network, meta_learning_rate=rate, engine="forward" if rate == 0 else engine)
        torch.manual_seed(5)
        for i in range(6):
            online.step(batches[i], batches[i + 1])
        runs[engine] = torch.cat([flat(model), flat(network)])
    assert (runs["forward"] - runs["unrolled"]).norm() < 1e-8 * runs["forward"].norm()
    assert (runs["forward"] - runs["frozen"]).norm() > 1e-3 * runs["forward"].norm()


def test_the_meta_batch_may_be_the_training_batch_or_have_another_size():
    model, network, batches = problem()
    online = learner(model, network)
    phi = flat(network)
    online.step(batches[0], batches[0])
    online.step(batches[1], tuple(t[:7] for t in batches[2]))
    assert torch.isfinite(flat(network)).all() and not torch.equal(flat(network), phi)


def test_several_inner_steps_leave_phi_to_the_caller():
    model, network, batches = problem()
    online = learner(model, network)
    phi, theta = flat(network), flat(model)
    result = online.meta_gradient(batches[:3], batches[3])
    assert torch.equal(flat(network), phi) and not torch.equal(flat(model), theta)
    assert model[1].num_batches_tracked == 3
    online.apply_meta_gradient(result)
    assert not torch.equal(flat(network), phi)


def test_adapting_the_loss_lowers_the_task_loss_after_the_step():
    """What the meta-gradient is for: from the same θ, the adapted φ makes a better step than the original one."""
    model, network, batches = problem(dtype=torch.float64)
    model[3].p = 0.0
    start, phi = copy.deepcopy(model.state_dict()), network.clone()
    meta_optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    after = []
    for _ in range(20):
        model.load_state_dict(start)
        online = OnlineLoss(
            model,
            network,
            torch.optim.SGD(model.parameters(), lr=0.5),
            meta_optimizer=meta_optimizer,
        )
        after.append(online.step(batches[0], batches[1]).meta_loss.item())
    assert after[-1] < after[0] - 0.01
    assert not torch.equal(flat(phi), flat(network))


# The other engines -------------------------------------------------------------------------------------------------


def run(engine, between=lambda model: None, twins=False, dropout=0.2):
    """Seven steps whose meta batch is the next training batch, with something done between them.

    Returns θ, buffers and φ; the steps' results; how often the model was called; and the random state.
    """
    model, network, batches = problem(dtype=torch.float64)
    model[3].p = dropout
    online = learner(model, network, meta_learning_rate=1e-2, engine=engine)
    calls, results = [], []
    model.register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(5)
    for batch, next_batch in zip(batches[:7], batches[1:], strict=True):
        results.append(online.step([t.clone() for t in batch] if twins else batch, next_batch))
        between(model)
    return torch.cat([flat(model), flat(network)]), results, len(calls), torch.get_rng_state()


def evaluate(model):
    model.eval()(torch.zeros(1, 5, dtype=torch.float64))
    model.train()


def change(model):
    with torch.no_grad():
        model[0].bias.mul_(0.5)


@pytest.mark.parametrize(
    ("options", "saved"),
    [
        ({}, 6),
        ({"between": evaluate}, 6),
        ({"between": lambda model: torch.rand(3), "dropout": 0.0}, 6),
        ({"between": change}, 0),
        ({"between": lambda model: model[3].train(not model[3].training)}, 0),
        ({"twins": True}, 0),  # equal batches, but not the same tensors
    ],
    ids=["plain", "evaluated", "random numbers drawn", "parameters changed", "mode changed", "other tensors"],
)
def test_shared_is_forward_with_the_next_batch_as_meta_batch(options, saved):
    """With BatchNorm, dropout, momentum; what cannot be shared is run again."""
    state, results, calls, random = run("shared", **options)
    expected, expected_results, expected_calls, expected_random = run("forward", **options)
    torch.testing.assert_close(state, expected, rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(results, expected_results, strict=True):
        torch.testing.assert_close(ours.meta_gradient, theirs.meta_gradient, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(ours.training_loss, theirs.training_loss)
        torch.testing.assert_close(ours.meta_loss, theirs.meta_loss)
    assert expected_calls - calls == saved
    assert torch.equal(random, expected_random)


def test_random_numbers_drawn_between_shared_steps_are_not_drawn_again():
    def drawn():
        numbers = []
        run("shared", between=lambda model: numbers.append(torch.rand(()).item()))
        return numbers

    assert len(set(drawn())) == 7


def test_a_shared_step_that_fails_is_forgotten():
    model, network, batches = problem()
    online = learner(model, network, engine="shared")
    online.step(batches[0], batches[1])
    with pytest.raises(FloatingPointError):
        online.apply_meta_gradient(
            replace(online.meta_gradient(batches[1:2], batches[2]), meta_loss=torch.tensor(math.nan))
        )
    online.step(batches[2], batches[3])
    assert torch.isfinite(flat(model)).all()


def test_finite_differences_are_near_the_exact_engine():
    """Close, not equal: θ' is exact, and the meta-gradient off by a little."""
    results = run("finite-difference", dropout=0.2)[1], run("forward", dropout=0.2)[1]
    first, exact = (torch.cat([g.flatten() for g in result[0].meta_gradient]) for result in results)
    assert 0 < (first - exact).norm() < 1e-3 * exact.norm()
    assert torch.equal(results[0][0].meta_loss, results[1][0].meta_loss)


# The meta-optimizer ------------------------------------------------------------------------------------------------


def test_the_default_meta_optimizer_is_adam_and_its_first_step_is_its_rate():
    model, network, batches = problem()
    online = learner(model, network)
    assert type(online.meta_optimizer) is torch.optim.Adam
    before = flat(network)
    online.step(batches[0], batches[1])
    assert (flat(network) - before).abs().max().item() == pytest.approx(META_LEARNING_RATE["classification"], rel=0.01)


def test_a_meta_optimizer_of_the_users_is_used_and_leaves_frozen_layers_alone():
    model, network, batches = problem()
    network.network[0].requires_grad_(False)
    trained = [p for p in network.parameters() if p.requires_grad]
    online = learner(model, network, meta_optimizer=torch.optim.SGD(trained, lr=0.5))
    before = [p.detach().clone() for p in network.parameters()]
    result = online.step(batches[0], batches[1])
    assert len(result.meta_gradient) == len(trained) == len(before) - 1
    assert torch.equal(network.network[0].weight, before[0])
    for p, old, gradient in zip(trained, before[1:], result.meta_gradient, strict=True):
        torch.testing.assert_close(p.detach(), old - 0.5 * gradient)
    assert all(p.grad is None for p in [*network.parameters(), *model.parameters()])


@pytest.mark.parametrize("share", [0.5, 2.0])
def test_a_meta_gradient_longer_than_the_limit_is_scaled_down_to_it(share):
    model, network, batches = problem(dtype=torch.float64)
    online = learner(model, network, meta_optimizer=torch.optim.SGD(network.parameters(), lr=1.0))
    result = online.meta_gradient([batches[0]], batches[1])
    gradient = torch.cat([g.flatten() for g in result.meta_gradient])
    before = flat(network)
    online.clip_meta_gradient = share * gradient.norm().item()
    online.apply_meta_gradient(result)
    torch.testing.assert_close(before - flat(network), min(share, 1.0) * gradient, rtol=1e-3, atol=0)


def test_a_group_of_one_process_changes_nothing(tmp_path):
    def learned(**options):
        model, network, batches = problem(dtype=torch.float64)
        online = learner(model, network, meta_learning_rate=1e-2, **options)
        torch.manual_seed(5)
        for i in range(3):
            online.step(batches[i], batches[i + 1])
        return online, batches, torch.cat([flat(model), flat(network)])

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        online, batches, state = learned(process_group=dist.group.WORLD)
        with pytest.raises(ValueError, match="one inner step is taken at a time, got 2 batches"):
            online.meta_gradient(batches[:2], batches[2])
    finally:
        dist.destroy_process_group()
    assert torch.equal(state, learned()[2])


def test_any_module_can_be_the_loss_if_the_task_loss_is_given():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.0))

        def forward(self, prediction, target):
            return self.scale * nn.functional.cross_entropy(prediction, target)

    model, _, batches = problem()
    with pytest.raises(ValueError, match="Scaled has no attribute 'kind'; pass task_loss="):
        learner(model, Scaled())
    loss = Scaled()
    learner(model, loss, task_loss=task_loss("classification"), meta_learning_rate=0.01).step(*batches[:2])
    assert loss.scale.item() == pytest.approx(1.01, abs=1e-5)  # a fresh model gains from a larger step


# Failure and continuation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["forward", "unrolled"])
@pytest.mark.parametrize("which", ["batch", "meta batch"])
def test_a_step_that_is_not_finite_is_named_and_leaves_phi_unchanged(which, engine):
    model, network, batches = problem()
    online = learner(model, network, engine=engine)
    online.step(batches[0], batches[1])
    phi, moments = flat(network), copy.deepcopy(online.meta_optimizer.state_dict()["state"])
    huge = (torch.full_like(batches[2][0], 3e38), batches[2][1])  # finite, until they are summed
    arguments = (huge, batches[3]) if which == "batch" else (batches[3], huge)
    name = "learned loss" if which == "batch" else "task loss"
    with pytest.raises(FloatingPointError, match=f"the {name} is not finite .* lower the base learning rate"):
        online.step(*arguments)
    assert torch.equal(flat(network), phi)
    for key, entries in online.meta_optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, moments[key][name]) for name, value in entries.items())


def test_a_meta_gradient_that_is_not_finite_is_named():
    model, network, batches = problem()
    online = learner(model, network)
    result = online.meta_gradient([batches[0]], batches[1])
    result.meta_gradient[1][0, 0] = math.nan
    phi = flat(network)
    with pytest.raises(FloatingPointError, match="meta-gradient of network.2.weight is not finite"):
        online.apply_meta_gradient(result)
    assert torch.equal(flat(network), phi)


def test_a_state_dict_continues_bit_for_bit_and_loads_with_weights_only():
    def steps(online, batches, first, last):
        for i in range(first, last):
            torch.manual_seed(i)
            online.step(batches[i], batches[i + 1])

    model, network, batches = problem()
    online = learner(model, network, meta_learning_rate=1e-3)
    steps(online, batches, 0, 3)
    file = io.BytesIO()
    torch.save(online.state_dict(), file)
    steps(online, batches, 3, 7)

    other_model, other_network, _ = problem(seed=1)
    other = learner(other_model, other_network, meta_learning_rate=0.5)  # overwritten by the state
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    steps(other, batches, 3, 7)
    assert torch.equal(flat(model), flat(other_model)) and torch.equal(flat(network), flat(other_network))


# Refusals ----------------------------------------------------------------------------------------------------------


def test_what_cannot_work_is_refused_before_the_first_step():
    model, network, _ = problem()
    with pytest.raises(
        ValueError, match="engine must be one of forward, shared, finite-difference, unrolled; got 'fast'"
    ):
        learner(model, network, engine="fast")
    for rate in (-1.0, math.nan):
        with pytest.raises(ValueError, match=f"meta_learning_rate must be 0 or more and finite, got {rate}"):
            learner(model, network, meta_learning_rate=rate)
    with pytest.raises(ValueError, match="not in the model"):
        OnlineLoss(model, network, torch.optim.SGD(copy.deepcopy(model).parameters(), lr=0.1))
    with pytest.raises(TypeError, match="LBFGS has no differentiable update"):
        OnlineLoss(model, network, torch.optim.LBFGS(model.parameters()))
    with pytest.raises(ValueError, match="unfreeze some of the model"):
        OnlineLoss(model.requires_grad_(False), network, torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize("which", ["tokens", "one column"])
def test_a_divergence_is_told_as_one_whatever_the_shape_of_the_data(which):
    """Token numbers as inputs, or regression targets of one dimension, are nothing to complain of."""
    torch.manual_seed(0)
    if which == "tokens":
        model, network = (
            nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, 3)),
            LossNetwork.default("classification"),
        )
        batch = torch.randint(7, (10, 3)), torch.randint(3, (10,))
    else:
        model, network = nn.Sequential(nn.Linear(5, 1), nn.Flatten(0)), LossNetwork.default("regression")
        batch = torch.randn(10, 5), torch.randn(10)
    online = learner(model, network)
    online.step(batch, batch)
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        online.step(batch, batch)


def test_the_row_of_a_target_that_is_not_finite_is_named():
    targets = torch.zeros(5)
    targets[3] = math.nan
    with pytest.raises(ValueError, match=r"batch: targets are not finite \(first in row 3\)"):
        check_values((torch.zeros(5, 2), targets), "batch")


class Sometimes(nn.Module):
    """A model that leaves a layer out where it gets fewer than five rows."""

    def __init__(self):
        super().__init__()
        self.always, self.rarely = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.always(x) + self.rarely(x) if len(x) > 4 else self.always(x)


@pytest.mark.parametrize("engine", ["forward", "shared", "finite-difference"])
def test_a_parameter_that_the_meta_batch_does_not_reach_has_no_part_in_the_meta_gradient(engine):
    torch.manual_seed(0)
    x, y = torch.randn(8, 4).double(), torch.randint(3, (8,))
    model, network = Sometimes().double(), LossNetwork.classification(hidden=(5,)).double()
    twin, twin_network = copy.deepcopy((model, network))
    found = learner(model, network, engine=engine).meta_gradient([(x, y)], (x[:4], y[:4]))
    expected = learner(twin, twin_network, engine="unrolled").meta_gradient([(x, y)], (x[:4], y[:4]))
    tolerance = 1e-5 if engine == "finite-difference" else 1e-12
    torch.testing.assert_close(found.meta_gradient, expected.meta_gradient, rtol=tolerance, atol=tolerance)
    assert max(gradient.abs().max() for gradient in found.meta_gradient) > 1e-6
