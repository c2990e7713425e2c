"""EvoMAL: loss functions as expressions, evolved, their coefficients learned by gradient (Raymond et al. 2022, 2023).

An outer search, genetic programming (package ``deap``), looks for the structure of the loss: a tree of operations on
the target y and the prediction p. An inner *local search* makes each candidate a network with a weight on every node
and meta-learns the weights for 250 steps of Adam by differentiating through one step of training a fresh base model:
Algorithm 1 on a loss that happens to be a formula (GECCO 2023, "Fast and efficient local-search for genetic programming
based loss function learning"). Its fitness is the validation error of a model trained with it.

Operations, rates and repair follow the papers as far as we know them; population and generations are ours, far smaller.
Like the authors we sort out hopeless candidates before the costly part, by a rule of our own, :func:`points_downhill`.
"""

from __future__ import annotations

import copy
import math
import operator
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adalfl_lite.losses.stored import StoredLoss
from adalfl_lite.losses.task import Loss, check_kind, output_pairs

GENERATIONS, POPULATION, LOCAL_STEPS = 10, 24, 250
"""Our default budget: at most 264 candidates; those not sorted out have 250 steps of local search and a training."""

CROSSOVER, MUTATION, TOURNAMENT, MAX_NODES = 0.7, 0.25, 4, 25
ALIGNMENT = 0.1
TINY = 1e-7

OPERATIONS: dict[str, tuple[int, Callable[..., Tensor]]] = {
    "add": (2, torch.add),
    "subtract": (2, torch.sub),
    "multiply": (2, torch.mul),
    "divide": (2, lambda a, b: a / (1 + b**2).sqrt()),  # analytical quotient: no pole
    "minimum": (2, torch.minimum),
    "maximum": (2, torch.maximum),
    "square": (1, torch.square),
    "absolute": (1, torch.abs),
    "sign": (1, torch.sign),
    "root": (1, lambda a: (a.abs() + TINY).sqrt()),
    "log": (1, lambda a: (a.abs() + TINY).log()),
    "tanh": (1, torch.tanh),
}
"""Name -> (number of operands, function of tensors); every one is defined for every real number."""

LEAVES = ("y", "p", "one", "minus_one")

Expression = Sequence[str]
"""A tree in prefix order, such as ("absolute", "subtract", "y", "p")."""


class SymbolicLoss(StoredLoss):
    """M_w = 1/(B·C) Σ_b Σ_c e_w(y_bc, p_bc): an expression in which every node's value is multiplied by a weight.

    Args:
        kind: "classification" (p a softmax probability, y one-hot) or "regression".
        expression: the tree in prefix order, of names in :data:`OPERATIONS` and :data:`LEAVES`.

    Raises:
        ValueError: an unknown name, or not exactly one whole tree.
    """

    format = "adalfl-symbolic-loss-1"
    what = "symbolic loss"

    def __init__(self, kind: str, expression: Expression):
        super().__init__()
        self.kind, self.expression = check_kind(kind), tuple(expression)
        self.config = {"kind": kind, "expression": list(expression)}
        open_places = 1
        for name in self.expression:
            if name not in OPERATIONS and name not in LEAVES:
                raise ValueError(f"unknown name {name!r}; known: {', '.join([*OPERATIONS, *LEAVES])}")
            open_places += (OPERATIONS[name][0] if name in OPERATIONS else 0) - 1
            if open_places < 0:
                break
        if open_places != 0:
            raise ValueError(f"{' '.join(self.expression)!r} is not one whole expression in prefix order")
        self.weights = nn.Parameter(torch.ones(len(self.expression)))

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """M_w of a batch, a scalar."""
        p, y = output_pairs(self.kind, prediction, target, self.weights.dtype)
        one = torch.ones_like(p)
        values = {"p": p, "y": y, "one": one, "minus_one": -one}
        # from right to left, the operands of a node are on the stack when it is reached, the first of them on top
        stack: list[Tensor] = []
        for name, weight in zip(reversed(self.expression), reversed(self.weights), strict=True):
            if name in OPERATIONS:
                arity, function = OPERATIONS[name]
                stack.append(weight * function(*(stack.pop() for _ in range(arity))))
            else:
                stack.append(weight * values[name])
        return stack.pop().mean()

    def extra_repr(self) -> str:
        """Show the expression in ``repr(loss)``."""
        return str(self)

    def __str__(self) -> str:
        """The expression without its weights, such as "absolute(subtract(y, p))"."""
        stack: list[str] = []
        for name in reversed(self.expression):
            operands = [stack.pop() for _ in range(OPERATIONS[name][0] if name in OPERATIONS else 0)]
            stack.append(f"{name}({', '.join(operands)})" if operands else name)
        return stack.pop()


