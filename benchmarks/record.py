"""What the benchmarks share: arguments, one thread, and results kept as JSON with what they depend on."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from adalfl_lite.files import atomic_path
from adalfl_lite.provenance import provenance

RESULTS = Path(__file__).parent / "results"


def arguments(name: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser that shows the benchmark's own words; where its results go is an option of all."""
    parser = argparse.ArgumentParser(
        prog=f"python benchmarks/{name}.py", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=RESULTS / f"{name}.json", help="by default %(default)s")
    return parser


def begin(parser: argparse.ArgumentParser, given: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of this run, which from here on has one thread; ``command`` among them says how it was called."""
    given = sys.argv[1:] if given is None else given
    torch.set_num_threads(1)
    return parser.parse_args(given, argparse.Namespace(command=" ".join([parser.prog, *given])))


def labels(options: argparse.Namespace) -> dict[str, str]:
    """What a result says of itself: the command, versions, the processor, the commit."""
    return {"command": options.command, **provenance()}


def stored(path: Path) -> dict[str, Any]:
    """An earlier result, of which rows may stay; empty if there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


def save(result: dict[str, Any], path: Path) -> None:
    """Keep a result, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")
