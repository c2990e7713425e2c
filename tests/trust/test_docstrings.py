"""Every example in a docstring of the two packages runs and gives what it says."""

import doctest
import importlib
import pkgutil

import matplotlib.pyplot as plt
import pytest
import torch

import adalfl_lite
import analysis

MODULES = [
    importlib.import_module(found.name)
    for package in (adalfl_lite, analysis)
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
]
EXAMPLES = [test for module in MODULES for test in doctest.DocTestFinder().find(module) if test.examples]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_example(example):
    plt.close("all")
    torch.manual_seed(0)
    assert doctest.DocTestRunner().run(example).failed == 0
    plt.close("all")


def test_there_are_examples():
    assert len(EXAMPLES) > 20
