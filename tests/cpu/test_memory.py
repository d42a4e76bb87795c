"""No path through the library keeps memory of a step that is over, in whatever way it was trained."""

import sys

import pytest

from tests.support import memory

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
    pytest.mark.xdist_group("memory"),  # each program is run once
]


@pytest.fixture(scope="module")
def grown():
    return memory.measured("cpu")


@pytest.fixture(scope="module")
def grown_by_a_cycle():
    return memory.measured("planted")


@pytest.mark.parametrize("path", memory.PATHS)
def test_nothing_is_kept_over_hundreds_of_steps(path, grown):
    ways = [memory.name_of(way) for way in memory.STEPS if memory.can(path, way)]
    found = {way: grown[f"{path}: {way}"] for way in ways}
    assert not memory.kept(found)


@pytest.mark.parametrize("path", memory.FUNCTIONS)
def test_a_cycle_through_the_graph_is_seen(path, grown_by_a_cycle):
    """A hook of the graph holds a result whose node holds the hook: Python's collector cannot see the node."""
    ways = [memory.name_of(way) for way in memory.STEPS if way is not memory.without_gradients]
    found = {way: grown_by_a_cycle[f"{path}: {way}"] for way in ways}
    assert min(found.values()) > 1.5 * memory.BOUND, found
