"""What a meta step costs, beside a plain step and beside other libraries: python benchmarks/step.py

Every engine makes the same step: θ by SGD with Nesterov momentum under the learned loss, then φ by Adam under the
cross-entropy of a meta batch at the new θ. A plain step is one of the same SGD with the cross-entropy itself.

- Time. In each round every engine makes one step, in random order; its ratio is to the plain step of the same round.
  Ratios are of the process's CPU time on one thread, which other processes disturb little; wall-clock ratios stand
  beside them. Given are the median over the rounds and the quartiles.
- Memory, except where a compiler would count. Each engine runs in a process of its own: the peak resident memory of two
  steps, less the peak of that process after the same engine has stepped a tiny model. So libraries do not count; the
  model, its optimizer's state and all that a step allocates do.
- Agreement. The relative difference of each engine's first meta-gradient from that of double backward.
- The first step, in CPU seconds, compilers that it starts included; nothing compiled earlier is used again.

The peers need ``pip install 'adalfl-lite[bench]'``; ones that are not installed are left out. Writes results/step.json,
where the rows of models that were not measured this time stay.
"""

import argparse
import json
import math
import os
import random
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from record import arguments, begin, labels, save, stored
from torch import Tensor, nn
from torch.func import functional_call

from adalfl_lite import LossNetwork, OnlineLoss, build_model
from adalfl_lite.engines import plain_step

INPUTS = {
    "mlp64": (64,),
    "lenet5": (1, 28, 28),
    "allcnn_c": (3, 32, 32),
    "resnet18": (3, 32, 32),
    "wrn16_8": (3, 32, 32),
}
ROUNDS = {"mlp64": 100, "lenet5": 40, "allcnn_c": 12, "resnet18": 3, "wrn16_8": 3}
OUTPUTS = 10
SGD = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}

Step = Callable[[], list[Tensor] | None]
"""One step; returns the meta-gradient it took, None if it has none."""


class Setting:
    """A model, a loss network and batches, the same for every engine."""

    def __init__(
        self, make_model: Callable[[], nn.Module], shape: tuple[int, ...], batch_size: int, outputs: int = OUTPUTS
    ):
        torch.manual_seed(0)
        self.model = make_model()
        self.network = LossNetwork.classification()
        batches = [(torch.randn(batch_size, *shape), torch.randint(outputs, (batch_size,))) for _ in range(2)]
        self.batch, self.meta_batch = batches
        self.optimizer = torch.optim.SGD(self.model.parameters(), **SGD)
        self.meta_optimizer = torch.optim.Adam(self.network.parameters(), lr=1e-5)
        self.phi = list(self.network.parameters())

    def update_phi(self, gradients: list[Tensor]) -> list[Tensor]:
        """One step of the meta-optimizer, for the engines that leave it to their user."""
        for parameter, gradient in zip(self.phi, gradients, strict=True):
            parameter.grad = gradient
        self.meta_optimizer.step()
        return gradients


def setting(name: str, batch_size: int) -> Setting:
    """With a model of the package."""
    make_model = partial(build_model, name, input_shape=INPUTS[name], outputs=OUTPUTS)
    return Setting(make_model, INPUTS[name], batch_size)


# The engines: Setting -> Step ---------------------------------------------------------------------------------------


def plain(s: Setting) -> Step:
    """A step with the cross-entropy itself, by torch.optim."""

    def step() -> None:
        plain_step(s.model, F.cross_entropy, s.optimizer, s.batch)

    return step


def ours(engine: str, **options: str) -> Callable[[Setting], Step]:
    """One of the engines of OnlineLoss."""

    def build(s: Setting) -> Step:
        online = OnlineLoss(s.model, s.network, s.optimizer, meta_optimizer=s.meta_optimizer, engine=engine, **options)

        def step() -> list[Tensor]:
            batch, meta_batch = s.batch, s.meta_batch
            if engine == "shared":  # a stream, in which each meta batch is the next training batch
                s.batch, s.meta_batch = meta_batch, batch
            return online.step(batch, meta_batch).meta_gradient

        return step

    return build


