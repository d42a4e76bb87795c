"""Which Python the targets without a setup take, and for what; each Python here is a script that notes its calls."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")


@pytest.fixture
def make(tmp_path):
    """Runs a target of the Makefile with VENV and PYTHON in the test's folder; the result, and what was called."""
    log = tmp_path / "called"

    def run(*arguments):
        variables = (f"VENV={tmp_path / 'venv'}", f"PYTHON={tmp_path / 'python'}")
        command = ["make", "--no-print-directory", *arguments, *variables]
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
        done = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True)
        return done, log.read_text().splitlines() if log.exists() else []

    return run


def interpreter(tmp_path, name, missing=()):
    """A Python that can import all but the modules of these names, and notes with what else it is called."""
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    refusals = "".join(
        f"""case "$2" in *{module}*) echo Traceback >&2; echo "No module named '{module}'" >&2; exit 1;; esac\n"""
        for module in missing
    )
    path.write_text(
        f"""#!/bin/sh\nif [ "$1" = -c ]; then\n{refusals}exit 0\nfi\necho "{name} $*" >> {tmp_path / "called"}\n"""
    )
    path.chmod(0o755)


TARGETS = {"gpu-test": "-m pytest -q -m gpu tests/gpu", "gpu": "-m benchmarks gpu"}


@pytest.mark.parametrize("target", TARGETS)
def test_the_environment_that_is_there_is_taken(make, tmp_path, target):
    interpreter(tmp_path, "venv/bin/python")
    interpreter(tmp_path, "python")
    done, called = make(target)
    assert done.returncode == 0, done.stderr
    assert len(called) == 1 and called[0].startswith(f"venv/bin/python {TARGETS[target]}")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("environment", ["none", "without torch"])
def test_without_torch_in_the_environment_it_is_the_python_that_is_named(make, tmp_path, target, environment):
    if environment != "none":
        interpreter(tmp_path, "venv/bin/python", missing=["torch"])
    interpreter(tmp_path, "python")
    done, called = make(target)
    assert done.returncode == 0, done.stderr
    assert len(called) == 1 and called[0].startswith(f"python {TARGETS[target]}")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("missing", ["torch", "triton", "pytest"])
def test_what_cannot_be_imported_is_said_in_one_line_and_nothing_runs(make, tmp_path, target, missing):
    interpreter(tmp_path, "python", missing=[missing])
    done, called = make(target)
    assert done.returncode != 0 and called == [] and done.stdout == ""
    words = [line for line in done.stderr.splitlines() if not line.startswith("make: ***")]
    assert len(words) == 1 and words[0].startswith(f"make {target} needs a Python with torch, triton, pytest")
    assert words[0].endswith(f"No module named '{missing}'")


@pytest.mark.parametrize("target", ["bench", "report"])
def test_a_readme_is_rewritten_only_where_it_is_named(make, target):
    plain, _ = make("-n", target)
    named, _ = make("-n", target, "README=README.md")
    assert "-m benchmarks report" in plain.stdout and "--readme" not in plain.stdout
    assert "--readme README.md" in named.stdout
