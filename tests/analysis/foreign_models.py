"""Models of the kind that people bring, and a proof that a diagnostic left one exactly as it was."""

import threading
from collections import deque
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models import Apply


def rows(n=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=g, dtype=torch.float64), torch.randint(4, (n,), generator=g)


def sequences(n=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 5, 3, generator=g, dtype=torch.float64), torch.randint(4, (n,), generator=g)


def tokens(n=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(1, 5, (n, 5), generator=g), torch.randint(4, (n,), generator=g)


def used_twice():
    a = nn.PReLU()
    return nn.Sequential(nn.Linear(6, 5), a, nn.Linear(5, 5), a, nn.Linear(5, 4))


class Alias(nn.Module):
    """The last layer has two names."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
        self.head = self.body[2]

    def forward(self, x):
        return self.body(x)


class Counter(nn.Module):
    """Counts its calls in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x


class Keeps(nn.Module):
    """Keeps its features, counts its calls, and holds what cannot be copied."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 4)
        self.calls, self.seen, self.recent = 0, {}, deque(maxlen=2)
        self.count, self.lock = torch.zeros(()), threading.Lock()
        self.counter = [Counter()]  # in a list, so that it is no submodule

    def forward(self, x):
        self.features = torch.tanh(self.first(self.counter[0](x)))
        self.calls += 1
        self.count += 1
        self.seen["last"] = self.features
        self.recent.append(self.features)
        return self.last(self.features)


class Held(nn.Module):
    """A scale is held constant."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        with torch.no_grad():
            scale = h.abs().mean(-1, keepdim=True)
        return self.b(h / scale)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.last = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 4)

    def forward(self, x):
        return self.last(self.cell(x)[0][:, -1])


class Bert(nn.Module):
    """Token ids, positions, padding, two encoder layers, and a decoder that is tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.embedding, self.positions = nn.Embedding(5, 4, padding_idx=0), nn.Parameter(torch.randn(5, 4))
        layer = nn.TransformerEncoderLayer(4, 2, 8, 0.0, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.decoder = nn.Linear(4, 5)
        self.decoder.weight = self.embedding.weight

    def forward(self, x):
        h = self.encoder(self.embedding(x) + self.positions, src_key_padding_mask=x == 0)
        return self.decoder(h.mean(1))[:, :4]


def encoder():
    layer = nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True)
    return nn.Sequential(nn.Linear(3, 4), nn.TransformerEncoder(layer, 1), nn.Flatten(), nn.Linear(20, 4))


def weight_normed():
    return nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 5)), nn.Tanh(), nn.utils.weight_norm(nn.Linear(5, 4)))


def spectral_normed():
    return nn.Sequential(nn.utils.spectral_norm(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 4))


def frozen():
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(inplace=True), nn.Linear(5, 4))
    model[0].requires_grad_(False)
    return model


def hooked():
    """The gradient is halved on its way, by a hook on an activation."""

    def halve(h):
        h = h.clone()
        if h.requires_grad:
            h.register_hook(lambda gradient: 0.5 * gradient)
        return h

    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), Apply(halve), nn.Linear(5, 4))


class Rounded(torch.autograd.Function):
    """Straight through."""

    @staticmethod
    def forward(ctx, x):
        return torch.round(4 * x) / 4

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def rounded():
    return nn.Sequential(nn.Linear(6, 5), Apply(Rounded.apply), nn.Tanh(), nn.Linear(5, 4))


class Checkpointed(nn.Module):
    def __init__(self, reentrant=False):
        super().__init__()
        self.a, self.b, self.c, self.reentrant = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 4), reentrant

    def forward(self, x):
        h = torch.utils.checkpoint.checkpoint(self.inner, torch.tanh(self.a(x)), use_reentrant=self.reentrant)
        return self.c(h)

    def inner(self, h):
        return torch.tanh(self.b(h))


def in_place():
    return nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 5), nn.SiLU(inplace=True), nn.Linear(5, 4))


# name: (model, data, a layer)
MODELS = {
    "a PReLU used twice": (used_twice, rows, "2"),
    "a layer under two names": (Alias, rows, "head"),
    "keeps its features": (Keeps, rows, "first"),
    "old weight_norm": (weight_normed, rows, "0"),
    "encoder": (encoder, sequences, "1"),
    "a scale under no_grad": (Held, rows, "a"),
    "a frozen part": (frozen, rows, "0"),
    "LSTM": (Recurrent, sequences, "last"),
    "BERT": (Bert, tokens, "embedding"),
    "old spectral_norm": (spectral_normed, rows, "0"),
    "a hook on an activation": (hooked, rows, "1"),
    "straight-through": (rounded, rows, "0"),
    "checkpointed": (Checkpointed, rows, "a"),
    "in place": (in_place, rows, "1"),
}


def made(name, training=True):
    """The model after a forward pass, with a grad, and its data."""
    make, data, _ = MODELS[name]
    torch.manual_seed(0)
    model = make().double()
    model(data(seed=9)[0].clone())
    first = next(p for p in model.parameters() if p.requires_grad)
    first.grad = torch.ones_like(first)
    return model.train(training), data()


def everything(root, seen=None):
    """All that a module holds: (where, identity, value), in order; also within modules in plain lists."""
    seen = {} if seen is None else seen
    waiting, found = [("", root)], []
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, Tensor):
            grad = value.grad if value.is_leaf else None
            found.append((path, value, value.detach().clone(), value.requires_grad, grad))
        elif isinstance(value, nn.Module | dict | list | tuple | set | deque):
            found.append((path, value, None, None, None))
            if id(value) not in seen:
                seen[id(value)] = value
                inner = vars(value) if isinstance(value, nn.Module) else value
                pairs = inner.items() if isinstance(inner, dict) else enumerate(inner)
                waiting += [(f"{path}.{key}", part) for key, part in pairs]
        else:
            found.append((path, value, None, None, None))
    return found


@contextmanager
def untouched(*modules):
    """Assert that a block leaves every object that the modules hold, its value, and torch's random state."""
    before, random = [everything(module) for module in modules], torch.get_rng_state()
    try:
        yield
    finally:
        assert torch.equal(random, torch.get_rng_state()), "the random state has moved"
        for old, module in zip(before, modules, strict=True):
            new = everything(module)
            assert [part[0] for part in old] == [part[0] for part in new]
            for (path, a, value, required, grad), (_, b, now, still_required, new_grad) in zip(old, new, strict=True):
                assert a is b or (not isinstance(a, Tensor | nn.Module) and a == b), path
                assert value is None or torch.equal(value, now), path
                assert required == still_required and grad is new_grad, path


def cross_entropy_that_fails(after):
    """A loss that raises at its call number ``after``."""
    calls = []

    def loss(prediction, target):
        calls.append(1)
        if len(calls) > after:
            raise ArithmeticError("midway")
        return F.cross_entropy(prediction, target)

    return loss