def points_downhill(loss: SymbolicLoss, task_loss: Loss, outputs: int, seed: int = 0) -> bool:
    """Whether the loss pushes outputs drawn at random roughly where the task loss does.

    That is, cos(∂M/∂f, ∂L_T/∂f) > 0.1 over 200 of them, hesitant and certain ones. Needs neither data nor model.
    """
    generator = torch.Generator().manual_seed(seed)
    prediction = 3 * torch.rand(200, 1, generator=generator) * torch.randn(200, outputs, generator=generator)
    classes = torch.randint(outputs, (200,), generator=generator)
    target = classes if loss.kind == "classification" else torch.randn(200, outputs, generator=generator)
    prediction.requires_grad_(True)
    pushes = []
    for function in (loss, task_loss):
        (push,) = torch.autograd.grad(function(prediction, target), prediction, materialize_grads=True)
        pushes.append(push.flatten())
    given, wanted = pushes
    return bool(torch.cosine_similarity(given, wanted, dim=0) > ALIGNMENT)


def search_symbolic(
    kind: str,
    score: Callable[[nn.Module], float],
    local_search: Callable[[SymbolicLoss], None],
    *,
    accept: Callable[[SymbolicLoss], bool] = lambda loss: True,
    generations: int = GENERATIONS,
    population: int = POPULATION,
    seed: int = 0,
) -> SymbolicLoss:
    """The symbolic loss with the lowest score that genetic programming finds.

    Args:
        kind: of the task.
        score: what to minimise, such as the validation error after a training with the loss; infinite is allowed.
        local_search: learns the weights of a candidate in place, before it is scored.
        accept: a cheap test; a candidate that fails it is not searched or scored, and counts as infinite.
        generations: after the first population.
        population: expressions per generation; the best of one survives into the next.
        seed: of the search.

    Raises:
        ImportError: ``deap`` is not installed.
        FloatingPointError: every candidate scored infinite.
    """
    from deap import algorithms, base, gp, tools

    class Error(base.Fitness):
        weights = (-1.0,)

    class Candidate(gp.PrimitiveTree):
        def __init__(self, content: Any):
            super().__init__(content)
            self.fitness = Error()

    primitives = gp.PrimitiveSet("loss", 2)
    for name, (arity, function) in OPERATIONS.items():
        primitives.addPrimitive(function, arity, name=name)
    primitives.addTerminal(1.0, name="one")
    primitives.addTerminal(-1.0, name="minus_one")
    primitives.renameArguments(ARG0="y", ARG1="p")

    toolbox = base.Toolbox()
    toolbox.register("draw", gp.genHalfAndHalf, pset=primitives, min_=2, max_=3)
    toolbox.register("mate", gp.cxOnePoint)
    toolbox.register("mutate", gp.mutUniform, expr=lambda pset, type_: gp.genGrow(pset, 0, 2, type_), pset=primitives)
    limit = gp.staticLimit(key=len, max_value=MAX_NODES)
    toolbox.decorate("mate", limit)
    toolbox.decorate("mutate", limit)
    found: dict[tuple[str, ...], tuple[float, SymbolicLoss]] = {}

    def judge(candidates: list[Candidate]) -> None:
        for candidate in candidates:
            _repair(candidate, primitives)
            expression = _names(candidate)
            if expression not in found:
                found[expression] = _judged(SymbolicLoss(kind, expression), accept, score, local_search)
            candidate.fitness.values = (found[expression][0],)

    python_random = random.getstate()  # deap draws from the global generator
    random.seed(seed)
    try:
        people = [Candidate(toolbox.draw()) for _ in range(population)]
        judge(people)
        for _ in range(generations):
            elite = copy.deepcopy(tools.selBest(people, 1))
            chosen = tools.selTournament(people, population - 1, tournsize=TOURNAMENT)
            people = elite + algorithms.varAnd(chosen, toolbox, CROSSOVER, MUTATION)
            judge(people)
    finally:
        random.setstate(python_random)
    error, best = min(found.values(), key=operator.itemgetter(0))
    if not math.isfinite(error):
        raise FloatingPointError("training diverged with every expression tried, or none was accepted; search longer")
    return best


def _judged(
    loss: SymbolicLoss,
    accept: Callable[[SymbolicLoss], bool],
    score: Callable[[nn.Module], float],
    local_search: Callable[[SymbolicLoss], None],
) -> tuple[float, SymbolicLoss]:
    if not {"y", "p"} <= set(loss.expression) or not accept(loss):
        return math.inf, loss
    local_search(loss)
    error = score(loss.requires_grad_(False))
    return (error if math.isfinite(error) else math.inf), loss


def _repair(tree: Any, primitives: Any) -> None:
    """A loss must depend on both arguments: put a missing one in the place of a random leaf, if it has one to spare."""
    for missing, other in (("y", "p"), ("p", "y")):
        names = _names(tree)
        if missing in names:
            continue
        leaves = [i for i, node in enumerate(tree) if node.arity == 0]
        needed = [i for i in leaves if names[i] == other]
        spare = leaves if len(needed) != 1 else [i for i in leaves if i != needed[0]]
        if spare:
            tree[random.choice(spare)] = primitives.mapping[missing]  # noqa: S311 -- no secret


def _names(tree: Any) -> tuple[str, ...]:
    """The tree's names in prefix order; deap keeps arguments under names of its own."""
    return tuple({"ARG0": "y", "ARG1": "p"}.get(node.name, node.name) for node in tree)
