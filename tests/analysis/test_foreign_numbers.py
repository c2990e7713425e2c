"""What diagnostics say of the models that people bring, against dense autograd on a second model, in float64."""

import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from captum.attr import IntegratedGradients, LayerIntegratedGradients
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import analysis as an
from tests.analysis.foreign_models import (
    MODELS,
    Alias,
    Applied,
    Checkpointed,
    Recurrent,
    made,
    rows,
    sequences,
    tokens,
    untouched,
)

ce = F.cross_entropy


def learner(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def row(outputs, parameters, **options):
    found = torch.autograd.grad(outputs, parameters, materialize_grads=True, allow_unused=True, **options)
    return torch.cat([part.flatten() for part in found])


def gradient(model, x, y):
    return row(ce(model(x.clone()), y), learner(model))


def gauss_newton(model, x, y):
    output = model(x.clone())
    jacobian = torch.stack([row(o, learner(model), retain_graph=True) for o in output.flatten()])
    p = output.detach().softmax(-1)
    blocks = [(torch.diag(q) - torch.outer(q, q)) / len(p) for q in p]
    return jacobian.T @ torch.block_diag(*blocks) @ jacobian


def hessian(model, x, y):
    with sdpa_kernel(SDPBackend.MATH):
        first = row(ce(model(x.clone()), y), learner(model), create_graph=True)
        return torch.stack([row(g, learner(model), retain_graph=True) for g in first])


def hessian_by_differences(model, x, y, h=1e-5):
    columns = []
    for parameter in learner(model):
        for i in range(parameter.numel()):
            sides = []
            for sign in (h, -2 * h):
                with torch.no_grad():
                    parameter.view(-1)[i] += sign
                sides.append(gradient(model, x, y))
            with torch.no_grad():
                parameter.view(-1)[i] += h
            columns.append((sides[0] - sides[1]) / (2 * h))
    return torch.stack(columns)


@pytest.mark.parametrize("name", MODELS)
def test_first_derivatives(name):
    (model, data), (twin, _) = made(name, training=False), made(name, training=False)
    (found,) = an.mean_gradients(model, [ce], data)
    expected = gradient(twin, *data)
    torch.testing.assert_close(torch.cat([g.flatten() for g in found.values()]), expected, rtol=1e-9, atol=1e-12)
    single = an.per_sample_gradients(model, ce, data)
    one_by_one = torch.stack([gradient(twin, data[0][i : i + 1], data[1][i : i + 1]) for i in range(len(data[0]))])
    torch.testing.assert_close(single, one_by_one, rtol=1e-9, atol=1e-12)
    v = gradient(twin, *MODELS[name][1](seed=4))
    scores = an.influence(model, ce, ce, data, MODELS[name][1](seed=4), 0.1).influence
    torch.testing.assert_close(scores, -0.1 * one_by_one @ v / len(data[0]), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in ("BERT", "encoder") else ()) for name in MODELS]
)
def test_second_derivatives(name, batches):
    (model, (x, y)), (twin, _) = made(name, training=False), made(name, training=False)
    data = [(x[:4], y[:4]), (x[4:], y[4:])] if batches == 2 else (x, y)
    dense = hessian_by_differences if name == "old weight_norm" else hessian
    values = torch.linalg.eigvalsh(dense(twin, x, y))
    found = an.top_eigenpairs(model, ce, data, 1, which="magnitude", tolerance=1e-8).values[0]
    assert found == pytest.approx(values[values.abs().argmax()].item(), rel=1e-6)
    assert an.trace(model, ce, data, method="exact").value == pytest.approx(values.sum().item(), rel=1e-6)
    expected = gauss_newton(twin, x, y).trace().item()
    assert an.trace(model, ce, data, method="exact", matrix="ggn").value == pytest.approx(expected, rel=1e-8)


