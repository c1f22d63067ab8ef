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


def test_the_examples_of_the_readme(capsys):
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    names = {}
    for block in text.split("```python\n")[1:3]:
        exec(block.split("```")[0], names)
    assert names["output"].shape == (32, 64)
    assert names["loss"] > 0
    assert names["grads"].gate_up_proj.any()
    assert names["deepseek"].num_experts == 256
    assert "top 2 of 8 experts" in capsys.readouterr().out
