"""Mutation testing: change one thing in a module, run its tests, and see whether they notice.

    python tests/trust/mutants.py                 # a seeded sample of each module below
    python tests/trust/mutants.py --sample 1000   # all of them; takes two hours
    python tests/trust/mutants.py --only updates  # one module

A mutant is a comparison, an arithmetic or logical operator, a number, a flag, a condition or a whole call turned into
another. It lives in a process forked from one that has torch imported, so no file is touched. Survivors are listed:
each is a test to write, or makes no difference and is explained below.
"""

import argparse
import ast
import importlib
import importlib.machinery
import os
import random
import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = {
    "adalfl_lite.engines.updates": "adalfl_lite/engines/test_updates.py",
    "adalfl_lite.passes": "adalfl_lite/test_passes.py adalfl_lite/learn/test_online.py",
    "adalfl_lite.engines.steps": (
        "adalfl_lite/engines/test_clipping.py adalfl_lite/test_passes.py trust/test_bad_input.py"
    ),
    "adalfl_lite.engines.unrolled": (
        "adalfl_lite/engines/test_forward.py adalfl_lite/engines/test_clipping.py adalfl_lite/learn/test_online.py"
    ),
    "adalfl_lite.engines.forward": (
        "trust/test_gaps.py adalfl_lite/engines/test_forward.py adalfl_lite/learn/test_online.py"
    ),
    "adalfl_lite.engines.tangents": "adalfl_lite/engines/test_tangents.py",
    "adalfl_lite.engines.closed_form": "adalfl_lite/engines/test_closed_form.py trust/test_gaps.py",
    "adalfl_lite.engines.stacked": "adalfl_lite/engines/test_stacked.py",
    "adalfl_lite.engines.recorded": "adalfl_lite/learn/test_online.py adalfl_lite/test_passes.py",
    "adalfl_lite.engines.finite_difference": "adalfl_lite/engines/test_tangents.py adalfl_lite/learn/test_online.py",
    "adalfl_lite.learn.online": "adalfl_lite/learn/test_online.py",
    "adalfl_lite.learn.stacked": "adalfl_lite/learn/test_stacked.py",
    "adalfl_lite.learn.meta_learning": "adalfl_lite/learn/test_initialisation.py",
    "adalfl_lite.losses.activations": "adalfl_lite/losses/test_network.py adalfl_lite/engines/test_closed_form.py",
    "adalfl_lite.engines.compiled": "adalfl_lite/engines/test_compiled.py",
    "adalfl_lite.losses.network": "adalfl_lite/losses/test_network.py",
    "adalfl_lite.learn.learning_rate": "adalfl_lite/learn/test_learning_rate.py",
    "analysis.attribution": "analysis/test_attribution.py",
    "analysis.calibration": "analysis/test_calibration.py",
    "analysis.curvature": "analysis/test_curvature.py -k not(learned)",
    "analysis.early_stopping": "analysis/test_early_stopping.py",
    "analysis.effective_lr": "analysis/test_effective_lr.py",
    "analysis.gradients": "analysis/test_gradients.py",
    "analysis.label_smoothing": "analysis/test_label_smoothing.py",
    "analysis.landscape": "analysis/test_landscape.py",
    "analysis.loss_shapes": "analysis/test_loss_shapes.py",
    "analysis.statistics": "analysis/test_statistics.py",
}
_FILTER = 'warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)  # by torch itself'
_MEMORY = "torch.empty(2**25 - 2**16, dtype=torch.uint8)  # freed at once, which raises the limit above which it does"
_MASK = "tangent, primal, gain, None, None, mean, scale, training, eps, [True, False, False]"
EQUIVALENT = {
    "adalfl_lite.losses.activations": {
        "0.0 -> 1.0 at column 54 of return z.clamp_min(0), (z > 0).to(z.dtype), None, 0.0": "a factor of no sigmoid",
    },
    "adalfl_lite.engines.compiled": {
        "USub dropped at column 40 of self.outputs = prediction.shape[-1]": "predictions of classes are (B, C)",
    },
    "adalfl_lite.engines.stacked": {
        f"call dropped at column 8 of {_FILTER}": "torch gives that warning once in a process; no number changes",
        f"Pow -> Mult at column 19 of {_MEMORY}": "how much memory is kept between steps; no number changes",
        f"Sub -> Add at column 24 of {_MEMORY}": "as above",
        f"16 -> 17 at column 27 of {_MEMORY}": "as above",
    },
    "adalfl_lite.engines.tangents": {
        f"False -> True at column 85 of {_MASK}": "a gradient more is computed, and left",
    },
    "analysis.calibration": {
        "2 -> 3 at column 16 of high *= 2": "the root is bracketed by longer steps, and found all the same",
    },
}
"""The survivors that make no difference, and why."""

PRELOADED = (
    "torch",
    "torch._dynamo",
    "torch.func",
    "torchvision",
    "torchmetrics",
    "sklearn.datasets",
    "seaborn",
    "hypothesis",
)
NEEDED = 0.8
SECONDS = 240  # a mutant that takes longer is one that hangs

SWAPS = {
    **{ast.Lt: ast.GtE, ast.LtE: ast.Gt, ast.Gt: ast.LtE, ast.GtE: ast.Lt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
    **{ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And},
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult},
}


