"""The documents: every Python block runs, every link leads to a file, and the README keeps its length."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)(#[^)]*)?\)")


def id_of(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if BLOCK.search(path.read_text())], ids=id_of)
def test_python_blocks_run(path, tmp_path, monkeypatch):
    """One after the other, in one namespace, in a directory of their own."""
    monkeypatch.chdir(tmp_path)
    text, namespace = path.read_text(), {"__name__": "document"}
    for block in BLOCK.finditer(text):
        lines = text[: block.start(1)].count("\n")
        exec(compile("\n" * lines + block[1], str(path), "exec"), namespace)


@pytest.mark.parametrize("path", DOCUMENTS, ids=id_of)
def test_links_lead_to_files(path):
    targets = [match[1] for match in LINK.finditer(path.read_text()) if "://" not in match[1]]
    assert [target for target in targets if not (path.parent / target).exists()] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=id_of)
def test_links_into_a_document_lead_to_a_heading(path):
    text = path.read_text()
    headings = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in re.findall(r"^#+ (.*)$", text, re.M)}
    assert {anchor for anchor in re.findall(r"\]\(#([^)]+)\)", text)} <= headings


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
