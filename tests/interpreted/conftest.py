import functools

import pytest
from lstm_triton_kernels.gates import gate_preactivations_kernel
from lstm_triton_kernels.inline_ptx import INTERPRETED

from tests.support.concurrent import interpreter, prepared
from tests.support.interpreter import mend


def pytest_collection_modifyitems(items):
    """Without TRITON_INTERPRET=1 the kernels are compiled for a GPU; `make test-interpreted` sets it."""
    if not INTERPRETED:
        for item in items:
            if "tests/interpreted" in str(item.path):
                item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1"))


@pytest.fixture(scope="session", autouse=True)
def triton_patched_once():
    """The interpreter patches triton.language at every call of a device function, milliseconds each; here once."""
    if not INTERPRETED:
        yield
        return
    mend()
    with prepared(gate_preactivations_kernel) as patch_once, pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
        yield


@functools.cache
def call_with_room():
    """A function that calls its argument from a frame of 160 kB.

    CPython 3.11 keeps frames in 16 kB chunks and gives a chunk back as soon as a call returns over its edge. The
    interpreter's deep call chains cross an edge millions of times, a pair of system calls each: half the time of a
    test. A frame this large makes its chunk large enough for all that is called from it.
    """
    locals_ = " = ".join(f"v{n}" for n in range(20_000))
    namespace = {}
    exec(f"def call(function):\n    if function is None:\n        {locals_} = None\n    return function()", namespace)
    return namespace["call"]


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    call_with_room()(lambda: pyfuncitem.obj(**arguments))
    return True