def functional(s: Setting) -> Step:
    """Double backward written out with torch.func: what one would write without a library."""
    names = [name for name, _ in s.model.named_parameters()]
    parameters = list(s.model.parameters())
    momenta = [torch.zeros_like(p) for p in parameters]

    def step() -> list[Tensor]:
        loss = s.network(functional_call(s.model, dict(zip(names, parameters, strict=True)), s.batch[0]), s.batch[1])
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        moved, new = [], []
        for p, g, m in zip(parameters, gradients, momenta, strict=True):
            g = g + SGD["weight_decay"] * p
            m = SGD["momentum"] * m + g
            moved.append(p - SGD["lr"] * (g + SGD["momentum"] * m))
            new.append(m.detach())
        prediction = functional_call(s.model, dict(zip(names, moved, strict=True)), s.meta_batch[0])
        meta_gradient = list(torch.autograd.grad(F.cross_entropy(prediction, s.meta_batch[1]), s.phi))
        with torch.no_grad():
            for p, q in zip(parameters, moved, strict=True):
                p.copy_(q)
        momenta[:] = new
        return s.update_phi(meta_gradient)

    return step


def by_higher(s: Setting) -> Step:
    """higher, as its examples use it; what it returns is written back into the model.

    Its optimizer is made anew for each step, as there, so momentum starts afresh: a little less work than the others'.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import higher

    def step() -> list[Tensor]:
        with higher.innerloop_ctx(s.model, s.optimizer, copy_initial_weights=False) as (functional_model, optimizer):
            optimizer.step(s.network(functional_model(s.batch[0]), s.batch[1]))
            loss = F.cross_entropy(functional_model(s.meta_batch[0]), s.meta_batch[1])
            meta_gradient = list(torch.autograd.grad(loss, s.phi))
            with torch.no_grad():
                for p, q in zip(s.model.parameters(), functional_model.parameters(), strict=True):
                    p.copy_(q)
        return s.update_phi(meta_gradient)

    return step


def by_torchopt(s: Setting) -> Step:
    """torchopt's MetaSGD, as its examples use it; the graph is cut after each step."""
    import torchopt

    optimizer = torchopt.MetaSGD(s.model, **SGD)

    def step() -> list[Tensor]:
        optimizer.step(s.network(s.model(s.batch[0]), s.batch[1]))
        loss = F.cross_entropy(s.model(s.meta_batch[0]), s.meta_batch[1])
        meta_gradient = list(torch.autograd.grad(loss, s.phi))
        torchopt.stop_gradient(s.model)
        torchopt.stop_gradient(optimizer)
        return s.update_phi(meta_gradient)

    return step


OURS = {engine: ours(engine) for engine in ("forward", "shared", "finite-difference", "unrolled")}
COMPILED = {"compiled": ours("forward", compile="default")}
LIBRARIES = {"higher": by_higher, "torchopt": by_torchopt}
PEERS = {"functional": functional, **LIBRARIES}
ENGINES: dict[str, Callable[[Setting], Step]] = {"plain": plain, **OURS, **COMPILED, **PEERS}


def installed() -> list[str]:
    """The engines that can run here."""
    missing = set()
    for name in LIBRARIES:
        try:
            version(name)
        except PackageNotFoundError:
            missing.add(name)
    return [name for name in ENGINES if name not in missing]


# Measurements -------------------------------------------------------------------------------------------------------


def time_ratios(make: Callable[[], Setting], engines: list[str], rounds: int) -> pd.DataFrame:
    """One row per engine: its seconds, the ratios to the plain step of the same round, and how it began."""
    steps = {engine: ENGINES[engine](make()) for engine in engines}
    opening = {}
    for engine, step in steps.items():  # allocates, chooses kernels, compiles, fills the optimizers' states
        start = os.times()
        found = step()
        opening[engine] = (sum(os.times()[:4]) - sum(start[:4]), found)
    exact = opening["unrolled"][1] if "unrolled" in engines else ENGINES["unrolled"](make())()
    seconds: dict[str, list[tuple[float, float]]] = {engine: [] for engine in engines}
    order = random.Random(0)
    for _ in range(rounds):
        for engine in order.sample(engines, len(engines)):
            cpu, wall = time.process_time(), time.perf_counter()
            steps[engine]()
            seconds[engine].append((time.process_time() - cpu, time.perf_counter() - wall))
    cpu, wall = (pd.DataFrame({engine: [pair[i] for pair in seconds[engine]] for engine in engines}) for i in (0, 1))
    ratios, wall_ratios = cpu.div(cpu["plain"], axis=0), wall.div(wall["plain"], axis=0)
    columns = {
        "cpu_seconds": cpu.median(),
        "time_ratio": ratios.median(),
        "time_ratio_low": ratios.quantile(0.25),
        "time_ratio_high": ratios.quantile(0.75),
        "wall_ratio": wall_ratios.median(),
        "rounds": rounds,
        "first_seconds": {engine: seconds for engine, (seconds, _) in opening.items()},
        "disagreement": {engine: disagreement(found, exact) for engine, (_, found) in opening.items()},
    }
    return pd.DataFrame(columns)


