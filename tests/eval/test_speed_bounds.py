"""Bounds and rates from made-up seconds and counts, against arithmetic written out."""

from types import SimpleNamespace

import pytest
import torch

from eval.speed.bench import Bench, find_target, require_pinned
from eval.speed.bounds import Work, bounds, pass_figures, quantile, step_figures
from eval.speed.ceilings import Ceilings, kernel_reads, measure_ceilings
from eval.speed.systems import Clock, Counters, Timing
from expertflow_quant.formats import ExpertFlowError

CEILINGS = Ceilings(
    link_gbs=50.0, kernel_link_gbs=48.0, beside_gbs=46.0, memory_gbs=2000.0, product_tflops=500.0, launch_sync_us=20.0
)


def test_bounds_are_amounts_over_rates_and_the_largest_counts():
    found = bounds(Work(moved=5e8, read=4e9, flops=1e12), CEILINGS)
    assert found == pytest.approx({"link": 0.01, "memory": 0.002, "product": 0.002, "bound": 0.01})


def test_shares_are_one_at_the_bound():
    found = pass_figures(0.02, Work(moved=5e8, read=4e9, flops=0), CEILINGS)
    assert found["share_of"] == pytest.approx({"link": 0.5, "memory": 0.1, "product": 0.0, "bound": 0.5})
    assert found["bytes_moved"] == 500_000_000


def test_tokens_a_second_count_all_rows_and_a_system_that_moves_nothing_has_no_link_bound():
    found = step_figures([0.01, 0.01, 0.04], 4, Work(moved=0, read=4e9, flops=0), CEILINGS)
    assert found["tokens_per_s"] == pytest.approx(200)
    assert found["step_ms"]["median"] == pytest.approx(10)
    assert found["step_ms"]["mean"] == pytest.approx(20)
    assert found["bound_tokens_per_s"] == {"link": None, "memory": 2000.0, "product": None, "bound": 2000.0}
    assert found["bytes_per_token"] == 0


def test_quantiles_lie_between_neighbours():
    assert [quantile([3.0, 1.0, 2.0], share) for share in (0, 0.25, 0.5, 1)] == [1.0, 1.5, 2.0, 3.0]
    assert quantile([7.0], 0.9) == 7.0


def test_hit_rate_is_none_where_nothing_was_counted():
    assert Counters(bytes_moved=5).hit_rate is None
    assert Counters(hits=3, misses=1).hit_rate == 0.75
    assert Timing([1.0, 2.0]).seconds == 3.0


def test_a_clock_has_one_time_for_each_mark_since_its_start():
    clock = Clock(torch.device("cpu"))
    clock.mark()
    clock.start()
    for _ in range(3):
        clock.mark()
    assert len(clock.seconds()) == 3
    assert all(seconds >= 0 for seconds in clock.seconds())


def test_work_of_a_decode_step_of_qwen3_30b():
    sizes = Bench(find_target("Qwen3-30B-A3B", None, False, None, 0), torch.device("cpu")).sizes
    layer = 2048 * 4096 * 2 + 2 * 2048 * 512 + 2 * 128 + 2 * 2048 + 128 * 2048
    assert sizes.body == 48 * layer + 2048
    assert sizes.head == 151936 * 2048
    assert sizes.bf16_expert_bytes == 48 * 128 * 3 * 2048 * 768 * 2
    work = sizes.decode_work(moved=1e8, distinct=8.0, record=2.5e6, rows=1, context=1000, item=2)
    keys_and_values = 48 * 1000 * 2 * 4 * 128
    assert work.moved == 1e8
    assert work.read == pytest.approx(2 * (sizes.body + sizes.head + keys_and_values) + 8 * 48 * 2.5e6)
    experts = 48 * 8 * 3 * 2048 * 768
    assert work.flops == pytest.approx(2 * (sizes.body + sizes.head + experts) + 4 * 48 * 1000 * 4096)


def test_work_of_a_prefill_counts_the_head_once_a_row_and_pairs_once():
    sizes = Bench(find_target("Qwen3-30B-A3B", 2, False, None, 0), torch.device("cpu")).sizes
    work = sizes.prefill_work(moved=0, distinct=128.0, record=2.5e6, rows=3, prompt=100, item=2)
    assert work.read == pytest.approx(2 * (sizes.body + sizes.head) + 2 * 128 * 2.5e6)
    products = 2 * 3 * (100 * (sizes.body + 2 * 8 * 3 * 2048 * 768) + sizes.head)
    assert work.flops == pytest.approx(products + 4 * 3 * 2 * (100 * 101 // 2) * 4096)


def test_a_window_bounds_what_attention_reads():
    sizes = Bench(find_target("gpt-oss-20b", 2, False, None, 0), torch.device("cpu")).sizes
    assert sizes.windows == (128, None)
    near, far = (
        sizes.decode_work(moved=0, distinct=4, record=1, rows=1, context=context, item=2).read
        for context in (1000, 2000)
    )
    assert far - near == 1000 * 2 * 8 * 64 * 2  # of the one layer that sees everything


def test_random_experts_that_were_not_all_pinned_are_refused():
    require_pinned(SimpleNamespace(pinned_bytes=10, nbytes=10))
    with pytest.raises(ExpertFlowError, match=r"1\.0 KiB of 2\.0 KiB"):
        require_pinned(SimpleNamespace(pinned_bytes=1024, nbytes=2048))


def test_ceilings_of_this_machine_are_above_zero():
    found = measure_ceilings(torch.device("cpu"))
    assert found.kernel_link_gbs is found.beside_gbs is None
    assert min(found.link_gbs, found.memory_gbs, found.product_tflops, found.launch_sync_us) > 0


def test_kernel_reads_bring_the_bytes():
    read, target = kernel_reads(torch.device("cpu"), 3, 256)
    assert not target.any()
    read()
    assert (target == 1).all()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("no-such-model", None, False, None, 0), "neither a checkpoint"),
        (("OLMoE", None, False, "int5-g32", 0), "int5-g32"),
        (("OLMoE", 99, False, None, 0), "16 layers"),
    ],
)
def test_targets_that_do_not_exist_are_refused(arguments, said):
    with pytest.raises(ExpertFlowError, match=said):
        find_target(*arguments)
