import hashlib

import pytest
import torch


@pytest.fixture
def precision(request):
    """PyTorch's switches for float32: both the matmuls' and cuDNN's, so that both sides compute alike."""
    mode = "tf32" if request.param.endswith("tf32") else "ieee"
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn.rnn)
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = mode
    yield request.param
    for switch, value in zip(switches, before, strict=True):
        switch.fp32_precision = value


def pytest_collection_modifyitems(items):
    """The few tests that differ from each other come first, what PyTorch does around the kernels after the kernels.

    The many of one kind, every variant, shape and type, come last and mixed: most of their time is compiling, and a run
    that is cut short has seen some of every kind.
    """

    def place(item):
        many = "as_near_to_the_reference" in item.name
        return many, not many and "test_composes" in item.nodeid, hashlib.sha256(item.nodeid.encode()).digest() * many

    items.sort(key=place)
