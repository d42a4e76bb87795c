"""The benchmark suite, from a checkout: `python -m benchmarks run | micro | steps | warm | report | gpu | simulate`."""

import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

# The kernels' package has a folder of its own, which a checkout that is not installed does not have on its path.
if find_spec("lstm_triton_kernels") is None:
    sys.path.append(str(ROOT / "kernels"))