def test_weight_norm_as_a_parametrization_over_any_dimension():
    for dim in (0, 1, None):
        torch.manual_seed(0)
        model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 4), dim=dim), nn.Tanh()).double()
        expected = hessian_by_differences(model, *rows()).trace().item()
        assert an.trace(model, ce, rows(), method="exact").value == pytest.approx(expected, rel=1e-6)


def by_frequency(frozen=False):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 3, scale_grad_by_freq=True), nn.Flatten(), nn.Linear(15, 4)).double()
    model[0].requires_grad_(not frozen)
    return model


class Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clamp(-1e-3, 1e-3)


def clipped(frozen=False):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(15, 4), Applied(Clipped.apply), nn.Linear(4, 4)).double()
    model[1].requires_grad_(not frozen)
    return model


SECOND = {
    "influence": lambda m, d: an.influence(m, ce, ce, d, d, 0.1),
    "ggn": lambda m, d: an.trace(m, ce, d, matrix="ggn", method="exact"),
    "hessian": lambda m, d: an.trace(m, ce, d, method="exact"),
}


@pytest.mark.parametrize("function", SECOND)
@pytest.mark.parametrize("make, data", [(by_frequency, tokens), (clipped, sequences)])
def test_a_backward_pass_without_a_right_derivative_is_refused_and_the_remedy_works(make, data, function):
    with pytest.raises(NotImplementedError, match="no right derivative|not symmetric") as caught:
        SECOND[function](make(), data())
    assert "requires_grad=False" in str(caught.value)
    model = make(frozen=True)
    SECOND[function](model, data())
    assert an.trace(model, ce, data(), method="exact").value == pytest.approx(hessian(model, *data()).trace().item())


def test_forward_mode_where_a_backward_pass_cannot_be_differentiated():
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(6, 5), nn.Hardsigmoid(), nn.Dropout(0.2), nn.Linear(5, 4)).double(), rows()
    expected = gauss_newton(model.eval(), *data)
    assert SECOND["ggn"](model, data).value == pytest.approx(expected.trace().item())
    top = an.top_eigenpairs(model, ce, [(data[0][:2], data[1][:2]), (data[0][2:], data[1][2:])], matrix="ggn")
    assert top.values[0] == pytest.approx(torch.linalg.eigvalsh(expected)[-1].item(), rel=1e-6)
    torch.manual_seed(3)  # the masks of both passes are the same
    found = an.influence(model.train(), ce, ce, data, rows(seed=1), 0.1)
    torch.manual_seed(3)
    v = gradient(model, *rows(seed=1))
    torch.manual_seed(3)
    assert found.influence.sum().item() == pytest.approx(-0.1 * (v @ gradient(model, *data)).item())
    with pytest.raises(NotImplementedError, match="hardsigmoid_backward.*that torch differentiates twice"):
        SECOND["hessian"](model, data)


@pytest.mark.parametrize("function", SECOND)
def test_what_neither_way_can_differentiate_is_refused(function):
    torch.manual_seed(0)
    bag = nn.Sequential(nn.EmbeddingBag(5, 3), nn.Linear(3, 4)).double()
    with untouched(bag), pytest.raises(NotImplementedError, match="embedding_bag.*that torch differentiates twice"):
        SECOND[function](bag, tokens())
    with pytest.raises(NotImplementedError, match="use_reentrant=False"):
        SECOND[function](Checkpointed(reentrant=True).double(), rows())


@pytest.mark.parametrize("function", SECOND)
def test_a_derivative_that_is_not_finite_is_named(function):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), Applied(lambda h: h + (0 * h).sqrt())).double()
    with pytest.raises(ValueError, match="not finite"):
        SECOND[function](model, rows())


def test_a_sparse_embedding():
    torch.manual_seed(0)
    sparse = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Flatten(), nn.Linear(15, 4)).double()
    dense = nn.Sequential(nn.Embedding(5, 3, _weight=sparse[0].weight.detach()), *sparse[1:])
    for call in (
        lambda m: an.per_sample_gradients(m, ce, tokens()),
        lambda m: SECOND["influence"](m, tokens()).influence,
    ):
        torch.testing.assert_close(call(sparse), call(dense))
    assert SECOND["hessian"](sparse, tokens()).value == pytest.approx(SECOND["hessian"](dense, tokens()).value)


