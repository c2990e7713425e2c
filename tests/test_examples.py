"""The examples run, at a tiny size, and never need the package that learns losses."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "examples" / "resnet18_diagnostics.py"


@pytest.mark.slow
def test_resnet18_diagnostics(tmp_path):
    options = ["--images", "2", "--size", "8", "--steps", "2", "--points", "3", "--nodes", "2"]
    blocked = (
        f"import runpy, sys; sys.modules['adalfl_lite'] = None; sys.argv = {[str(SCRIPT), str(tmp_path), *options]}"
    )
    command = [sys.executable, "-c", f"{blocked}; runpy.run_path(sys.argv[0], run_name='__main__')"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "largest eigenvalue" in done.stdout
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"{name}.png" for name in ("gradients", "lines", "loss", "spectrum", "trajectory")}
