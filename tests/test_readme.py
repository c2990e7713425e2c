"""What the README shows works: its program runs, its commands and its links are there."""

import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch

import adalfl_lite

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PROGRAM, DIAGNOSTICS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_program_runs_as_printed(monkeypatch):
    short = partial(adalfl_lite.initialise, steps=20, imitation_steps=20, rehearsals=1, rehearsal_steps=10)
    monkeypatch.setattr(adalfl_lite, "initialise", short)
    before = PROGRAM.count("range(1000)")
    names: dict = {}
    torch.manual_seed(0)
    exec(PROGRAM.replace("range(1000)", "range(15)").replace("progress=True", "progress=False"), names)
    assert before == 1 and names["step"] == 14
    assert torch.isfinite(names["log"].task_loss)


def test_the_diagnostics_run_as_printed(capsys):
    torch.manual_seed(0)
    exec(DIAGNOSTICS, {})
    printed = capsys.readouterr().out
    assert len(printed) < 1000 and "scale=" in printed
    assert abs(float(re.search(r"epsilon=([\d.]+)", printed).group(1)) - 0.1) < 1e-3


def test_the_method_is_five_lines():
    last = PROGRAM.strip().splitlines()[-5:]
    assert last[0].startswith("initialise(") and "online.step" in last[-1]


def test_the_commands_exist():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"book", "test", "setup"} <= set(targets)
    commands = set(re.findall(r"adalfl ([a-z]+)", README))
    shown = subprocess.run([sys.executable, "-m", "adalfl_lite.cli", "--help"], capture_output=True, text=True)
    assert shown.returncode == 0
    assert commands and all(command in shown.stdout for command in commands), (commands, shown.stdout)


def test_links_lead_to_files():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
