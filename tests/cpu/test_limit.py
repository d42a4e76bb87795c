"""The model of the least time of a step."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lstm_triton_kernels import limit
from lstm_triton_kernels.limit import Constants, least_us_per_step
from lstm_triton_kernels.sizes import Layer
from lstm_triton_kernels.spec import STANDARD, VARIANTS, LSTMSpec

GPU = Constants(
    copy_gb_per_s=3000.0,
    matmul_tflop_per_s={"float16": 700.0, "bfloat16": 700.0, "tf32": 350.0, "float32": 50.0},
    l2_read_gb_per_s=5000.0,
    l2_round_trip_us=0.6,
    launch_us=4.0,
    wait_us={"counter": {1: 0.2, 8: 1.2, 64: 1.6, 132: 2.0}, "data": {1: 0.1, 8: 0.7, 64: 0.9, 132: 1.1}},
    multiprocessors=132,
    on_chip_bytes=484 * 1024,
)
CPU = Constants(copy_gb_per_s=20.0, matmul_tflop_per_s={"float32": 0.1})
ANCHOR = Layer(STANDARD, T=1024, B=16, H=768, D=1, dtype=torch.bfloat16, I=768)


def test_the_anchor_by_hand():
    # 4.7 MB of recurrent weights on 484 KiB each: 10 programs. They read h (16 x 768 x 2 bytes) each: 245,760 bytes.
    # Recurrent operations 2 x 16 x 768 x 4 x 768; the nearest measured wait below 10 programs is that of 8, data: 0.7.
    operations = 2 * 16 * 768 * 4 * 768 / 700e6
    assert least_us_per_step(ANCHOR, GPU) == pytest.approx(0.7 + 245_760 / 5e6 + operations + 4.0 / 1024, rel=1e-12)


def test_training_adds_the_backward_exchange_of_all_gates():
    operations = 2 * 16 * 768 * 4 * 768 / 700e6
    wanted = 2 * (0.7 + operations) + 5 * 245_760 / 5e6 + 2 * 4.0 / 1024
    assert least_us_per_step(ANCHOR._replace(training=True), GPU) == pytest.approx(wanted, rel=1e-12)


def test_both_directions_of_a_launch_share_the_machine():
    for backward, exchanged in ((False, 245_760), (True, 4 * 245_760)):
        products, reads = 2 * 16 * 768 * 4 * 768 / 700e6, exchanged / 5e6
        of_one = limit.least_pass_us(ANCHOR, GPU, backward)
        assert of_one == pytest.approx(products + reads + 0.7, rel=1e-12)
        assert limit.least_pass_us(ANCHOR._replace(D=2), GPU, backward) == of_one  # the wait is most of it
        many = ANCHOR._replace(B=4096, D=2)
        assert limit.least_pass_us(many, GPU, backward) == pytest.approx(2 * 256 * max(products, reads), rel=1e-12)


def test_weights_that_fit_one_multiprocessor_need_no_wait():
    small = ANCHOR._replace(I=128, H=128, T=10**9)  # 128 KiB of weights
    assert least_us_per_step(small, GPU) == pytest.approx(2 * 16 * 128 * 4 * 256 / 700e6, rel=1e-6)


def test_many_rows_are_bound_by_operations():
    wide = ANCHOR._replace(B=4096, T=10**9)
    assert least_us_per_step(wide, GPU) >= 2 * 4096 * 768 * 4 * 2 * 768 / 700e6


def test_weights_that_no_machine_holds_stream_through_l2():
    huge = ANCHOR._replace(H=4096, I=4096, T=10**9)
    weights = huge.recurrent_bytes
    held = 132 * GPU.on_chip_bytes
    assert weights == 4096 * 4096 * 4 * 2 > held
    assert least_us_per_step(huge, GPU) > (weights - held) / 5e6


def test_weights_that_l2_does_not_hold_come_from_device_memory():
    huge = ANCHOR._replace(H=4096, I=4096, T=10**9)
    streamed = huge.recurrent_bytes - 132 * GPU.on_chip_bytes
    known = replace(GPU, l2_bytes=10 * 2**20)
    assert limit.stream_us(huge, known, False) == pytest.approx((streamed - 10 * 2**20) / 3e6, rel=1e-12)
    assert least_us_per_step(huge, known) == pytest.approx((streamed - 10 * 2**20) / 3e6, rel=1e-6)
    # What L2 holds goes through it beside what is read of the state, by 132 programs.
    known, many = replace(GPU, l2_bytes=50 * 2**20), huge._replace(B=256)
    assert limit.stream_us(many, known, False) == pytest.approx((streamed + 132 * 256 * 4096 * 2) / 5e6, rel=1e-12)
    assert limit.stream_us(many, known, True) == pytest.approx((streamed + 132 * 256 * 16384 * 2) / 5e6, rel=1e-12)
    assert limit.least_pass_us(many, known, True) >= limit.stream_us(many, known, True)
    two = huge._replace(D=2)
    assert limit.least_pass_us(two, replace(GPU, l2_bytes=0), False) == pytest.approx(2 * streamed / 3e6, rel=1e-12)
    assert limit.stream_us(ANCHOR, GPU, False) == limit.stream_us(huge, CPU, False) == 0.0


def test_a_projection_makes_h_narrower_and_a_second_exchange():
    projected = ANCHOR._replace(P=256, T=10**9)
    products = 2 * 16 * (768 * 4 * 256 + 256 * 768) / 700e6
    programs = -(-projected.recurrent_bytes // GPU.on_chip_bytes)
    assert programs > 1
    waits = 2 * limit.least_wait_us(programs, GPU)
    reads = programs * 16 * 256 * 2 / 5e6
    assert limit.least_pass_us(projected, GPU, False) == pytest.approx(products + reads + waits, rel=1e-12)
    reads = programs * 16 * 4 * 768 * 2 / 5e6
    assert limit.least_pass_us(projected, GPU, True) == pytest.approx(products + reads + waits, rel=1e-12)
    work = Layer(STANDARD, T=64, B=3, H=7, D=1, dtype=torch.float16, I=5, P=2)
    assert limit.step_bytes(work) == 3 * (5 + 2) * 2


def test_a_full_peephole_on_the_new_cell_state_waits_twice():
    before, now = (ANCHOR._replace(spec=LSTMSpec(False, "full", which)) for which in ("previous", "current"))
    wait = limit.least_wait_us(limit._programs(now, GPU), GPU)
    for backward in (False, True):
        took = [limit.least_pass_us(layer, GPU, backward) for layer in (before, now)]
        assert took[1] == pytest.approx(took[0] + wait, rel=1e-12)


def test_a_cpu_has_operations_and_bytes_alone():
    work = Layer(STANDARD, T=64, B=32, H=512, D=1, dtype=torch.float32, I=256)
    assert least_us_per_step(work, CPU) == pytest.approx(2 * 32 * 512 * 4 * (256 + 512) / 0.1e6, rel=1e-12)
    assert limit.step_bytes(work) == 32 * (256 + 512) * 4


def test_the_bytes_of_a_training_step():
    work = Layer(STANDARD, T=64, B=3, H=7, D=1, dtype=torch.float16, I=5, training=True)
    x, h, gates, c = 5, 7, 28, 7
    forward = (x + h + gates) * 2 + c * 4  # read x; write output, gates, c
    backward = (gates + h + gates + x + h + x) * 2 + c * 4  # read gates, grad, x, h; write d_gates, dx; read c
    assert limit.step_bytes(work) == 3 * (forward + backward)


def test_layers_in_one_direction_share_a_chain_and_directions_share_a_step():
    one = least_us_per_step(ANCHOR._replace(T=10**9), GPU)
    assert least_us_per_step(ANCHOR._replace(T=10**9), GPU, layers=2) == pytest.approx(one / 2, rel=1e-6)
    assert least_us_per_step(ANCHOR._replace(T=10**9, D=2), GPU) == pytest.approx(one / 2, rel=1e-6)
    assert least_us_per_step(ANCHOR._replace(T=10**9, D=2), GPU, layers=2) == pytest.approx(one / 2, rel=1e-6)


sizes = st.integers(1, 4096)
works = st.builds(
    Layer, spec=st.sampled_from(VARIANTS), T=sizes, B=sizes, I=sizes, H=sizes, D=st.sampled_from((1, 2)),
    dtype=st.sampled_from((torch.float16, torch.float32)), precision=st.sampled_from(("ieee", "tf32")),
    training=st.booleans(), P=st.one_of(st.just(0), sizes), ragged=st.just(False), L=st.just(1),
).map(lambda layer: layer if layer.P < layer.H else layer._replace(P=0))  # fmt: skip


@given(works, st.sampled_from(("B", "I", "H")), st.integers(1, 4))
def test_more_work_never_takes_less(work, what, layers):
    more = work._replace(**{what: getattr(work, what) + 1})
    assert 0 < least_us_per_step(work, GPU, layers) <= least_us_per_step(more, GPU, layers) * (1 + 1e-12)


@given(works)
def test_more_gates_and_matrices_never_take_less(work):
    rising = [work._replace(spec=LSTMSpec(coupled, p)) for coupled in (True, False) for p in (None, "full")]
    times = [least_us_per_step(one, GPU) for one in rising]
    assert times[0] <= min(times[1:3]) * (1 + 1e-12) and max(times[1:3]) <= times[3] * (1 + 1e-12)


@given(works)
def test_training_never_takes_less_and_faster_machines_never_more(work):
    assert least_us_per_step(work._replace(training=False), GPU) <= least_us_per_step(work._replace(training=True), GPU)
    better = replace(
        GPU, copy_gb_per_s=6000.0, l2_read_gb_per_s=9000.0, launch_us=1.0,
        wait_us={"data": {1: 0.01}}, matmul_tflop_per_s={k: 2 * v for k, v in GPU.matmul_tflop_per_s.items()},
    )  # fmt: skip
    assert least_us_per_step(work, better) <= least_us_per_step(work, GPU)
