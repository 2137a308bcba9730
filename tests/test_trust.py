"""docs/trust.md: every test that it names exists, every promise names one, and other pages lead to it."""

import ast
import re

import pytest
from conftest import ROOT


PAGE = (ROOT / "docs" / "trust.md").read_text()
NAMED = re.findall(r"^- `([^`]+)`$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("named", NAMED)
def test_every_test_that_the_page_names_exists(named):
    file, _, function = named.partition("::")
    functions = [node for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)]
    assert function.startswith("test_") and function in [node.name for node in functions]


def test_every_promise_names_a_test():
    promises, _, _ = PAGE.partition("## What is not promised")
    sections = re.split(r"^## .*$", promises, flags=re.MULTILINE)[1:]
    for section in sections:
        paragraphs = [part for part in section.strip().split("\n\n") if part]
        for promise, after in zip(paragraphs, [*paragraphs[1:], ""]):
            is_promise = promise.startswith("**")
            assert not is_promise or after.startswith(("- `tests/", "**No access token")), promise
    assert len(NAMED) == len(set(NAMED)) > 25


def test_other_pages_lead_to_it():
    assert "(trust.md)" in (ROOT / "docs" / "scaling.md").read_text() + (ROOT / "docs" / "scores.md").read_text()
