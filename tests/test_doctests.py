"""Every example in a docstring is run."""

import doctest
import importlib
import pkgutil

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
    assert {"npmoe", "npmoe.dispatch", "npmoe.capacity", "npmoe.routing"} <= found
