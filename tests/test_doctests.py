"""Every example in a docstring is run, and the one in the README."""

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import npmoe

MODULES = [
    "npmoe",
    *(m.name for m in pkgutil.walk_packages(npmoe.__path__, "npmoe.") if "__main__" not in m.name),
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_docstrings(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = {
        name
        for name in MODULES
        if any(test.examples for test in finder.find(importlib.import_module(name)))
    }
    assert {"npmoe", "npmoe.dispatch", "npmoe.capacity", "npmoe.routing.selection"} <= found


def test_the_example_of_the_readme():
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    names = {}
    exec(text.split("```python\n")[1].split("```")[0], names)
    assert names["output"].shape == (32, 64)
    assert names["loss"] > 0
    assert names["grads"].gate_up_proj.any()
