"""What is installed lies within setup.py's ranges: on other versions, tests may fail through no fault of the code."""

import ast
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

SETUP = Path(__file__).resolve().parent.parent / "setup.py"


def requirements() -> dict[str, Requirement]:
    """By name, as setup.py has them now: an editable install's metadata may be older."""
    (call,) = (node for node in ast.walk(ast.parse(SETUP.read_text(encoding="utf-8")))
               if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setup")
    given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords
             if keyword.arg in ("install_requires", "extras_require")}
    parsed = map(Requirement, [*given["install_requires"], *given["extras_require"]["dev"]])
    return {requirement.name: requirement for requirement in parsed}


@pytest.mark.parametrize("name", requirements())
def test_these_versions_are_ones_the_suite_was_run_on(name):
    requirement = requirements()[name]
    if requirement.marker and not requirement.marker.evaluate():
        pytest.skip(f"not needed here: {requirement.marker}")
    try:
        installed = version(name)
    except PackageNotFoundError:
        pytest.skip("not installed")
    assert requirement.specifier.contains(installed, prereleases=True), (
        f"{name} {installed} is installed, setup.py asks for {requirement.specifier}: the suite was never run on it")


@pytest.mark.parametrize("name", requirements())
def test_every_range_has_two_ends(name):
    assert {each.operator for each in requirements()[name].specifier} == {">=", "<"}
