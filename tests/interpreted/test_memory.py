"""The kernels' part of the graph is freed with it: no step's tensors are kept."""

import sys

import pytest

from tests.support import memory


@pytest.fixture(scope="module")
def grown():
    return memory.measured("interpreted")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.xdist_group("memory")
@pytest.mark.parametrize("path", memory.KERNELS)
def test_nothing_is_kept_of_steps_of_the_kernels(path, grown):
    found = {way: grown[f"{path}: {way}"] for way in map(memory.name_of, memory.INTERPRETED_STEPS)}
    assert not memory.kept(found)
