"""The table of what fits and what is refused says what the judge of any model says, of the cases that both have."""

import importlib.util
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from bs4 import BeautifulSoup

from tests.trust.reference import judge_all
from tests.trust.test_any_model import ALL, FOLLOWED

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "book" / "_build" / "html" / "your_data.html"
spec = importlib.util.spec_from_file_location("cases", ROOT / "book" / "cases.py")
cases = sys.modules["cases"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cases)

SAME = {
    "a layer used twice": "one PReLU used twice",
    "tied weights": "tied weights",
    "BatchNorm and dropout, in train mode": "BatchNorm, train",
    "a Transformer encoder": "encoder layer, train",
    "an LSTM": "LSTM, both ways",
    "complex weights, with Adam": "Adam, complex weights",
    "a constant under `torch.no_grad()`": "scale taken under no_grad",
    "straight-through rounding by `detach`": "straight-through rounding",
    "a checkpoint, not reentrant": "checkpoint",
    "a Function without a forward derivative": "a Function with true derivatives",
    "a Function that can be differentiated once": "a Function that differentiates once",
    "a gradient hook on an activation": "activation hook that scales",
    "a bag of embeddings": "nn.EmbeddingBag, sum",
    "a gradient hook on a parameter": "tensor hooks that scale",
    "a step hook on the optimizer": "step hook that clips",
    "an optimizer with a `step` of its own": "a subclass that clips, mlp",
    "a `.grad` that is there already": "a stale gradient",
    "an embedding with `max_norm`": "nn.Embedding with max_norm",
    "an embedding with sparse gradients": "nn.Embedding with sparse gradients",
    "a lazy layer": "not yet initialised",
}
"""Cases of the book -> the judge's."""

OWN = {"micro batches", "clipping, `clip_gradient_norm=`"}


@pytest.fixture(scope="module")
def found():
    return cases.verdicts()


def right_with(verdicts):
    return [engine for engine, text in verdicts.items() if text == "right"]


def test_every_case_is_in_both_tables_or_said_not_to_be():
    assert SAME.keys() | OWN == cases.CASES.keys()


@pytest.mark.parametrize("case", SAME)
def test_the_verdicts_are_the_judges(case, found):
    problem = ALL.get(SAME[case]) or FOLLOWED[SAME[case]]
    verdicts = judge_all(problem, Counter(), "steps")
    assert all(verdict.kind != "fault" for verdict in verdicts.values())
    assert right_with(found[case]) == [engine for engine, verdict in verdicts.items() if verdict.kind == "right"]


def test_clipping_and_micro_batches(found):
    assert right_with(found["micro batches"]) == ["forward", "unrolled"]
    assert right_with(found["clipping, `clip_gradient_norm=`"]) == list(cases.ENGINES)


def test_a_step_that_is_not_the_plain_loops_is_noticed(monkeypatch):
    """An option that the plain loop does not have, and one that it alone has."""
    with pytest.raises(AssertionError, match="θ is not the plain loop's"):
        cases.verdict(cases.Case(options={"clip_gradient_norm": cases.CLIP}), "forward")
    with pytest.raises(AssertionError, match="θ is not the plain loop's"):
        cases.verdict(cases.Case(before_step=cases.clip), "forward")
    real = cases.slope
    monkeypatch.setattr(cases, "slope", lambda case, direction: 1.0001 * real(case, direction))
    with pytest.raises(AssertionError, match="forward: .* for "):
        cases.verdict(cases.Case(), "forward")


def test_a_refusal_that_has_changed_something_is_noticed(monkeypatch):
    def spoil(self, batches, meta_batch):
        with torch.no_grad():
            next(self.model.parameters()).add_(1)
        raise ValueError("no; do otherwise")

    monkeypatch.setattr(cases.OnlineLoss, "meta_gradient", spoil)
    with pytest.raises(AssertionError):
        cases.verdict(cases.Case(), "forward")


@pytest.mark.parametrize("case", ["a checkpoint, not reentrant", "a `.grad` that is there already", "a lazy layer"])
def test_a_message_is_parted_into_its_first_clause_and_its_remedy(case, found):
    text = next(text for text in found[case].values() if text != "right")
    what, remedy = cases.parted(text)
    assert remedy and text.endswith(remedy) and what.split()[-1] in text and what != remedy


def test_the_built_page_shows_the_table(found):
    if not PAGE.is_file():
        pytest.skip("the book is not built: run `make book` first")
    page = BeautifulSoup(PAGE.read_text(), "html.parser")
    lines = [[cell.text for cell in line("td")] for table in page("table") for line in table("tr")]
    shown = {line[0]: line[1] for line in lines if len(line) == 3}
    for case, verdicts in found.items():
        right = right_with(verdicts)
        expected = "all" if right == list(cases.ENGINES) else ", ".join(right) or "none"
        assert shown[case.replace("`", "")] == expected
