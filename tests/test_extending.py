"""What CONTRIBUTING.md says of adding things, done from a folder of one's own, as a user would."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

LOSS = '''
"""A learned loss of one's own, in a file of its own: cross-entropy with a learned temperature."""

import torch
import torch.nn.functional as F


class Temperature(torch.nn.Module):
    kind = "classification"

    def __init__(self):
        super().__init__()
        self.log_scale = torch.nn.Parameter(torch.zeros(()))

    def forward(self, prediction, target):
        return F.cross_entropy(self.log_scale.exp() * prediction, target)
'''

DIAGNOSTIC = '''
"""A diagnostic of one's own: how sure a model is on average."""


def confidence(model, data):
    from analysis.calibration import predictions

    logits, _ = predictions(model, data)
    return {"confidence": logits.softmax(1).max(1).values.mean().item()}
'''

USE = '''
import torch
from my_diagnostic import confidence
from my_loss import Temperature

from adalfl_lite import Initialiser, OnlineLoss, Plain, fit
from adalfl_lite.compare import METHODS, Given, Learned, Method, compare, final_errors, fresh, get_task
from adalfl_lite.engines import ENGINES
from adalfl_lite.engines.forward import Forward
from analysis import Recorder

torch.set_num_threads(1)
settings = Initialiser(steps=10, imitation_steps=0, rehearsals=2, rehearsal_steps=5)
METHODS["temperature"] = Method(
    Learned(lambda kind: Temperature(), settings, ("classification",)), "a learned temperature", online=True
)
METHODS["half"] = Method(Given(lambda p, y: 0.5 * torch.nn.functional.cross_entropy(p, y), ("classification",)), "half")
task = get_task("iris").with_(steps=20)
last = final_errors(compare([task], ["handcrafted", "temperature", "half"], [0, 1], together=True, progress=False))
assert last.groupby("method").size().to_dict() == {"handcrafted": 2, "temperature": 2, "half": 2}
assert set(last[last.method == "temperature"].initialisation_steps) == {10}


class Counting(Forward):
    """An engine of one's own: the exact one, counted."""

    calls = 0

    def __call__(self, batch, meta_batch, undo=None):
        Counting.calls += 1
        return super().__call__(batch, meta_batch, undo)


ENGINES["counting"] = Counting
data = task.load(seed=0)
model, optimizer = fresh(task, data, seed=0)
learner = OnlineLoss(model, Temperature(), optimizer, engine="counting")
recorder = Recorder(sure=lambda model, loss: confidence(model, data.test[:]))
history = fit(learner, data, steps=12, batch_size=20, evaluate_every=6, callback=recorder, progress=False)
assert Counting.calls == 12 and len(recorder.frame("sure")) == 3
assert recorder.frame("sure").confidence.between(1 / 3, 1).all()
print("done", len(history))
'''


def test_a_loss_an_engine_and_a_diagnostic_of_ones_own_need_no_file_of_ours(tmp_path):
    for name, text in (("my_loss.py", LOSS), ("my_diagnostic.py", DIAGNOSTIC), ("use.py", USE)):
        (tmp_path / name).write_text(text)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    command = [sys.executable, str(tmp_path / "use.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.split() == ["done", "3"], done.stderr


def test_the_files_that_are_named_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text[text.index("## How to add") : text.index("## Dependencies")]
    rows = [line for line in section.splitlines() if line.startswith("| ") and "---" not in line][1:]
    assert len(rows) >= 12
    for row in rows:
        files = [name for name in re.findall(r"`([\w/.]+)`", row) if "/" in name and "NAME" not in name]
        assert files and len(set(files)) <= 3, row
        for name in files:
            assert (ROOT / name).exists(), name


def test_the_tables_that_are_named_are_where_they_are_said_to_be():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for table, name in re.findall(r"`([A-Z]{4,})`(?:, and the map| and the map)? in `([\w/.]+)`", text):
        assert re.search(rf"^{table}\b.*[={{(]", (ROOT / name).read_text(), re.M), (table, name)