def test_half_precision_is_computed_in_single():
    torch.manual_seed(0)
    x, y = torch.randn(12, 6).bfloat16(), torch.randint(4, (12,))
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 4)).bfloat16()
    wide = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 4))
    wide.load_state_dict(model.state_dict())
    for function in (
        lambda m, d: an.top_eigenpairs(m, ce, d).values[0],
        lambda m, d: an.trace(m, ce, d, matrix="ggn").value,
        lambda m, d: an.spectral_density(m, ce, d, nodes=5).density.max(),
        lambda m, d: an.sharpness(m, ce, d),
    ):
        with untouched(model):
            assert function(model, (x, y)) == pytest.approx(function(wide, (x.float(), y)), rel=1e-4)
    casts = nn.Sequential(Applied(lambda x: x.bfloat16()), nn.Linear(6, 4).bfloat16())
    with pytest.raises(ValueError, match=r"in float32.*model.float\(\)"):
        an.trace(casts, ce, (x, y))


def test_a_state_dict_with_both_names_of_a_tied_layer():
    torch.manual_seed(0)
    model, other, data = Alias().double(), Alias().double(), rows()
    state = other.state_dict()
    assert {"head.weight", "body.2.weight"} <= state.keys()
    (found,), (expected,) = an.mean_gradients(model, [ce], data, state), an.mean_gradients(other, [ce], data)
    assert list(found) == [name for name, _ in model.named_parameters()]
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    short = {name: value for name, value in state.items() if not name.startswith("body.2")}
    (found,) = an.mean_gradients(model, [ce], data, short)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    ends = [an.line(m, ce, data, positions=[0]).losses[0] for m in (model, other)]
    path = an.interpolate(model, ce, data, model.state_dict(), short, positions=[0, 1])
    assert path.losses.tolist() == pytest.approx(ends)
    with pytest.raises(ValueError, match="different values for .* which the model ties; give one"):
        an.mean_gradients(model, [ce], data, {**state, "head.weight": torch.zeros(4, 5).double()})


def test_a_recurrent_layer_keeps_its_own_weights():
    torch.manual_seed(0)
    model = Recurrent().double()
    an.trace(model, ce, sequences(), products=3)
    an.per_sample_gradients(model, ce, sequences())
    own = [getattr(model.cell, name) for name in model.cell._flat_weights_names]
    assert all(a is b for a, b in zip(model.cell._flat_weights, own, strict=True))
    before = model(sequences()[0])
    with torch.no_grad():
        model.cell.weight_ih_l0 *= 2
    assert not torch.allclose(before, model(sequences()[0]))


def test_a_pass_that_a_gradient_is_pending_for_is_not_disturbed():
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)).double(), rows()
    value = ce(model(data[0]), data[1])
    recorder = an.Recorder(norms=lambda model, loss: an.gradient_norms(model, loss, data))
    recorder(0, model, ce)
    recorder.replay(model, ce, [(1, {name: 2 * value for name, value in model.state_dict().items()})])
    an.sharpness(model, ce, data)
    value.backward()


def test_two_threads_find_what_one_finds():
    names, errors = ("a scale under no_grad", "LSTM", "encoder", "old weight_norm"), []

    def numbers(model, data):
        return [
            *an.influence(model, ce, ce, data, data, 0.1).influence.tolist(),
            an.trace(model, ce, data, products=3, repeats=2, matrix="ggn").value,
            an.per_sample_gradients(model, ce, data).norm().item(),
            *an.line(model, ce, data, positions=[0, 1]).losses,
            an.sharpness(model, ce, data),
        ]

    expected = {name: numbers(*made(name)) for name in names}
    finished = []

    def work(problems):
        try:
            for _ in range(2):
                for name, problem in problems.items():
                    assert numbers(*problem) == expected[name], name
                    finished.append(name)
        except BaseException as error:
            errors.append(error)

    orders = [{name: made(name) for name in order} for order in (names, names[::-1])]
    threads = [threading.Thread(target=work, args=(problems,)) for problems in orders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(finished) == 16


def text_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(5, 3), nn.Tanh(), nn.Flatten(), nn.Linear(15, 4)).double()


