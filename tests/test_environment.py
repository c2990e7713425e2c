"""The four descriptions of the environment agree: pyproject.toml, constraints.txt, environment.yml and the workflow."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import adalfl_lite

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())
PINS = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines()]
PYTHONS = sorted(c.rsplit(" ")[-1] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c))
REQUIRED = ("torch", "torchvision", "jupyter-book", "seaborn", "captum", "jupytext")
DIRECT = [Requirement(r) for r in sum(PROJECT["optional-dependencies"].values(), PROJECT["dependencies"])]


def conda_python() -> Requirement:
    return next(r for d in ENVIRONMENT["dependencies"] if isinstance(d, str) and (r := Requirement(d)).name == "python")


def pip_options() -> dict[str, str]:
    """The options of environment.yml's pip section, by name."""
    (section,) = [d["pip"] for d in ENVIRONMENT["dependencies"] if isinstance(d, dict)]
    return dict(line.split(maxsplit=1) for line in section)


def pins_for(name: str, python: str, platform: str) -> list[str]:
    """The versions that constraints.txt allows for a package on one Python and platform."""
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.9",
        "sys_platform": platform,
        "platform_machine": "arm64" if platform == "darwin" else "x86_64",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }
    pins = [p for p in PINS if canonicalize_name(p.name) == canonicalize_name(name)]
    return [next(iter(p.specifier)).version for p in pins if p.marker is None or p.marker.evaluate(environment)]


def test_every_constraint_is_an_exact_pin():
    for pin in PINS:
        assert re.fullmatch(r"==[^*,]+", str(pin.specifier)), f"{pin} is not an exact pin"
        assert pin.url is None, f"{pin} names a place, not a version"


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt", "environment.yml"])
def test_no_package_source_is_named(name):
    lines = (ROOT / name).read_text().splitlines()
    hits = [line for line in lines if re.search(r"index[-_]url|find[-_]links|://|trusted[-_]host", line)]
    assert not hits, f"{name} names where packages come from: {hits}"


@pytest.mark.parametrize("platform", ["linux", "darwin"])
@pytest.mark.parametrize("python", PYTHONS)
def test_every_direct_dependency_has_one_pin_that_satisfies_it(python, platform):
    for requirement in DIRECT:
        pins = pins_for(requirement.name, python, platform)
        assert len(pins) == 1, f"{requirement.name} has the pins {pins} on Python {python}: run `make constraints`"
        assert requirement.specifier.contains(pins[0]), f"{requirement} is pinned to {pins[0]}: run `make constraints`"


def test_conda_environment_installs_this_package_under_the_constraints():
    options = pip_options()
    assert ENVIRONMENT["name"] == "adalfl"
    assert (ROOT / options["--constraint"]).samefile(ROOT / "constraints.txt")
    made = re.search(r"--editable '(.*?)'", (ROOT / "Makefile").read_text()).group(1)
    assert options["--editable"] == made


def test_conda_environment_has_every_required_package():
    extras = Requirement(f"{PROJECT['name']}{pip_options()['--editable'].removeprefix('.')}").extras
    chosen = PROJECT["dependencies"] + sum((PROJECT["optional-dependencies"][extra] for extra in extras), [])
    missing = set(REQUIRED) - {Requirement(r).name for r in chosen}
    assert not missing, f"environment.yml does not bring {missing}"


def test_the_package_says_the_version_it_is_released_as():
    assert adalfl_lite.__version__ == PROJECT["version"]


def test_python_versions_agree():
    assert PYTHONS == ["3.11", "3.12", "3.13"]
    assert PROJECT["requires-python"] == f">={PYTHONS[0]}"
    specifier = conda_python().specifier
    assert all(specifier.contains(f"{python}.9") for python in PYTHONS)
    assert not specifier.contains("3.10.9") and not specifier.contains("3.14.0")
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python"] == PYTHONS


def test_citation_names_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(citation["version"]) == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
