"""What a result depends on beside its settings: versions, the processor, the commit."""

from __future__ import annotations

import platform
import re
import subprocess
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch


@cache
def provenance(device: str = "cpu") -> dict[str, str]:
    """What a result depends on: versions, the processor, and the commit of a checkout when this process first asked.

    The commit ends in "-dirty" where a tracked file of the checkout differed from it.
    """
    name = torch.cuda.get_device_name(device) if str(device).startswith("cuda") else _processor()
    versions = {"torch": torch.__version__, "python": platform.python_version(), "commit": _commit() or "unknown"}
    return {"device": name, **versions}


def without_addresses(text: str) -> str:
    """``text`` without where in the memory something lies, which differs from process to process."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


def _processor() -> str:
    """The processor's name where Linux tells it, else its architecture."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "cpu"


def _commit() -> str:
    """Of the checkout that holds this very file; nothing where there is none, or no git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()  # noqa: S603 -- no user's words

    try:
        return git("ls-files", Path(__file__).name) and git("describe", "--always", "--dirty", "--exclude", "*")
    except OSError:
        return ""