@pytest.mark.parametrize("baseline", [0, torch.tensor([0, 0, 1, 1, 2])])
def test_token_ids_are_attributed_to_their_embedding(baseline):
    model, (ids, _) = text_model(), tokens()
    found = an.integrated_gradients(model, ids, target=1, baseline=baseline, steps=64, layer="0")
    start = torch.as_tensor(baseline).expand_as(ids)
    captum = LayerIntegratedGradients(model, model[0]).attribute(ids, start, target=1, n_steps=64)
    assert found.values.shape == (6, 5, 3)
    torch.testing.assert_close(found.values, captum.detach(), rtol=1e-9, atol=1e-12)
    a, b = model[0](ids).detach(), model[0](start).detach()
    by_hand = torch.zeros_like(a)
    for part in (torch.arange(4000).double() + 0.5) / 4000:
        point = (b + part * (a - b)).requires_grad_()
        by_hand += torch.autograd.grad(model[1:](point)[:, 1].sum(), point)[0] * (a - b) / 4000
    torch.testing.assert_close(found.values, by_hand, rtol=1e-5, atol=1e-8)
    assert found.delta.abs().max() < 1e-6
    with pytest.raises(ValueError, match="must be ids, whole numbers; got 0.5"):
        an.integrated_gradients(model, ids, target=1, baseline=0.5, layer="0")


@pytest.mark.parametrize(
    "change", [lambda h: F.relu(h, inplace=True), lambda h: h.relu_(), lambda h: h.add_(1).tanh(), lambda h: h.mul_(3)]
)
def test_in_place_changes_of_a_layers_output(change):
    torch.manual_seed(0)
    first, last, x = nn.Conv2d(1, 2, 3), nn.Linear(32, 4), torch.randn(3, 1, 6, 6, dtype=torch.float64)
    model = nn.Sequential(first, Applied(change), nn.Flatten(), last).double()
    above = nn.Sequential(Applied(lambda h: change(h.clone())), nn.Flatten(), last)
    with untouched(model):
        found = an.integrated_gradients(model, x, target=1, layer="0")
        cam = an.grad_cam(model, x, "0", target=1, relu=False)
    hidden, start = first(x).detach(), first(torch.zeros_like(x)).detach()
    expected = IntegratedGradients(above).attribute(hidden, start, target=1, n_steps=64)
    torch.testing.assert_close(found.values, expected.detach(), rtol=1e-9, atol=1e-12)
    hidden.requires_grad_()
    (slope,) = torch.autograd.grad(above(hidden)[:, 1].sum(), hidden)
    maps = (slope.mean((2, 3), keepdim=True) * hidden).sum(1, keepdim=True).detach()
    expected = F.interpolate(maps, (6, 6), mode="bilinear")
    torch.testing.assert_close(cam.values, expected, rtol=1e-9, atol=1e-12)


def test_inputs_that_the_model_changes_in_place_stay():
    torch.manual_seed(0)
    model, (x, y) = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 4)).double(), rows()
    before = x.clone()
    for function in (an.gradient_norms, an.per_sample_gradients, an.trace, an.sharpness, an.line, an.target_gradients):
        function(model, ce, (x, y))
    an.influence(model, ce, ce, (x, y), (x, y), 0.1)
    an.predictions(model, (x, y))
    an.integrated_gradients(model, x)
    assert torch.equal(x, before)


def test_there_is_one_door():
    sources = {path.name: path.read_text(encoding="utf-8") for path in Path(an.__file__).parent.glob("*.py")}
    assert not [name for name, text in sources.items() if "functional_call" in text or "deepcopy" in text]
