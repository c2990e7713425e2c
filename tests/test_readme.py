"""What the README shows works: its program runs, its commands and its links are there."""

import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from typer.testing import CliRunner

import adalfl_lite
from adalfl_lite.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PROGRAM, DIAGNOSTICS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_program_runs_as_printed(monkeypatch):
    settings = adalfl_lite.Initialiser(steps=20, imitation_steps=20, rehearsals=1, rehearsal_steps=10)
    short = partial(adalfl_lite.initialise, settings=settings)
    monkeypatch.setattr(adalfl_lite, "initialise", short)
    before = PROGRAM.count("range(1000)")
    names: dict = {}
    torch.manual_seed(0)
    exec(PROGRAM.replace("range(1000)", "range(15)").replace("progress=True", "progress=False"), names)
    assert before == 1 and names["step"] == 14
    assert torch.isfinite(names["log"].meta_loss)


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
    lines = re.findall(r"^\.venv/bin/adalfl (.*?)(?: +#.*)?$", README, re.MULTILINE)
    lines += re.findall(r"`adalfl ([^`]+)`", README)
    assert len(lines) >= 7
    for command, *words in map(str.split, lines):
        shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "300", "NO_COLOR": "1"})
        assert shown.exit_code == 0, command
        for option in (word for word in words if word.startswith("--")):
            assert re.search(rf"{option}\b", shown.stdout), (command, option)


def test_the_program_adalfl_is_installed():
    program = Path(sys.executable).with_name("adalfl")
    shown = subprocess.run([program, "tasks"], capture_output=True, text=True)
    assert shown.returncode == 0 and "digits" in shown.stdout


def test_links_lead_to_files():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
