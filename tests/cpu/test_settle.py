"""Which of the ranked plans runs, by what compiling them shows."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lstm_triton_kernels import settle
from lstm_triton_kernels.planner import MOST_SPILLED, MOST_TRIES
from lstm_triton_kernels.settle import Usage, first_clean, settled

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def spilling(*spilled):
    """What compiling plan n shows: so many spilled registers, None where it does not fit; and the plans asked for."""
    asked = []

    def usage_of(plan):
        asked.append(plan)
        return None if spilled[plan] is None else Usage(255, spilled[plan], 1024)

    return usage_of, asked


@pytest.mark.parametrize(
    "spilled, taken, tried",
    [
        ((0, 0), 0, 1),
        ((MOST_SPILLED, 0), 0, 1),
        ((MOST_SPILLED + 1, MOST_SPILLED), 1, 2),
        ((50, 40, 30, 60, 0), 2, 4),
        ((50, 50, 50, 50), 0, 4),
        ((90, 20), 1, 2),
        ((None, 0), 1, 2),
        ((None, None, None, None, None, 3), 5, 6),
        ((None, 40, None, None, 0), 1, 4),
        ((None, None), None, 2),
    ],
)
def test_the_first_that_hardly_spills_is_taken_else_the_one_that_spills_least(spilled, taken, tried):
    usage_of, asked = spilling(*spilled)
    assert first_clean(range(len(spilled)), usage_of) == taken
    assert asked == list(range(tried))


@given(st.lists(st.one_of(st.none(), st.integers(0, 100)), min_size=1, max_size=9))
def test_a_spill_never_leaves_a_layer_without_a_plan(spilled):
    usage_of, asked = spilling(*spilled)
    taken = first_clean(range(len(spilled)), usage_of)
    assert (taken is None) == all(n is None for n in spilled)
    fitting = [n for n in asked if spilled[n] is not None]
    assert len(fitting) <= MOST_TRIES
    if taken is not None and spilled[taken] > MOST_SPILLED:
        assert spilled[taken] == min(spilled[n] for n in fitting)


@pytest.fixture
def nothing_settled(monkeypatch):
    monkeypatch.setattr(settle, "SETTLED", {})


@pytest.fixture
def capturing(monkeypatch):
    state = SimpleNamespace(capturing=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    return state


def test_the_outcome_is_kept(nothing_settled, capturing):
    usage_of, asked = spilling(30, 0)
    assert [settled(("key",), [0, 1], usage_of, CUDA) for _ in range(3)] == [1, 1, 1]
    assert asked == [0, 1]
    assert settled(("another",), [0, 1], usage_of, CUDA) == 1 and asked == [0, 1, 0, 1]


def test_nothing_is_tried_during_a_capture(nothing_settled, capturing):
    usage_of, asked = spilling(30, 0)
    capturing.capturing = True
    assert settled(("key",), [0, 1], usage_of, CUDA) == 0 and not asked
    capturing.capturing = False
    assert settled(("key",), [0, 1], usage_of, CUDA) == 1
    capturing.capturing = True
    assert settled(("key",), [0, 1], usage_of, CUDA) == 1


def test_nothing_is_tried_on_a_cpu(nothing_settled):
    usage_of, asked = spilling(30, 0)
    assert settled(("key",), [0, 1], usage_of, CPU) == 0 and not asked


def test_where_nothing_fits_the_device_it_is_an_error(nothing_settled, capturing):
    usage_of, _ = spilling(None, None)
    with pytest.raises(RuntimeError, match="strategy 'persistent' cannot run here: no plan fits cuda:0 as compiled"):
        settled(("key",), [0, 1], usage_of, CUDA)


class Compiled:
    """As Triton's: registers and spills are known when it is loaded, which fails where it does not fit."""

    metadata = SimpleNamespace(shared=2048)

    def __init__(self, fits):
        self.fits = fits

    def _init_handles(self):
        if not self.fits:
            raise settle.OutOfResources(300_000, 232_448, "shared memory")
        self.n_regs, self.n_spills = 128, 4


@pytest.mark.parametrize("fits, usage", [(True, Usage(128, 4, 2048)), (False, None)])
def test_what_a_kernel_uses_is_asked_of_the_loaded_kernel(fits, usage):
    given = []
    kernel = SimpleNamespace(warmup=lambda grid, **arguments: given.append((grid, arguments)) or Compiled(fits))
    assert settle.usage_on_device(kernel, (3, 1, 1), dict(B=5)) == usage
    assert given == [((3, 1, 1), dict(B=5))]