def disagreement(found: list[Tensor] | None, exact: list[Tensor] | None) -> float:
    """‖meta-gradient − the exact one‖ / ‖the exact one‖; NaN for the plain step."""
    if found is None or exact is None:
        return math.nan
    a, b = (torch.cat([g.flatten() for g in gradients]) for gradients in (found, exact))
    return ((a - b).norm() / b.norm()).item()


def peak_memory(name: str, engine: str, batch_size: int) -> float:
    """Mebibytes, measured in a process of its own that gives back at once what is freed."""
    command = [sys.executable, __file__, "--memory-of", name, engine, "--batch-size", str(batch_size)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{engine} on {name}: {result.stderr}")
    return float(result.stdout.split()[-1])


def own_peak_memory(name: str, engine: str, batch_size: int) -> float:
    """What :func:`peak_memory` has the other process do."""
    tiny = ENGINES[engine](setting("lenet5", 2))
    for _ in range(2):
        tiny()
    before = resident_peak()
    step = ENGINES[engine](setting(name, batch_size))
    for _ in range(2):
        step()
    return (resident_peak() - before) / 2**20


def resident_peak() -> int:
    """The largest resident size of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux counts the parent's peak into ru_maxrss
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def profile(name: str, engine: str, batch_size: int) -> dict[str, float]:
    """Milliseconds of the six heaviest operations of one step, and of the rest."""
    step = ENGINES[engine](setting(name, batch_size))
    step()
    with torch.profiler.profile() as found:
        step()
    spent = {event.key: event.self_cpu_time_total / 1e3 for event in found.key_averages()}
    heaviest = dict(sorted(spent.items(), key=lambda item: -item[1])[:6])
    return {**heaviest, "rest": sum(spent.values()) - sum(heaviest.values())}


def measure(name: str, engines: list[str], batch_size: int, rounds: int, with_memory: bool) -> pd.DataFrame:
    """All three measurements of one model, one row per engine."""
    with_memory &= name not in ("mlp64", "lenet5")
    memory = pd.Series(
        {
            engine: peak_memory(name, engine, batch_size) if with_memory and engine != "compiled" else math.nan
            for engine in engines
        }
    )
    table = time_ratios(partial(setting, name, batch_size), engines, rounds)
    table["memory_mebibytes"] = memory
    table["memory_ratio"] = memory / memory["plain"]
    print(f"{name}, batch {batch_size}\n{table.to_string(float_format='%.3g')}\n", flush=True)
    return table.rename_axis("engine").reset_index().assign(model=name, batch_size=batch_size)


def main(given: Sequence[str] | None = None) -> None:
    """Measure or profile the models, one after another, and write each beside what is kept."""
    parser = arguments("step", __doc__)
    parser.add_argument("--models", nargs="+", choices=INPUTS, default=["mlp64", "lenet5", "allcnn_c", "resnet18"])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=installed())
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, help="by default more for small models")
    parser.add_argument(
        "--profile", action="store_true", help="only profile one plain and one exact step of each model"
    )
    parser.add_argument("--no-memory", action="store_true", help="measure times alone")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    options = begin(parser, given)
    torch.compiler.config.force_disable_caches = True
    if options.memory_of:
        print(own_peak_memory(*options.memory_of, options.batch_size))
        return
    engines = ["plain", *(engine for engine in options.engines if engine != "plain")]
    libraries = {name: version(name) for name in LIBRARIES if name in engines}
    result = {"rows": [], "profiles": {}, **stored(options.output), "threads": 1}
    for model in options.models:
        if options.profile:
            spent = pd.DataFrame({name: profile(model, name, options.batch_size) for name in ("plain", "forward")})
            spent = (spent / spent["plain"].sum()).round(3).fillna(0.0)  # in plain steps
            result["profiles"][model] = spent.to_dict()
            print(spent)
        else:
            rounds = options.rounds or ROUNDS[model]
            table = measure(model, engines, options.batch_size, rounds, with_memory=not options.no_memory)
            table = table.assign(**labels(options), **libraries)
            rows = json.loads(table.to_json(orient="records"))  # NaN becomes null
            rows += [row for row in result["rows"] if row["model"] != model]
            result["rows"] = sorted(rows, key=lambda row: list(INPUTS).index(row["model"]))
        save(result, options.output)


if __name__ == "__main__":
    main()
