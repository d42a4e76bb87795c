import pytest
import torch

from lstm_triton import routing


@pytest.fixture(autouse=True)
def poisoned_buffers():
    """Memory from torch.empty holds NaN: what a kernel forgets to write, a test sees."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_decided_before():
    """Tests replace what a decision rests on; it is kept from one call to the next."""
    routing._kernels.cache_clear()
    routing.persistent_or_cudnn.cache_clear()
