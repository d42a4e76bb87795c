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
    """What PyTorch does around the kernels comes after what the kernels do by themselves."""
    items.sort(key=lambda item: "tests/gpu/test_composes" in item.nodeid)