class Mutator(ast.NodeTransformer):
    """Changes the ``chosen``-th place that can be changed, and counts them all."""

    def __init__(self, chosen: int = -1):
        self.chosen, self.count = chosen, 0
        self.what, self.line, self.column = "", 0, 0

    def _change(self, node: ast.AST, what: str) -> bool:
        self.count += 1
        if self.count - 1 == self.chosen:
            self.what, self.line, self.column = what, node.lineno, node.col_offset  # type: ignore[attr-defined]
            return True
        return False

    def _swap(self, after: ast.AST, operator: ast.AST) -> ast.AST:
        new = SWAPS.get(type(operator))
        changed = new and self._change(after, f"{type(operator).__name__} -> {new.__name__}")
        return new() if changed else operator  # type: ignore[misc]

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        union = isinstance(node.op, ast.BitOr)
        node.op = node.op if union else self._swap(node.right, node.op)  # type: ignore[assignment]
        return node

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        self.generic_visit(node)
        node.op = self._swap(node.values[-1], node.op)  # type: ignore[assignment]
        return node

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        node.ops[0] = self._swap(node.comparators[0], node.ops[0])  # type: ignore[call-overload]
        return node

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        self.generic_visit(node)
        dropped = isinstance(node.op, ast.Not | ast.USub) and self._change(node, f"{type(node.op).__name__} dropped")
        return node.operand if dropped else node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, bool):
            return ast.Constant(not node.value) if self._change(node, f"{node.value} -> {not node.value}") else node
        if isinstance(node.value, int | float) and self._change(node, f"{node.value} -> {node.value + 1}"):
            return ast.Constant(node.value + 1)
        return node

    def visit_If(self, node: ast.If) -> ast.AST:
        self.generic_visit(node)
        if self._change(node.test, "condition negated"):
            node.test = ast.UnaryOp(ast.Not(), node.test)
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        if isinstance(node.value, ast.Constant):
            return node  # a docstring
        self.generic_visit(node)
        return ast.Pass() if self._change(node, "call dropped") else node

    def visit_keyword(self, node: ast.keyword) -> ast.AST:
        return node if node.arg in ("strict", "frozen") else self.generic_visit(node)  # guards without effect

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        return node  # the wording of an error

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        if node.name.startswith("plot_"):
            return node  # looked at, not computed with
        node.body = [self.visit(statement) for statement in node.body]  # not the annotations
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.value = self.visit(node.value) if node.value else None
        return node


def mutated(source: str, chosen: int) -> tuple[ast.Module, Mutator]:
    """The module with one place changed, and what was changed in it."""
    mutator = Mutator(chosen)
    return ast.fix_missing_locations(mutator.visit(ast.parse(source))), mutator


def killed(name: str, tree: ast.Module, tests: list[str]) -> bool:
    """Whether the tests fail with ``tree`` in the place of the module, in a process of their own."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] != 0
    signal.alarm(SECONDS)
    real = importlib.machinery.SourceFileLoader.get_code

    def get_code(loader, fullname):  # type: ignore[no-untyped-def]
        return compile(tree, loader.path, "exec") if fullname == name else real(loader, fullname)

    importlib.machinery.SourceFileLoader.get_code = get_code  # type: ignore[method-assign]
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        options = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", "--rootdir", str(ROOT)]
        os.chdir(ROOT / "tests")
        os._exit(int(pytest.main([*options, *tests])))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, default=8, help="mutants per module")
    parser.add_argument("--only", default="", help="part of a module's name")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    for module in PRELOADED:
        importlib.import_module(module)
    importlib.import_module("torch").set_num_threads(1)
    tried, dead, explained = 0, 0, 0
    for name, arguments in MODULES.items():
        if options.only not in name:
            continue
        tests = arguments.split(" ")
        source = (ROOT / name.replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8")
        unchanged, counted = mutated(source, -1)
        if killed(name, unchanged, tests):
            sys.exit(f"{name}: the tests fail without a mutation; run {arguments} first")
        chosen = sorted(random.Random(options.seed).sample(range(counted.count), min(options.sample, counted.count)))
        survivors = []
        for place in chosen:
            tree, mutator = mutated(source, place)
            if not killed(name, tree, tests):
                text = source.splitlines()[mutator.line - 1].strip()
                survivors.append((mutator.line, f"{mutator.what} at column {mutator.column} of {text}"))
        reasons = [EQUIVALENT.get(name, {}).get(what) for _, what in survivors]
        tried, dead = tried + len(chosen), dead + len(chosen) - len(survivors)
        explained += sum(reason is not None for reason in reasons)
        print(f"{name}: {len(chosen) - len(survivors)} of {len(chosen)} killed ({counted.count} possible)", flush=True)
        for (line, what), reason in zip(survivors, reasons, strict=True):
            print(f"    line {line}: {what}  # {reason or 'survived'}", flush=True)
    print(f"{explained:6d}  mutants that make no difference, each explained")
    print(f"{dead:6d}  mutants killed, of {tried}")
    return int(dead < NEEDED * (tried - explained))


if __name__ == "__main__":
    sys.exit(main())
