"""The benchmark suite, from a checkout: `python -m benchmarks --help` lists the commands."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
"""The results files that are committed."""

# The kernels' package has a folder of its own, which a checkout that is not installed does not have on its path.
if find_spec("lstm_triton_kernels") is None:
    sys.path.append(str(ROOT / "kernels"))


def results_folder() -> Path:
    """Return where results files go if no folder is named: outside of the checkout, by the XDG base directories."""
    data = Path(os.environ.get("XDG_DATA_HOME", ""))
    return (data if data.is_absolute() else Path.home() / ".local" / "share") / "lstm_triton" / "benchmarks"
