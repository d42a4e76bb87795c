"""docs/own-cell.md quotes examples/own_cell: every function and every excerpt stands in a file there, line by line."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [path.read_text() for path in sorted((ROOT / "examples" / "own_cell").glob("*.py"))]
BLOCKS = re.findall(r"^```(python|py)\n(.*?)^```", (ROOT / "docs" / "own-cell.md").read_text(), re.M | re.S)
"""Those in `python` are run by test_docs.py, those in `py` are excerpts: all of it must stand in the file."""


def quoted(language, block):
    functions = (
        [node for node in ast.parse(block).body if isinstance(node, ast.FunctionDef)] if language != "py" else []
    )
    return [ast.get_source_segment(block, function) for function in functions] or [block]


QUOTATIONS = [quotation for language, block in BLOCKS for quotation in quoted(language, block)]


def lines_of(text):
    """Without indentation, so that an excerpt of a function may stand at the margin."""
    return "\n".join(line.strip() for line in text.strip().splitlines())


def stands_in_a_file(quotation):
    return any(f"\n{lines_of(quotation)}\n" in lines_of(source) for source in SOURCES)


@pytest.mark.parametrize("quotation", QUOTATIONS, ids=lambda text: " ".join(text.split()[:3]))
def test_what_is_quoted_stands_in_the_example(quotation):
    assert stands_in_a_file(quotation)


def test_another_line_is_no_quotation():
    assert len(QUOTATIONS) >= 10
    assert not stands_in_a_file(BLOCKS[1][1].replace("sigmoid(a_r + u_r)", "sigmoid(a_r - u_r)"))
