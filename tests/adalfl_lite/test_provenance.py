"""What tells a part from another of the same name, in this process and in the next."""

import functools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adalfl_lite import Initialiser, LossNetwork
from adalfl_lite.compare.recipes import Given, Learned
from adalfl_lite.provenance import describe_schedule, identity

FACTOR = 2.0


def scaled(factor):
    return lambda prediction, target: factor * F.cross_entropy(prediction, target)


def by_default(factor):
    def loss(prediction, target, factor=factor):
        return factor * F.cross_entropy(prediction, target)

    return loss


def by_global(prediction, target):
    return FACTOR * F.cross_entropy(prediction, target)


def through_a_helper(prediction, target):
    return by_global(prediction, target)


class Module(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, prediction, target):
        return self.factor * F.cross_entropy(prediction, target)


class Object:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, prediction, target):
        return self.factor * F.cross_entropy(prediction, target)

    def method(self, prediction, target):
        return self(prediction, target)


def network(seed):
    torch.manual_seed(int(seed))
    return LossNetwork.classification()


MAKERS = {
    "closure": scaled,
    "default": by_default,
    "module": Module,
    "object": Object,
    "a list in an object": lambda factor: Object([factor, {"a": torch.tensor(factor)}]),
    "method": lambda factor: Object(factor).method,
    "partial": lambda factor: functools.partial(F.cross_entropy, label_smoothing=factor / 10),
    "weights": network,
    "a given loss": lambda factor: Given(scaled(factor)),
    "a network's function": lambda factor: Learned(lambda kind: LossNetwork(kind, hidden=(int(factor),))),
    "settings": lambda factor: Learned(settings=Initialiser(steps=int(factor))),
    "bfloat16": lambda factor: torch.tensor([factor], dtype=torch.bfloat16),
}


@pytest.mark.parametrize("name", MAKERS)
def test_parts_that_differ_in_a_number_alone_are_told_apart_and_equal_ones_are_not(name):
    make = MAKERS[name]
    assert identity(make(1.0)) == identity(make(1.0))
    assert identity(make(1.0)) != identity(make(5.0))


@pytest.mark.parametrize("function", [by_global, through_a_helper])
def test_a_number_of_the_module_counts_where_a_function_names_it_or_calls_one_that_does(function, monkeypatch):
    before = identity(function)
    monkeypatch.setitem(globals(), "FACTOR", 3.0)
    assert identity(function) != before


def test_functions_of_one_name_with_other_code_are_told_apart():
    first, second = (lambda p, t: p.sum() + t.sum()), (lambda p, t: p.sum() - t.sum())
    assert first.__qualname__ == second.__qualname__ and identity(first) != identity(second)


def test_weights_can_be_left_out_and_all_else_stays():
    assert identity(network(0), weights=False) == identity(network(1), weights=False)
    assert identity(network(0), weights=False) != identity(LossNetwork.regression(), weights=False)


def test_a_function_that_calls_itself_and_an_empty_variable():
    def factorial(n):
        return n * factorial(n - 1)

    def unbound():
        return later  # noqa: F821 -- never called

    if False:
        later = 1
    assert identity(factorial) and identity(unbound)


def test_another_process_finds_the_same():
    """Also where strings hash otherwise."""
    code = (
        "from tests.adalfl_lite.test_provenance import MAKERS, identity\n"
        "print('\\n'.join(identity(make(1.0)) for make in MAKERS.values()))"
    )
    here = "\n".join(identity(make(1.0)) for make in MAKERS.values())
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        found = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        )
        assert found.stdout.strip().replace("tests.adalfl_lite.", "") == here.replace("tests.adalfl_lite.", "")


def test_a_schedule_is_known_by_the_code_of_its_function():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)

    def schedule(function):
        return describe_schedule(torch.optim.lr_scheduler.CyclicLR(optimizer, 0.1, 0.2, scale_fn=function), 10)

    assert schedule(lambda x: 1.0) != schedule(lambda x: 0.5)
    assert "functions" not in describe_schedule(torch.optim.lr_scheduler.CyclicLR(optimizer, 0.1, 0.2), 10)
