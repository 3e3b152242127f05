"""The k largest of short rows against their twin, and against a sort of Python numbers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from expertflow_quant.formats import ExpertFlowError
from expertflow_quant.kernels.topk import MAX_K, MAX_ROW, fits_topk, small_topk, small_topk_reference


def check(scores: Tensor, k: int, device: str) -> None:
    """Kernel and twin: values of the input's dtype, largest first, the smallest place first among equals."""
    rows = scores.tolist()
    wanted = [sorted(range(len(row)), key=lambda place: (-row[place], place))[:k] for row in rows]
    for topk in (small_topk, small_topk_reference):
        values, indices = topk(scores.to(device), k)
        assert (values.dtype, indices.dtype) == (scores.dtype, torch.int64)
        assert indices.tolist() == wanted
        assert torch.equal(values.cpu(), scores.gather(1, torch.tensor(wanted).view(-1, k)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", range(1, 9))
def test_routers_choice(k: int, dtype: torch.dtype, device: str) -> None:
    scores = torch.randn(3, 100, generator=torch.Generator().manual_seed(k)).to(dtype)
    check(scores, k, device)


def test_bf16_scores_have_ties(device: str) -> None:
    scores = torch.rand(4, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert len(scores[0].unique()) < 128
    check(scores, 8, device)


@pytest.mark.parametrize("value", [0.0, -3.5, 7.25, math.inf, -math.inf])
def test_equal_scores_come_in_order(value: float, device: str) -> None:
    check(torch.full((2, 9), value), 8, device)


def test_zero_has_one_value_whatever_its_sign(device: str) -> None:
    values, indices = small_topk(torch.tensor([[-0.0, 0.0, -1.0, -0.0, 0.0]], device=device), 5)
    assert indices.tolist() == [[0, 1, 3, 4, 2]]
    assert values.tolist() == [[0, 0, 0, 0, -1]]


def test_infinities_take_their_places(device: str) -> None:
    inf = math.inf
    check(torch.tensor([[1.0, -inf, inf, -2.0, inf, -inf], [-inf, -inf, -1e38, -inf, 3e38, -inf]]), 6, device)


def test_extremes_of_float32(device: str) -> None:
    top, least = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny
    check(torch.tensor([[-top, least, -least, top, 0.0, 1.0, -1.0]]), 7, device)


@pytest.mark.parametrize("columns", [1, 2, 3, 16, 17, 100, 129, MAX_ROW])
def test_widths(columns: int, device: str) -> None:
    scores = torch.randn(2, columns, generator=torch.Generator().manual_seed(columns))
    check(scores, min(columns, 4), device)


def test_everything_may_be_asked_for(device: str) -> None:
    check(torch.randn(2, MAX_K, generator=torch.Generator().manual_seed(0)), MAX_K, device)


def test_rows_that_lie_apart(device: str) -> None:
    wide = torch.randn(3, 20, generator=torch.Generator().manual_seed(0)).to(device)
    got = small_topk(wide[:, 3:13], 4)
    want = small_topk_reference(wide[:, 3:13].contiguous().cpu(), 4)
    assert all(torch.equal(one.cpu(), other) for one, other in zip(got, want))


@settings(max_examples=25, deadline=None)
@given(data=st.data(), columns=st.integers(1, 24))
def test_any_scores(data: st.DataObject, columns: int, device: str) -> None:
    # -0.0 compares equal to 0.0 here as there
    number = st.sampled_from([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf]) | st.floats(width=32, allow_nan=False)
    rows = data.draw(st.lists(st.lists(number, min_size=columns, max_size=columns), min_size=1, max_size=2))
    check(torch.tensor(rows), data.draw(st.integers(1, min(columns, 8))), device)


@pytest.mark.parametrize(("columns", "k"), [(4, 5), (4, 0), (MAX_ROW + 1, 2), (64, MAX_K + 1)])
def test_more_than_the_kernel_takes_is_refused(columns: int, k: int, device: str) -> None:
    assert not fits_topk(columns, k)
    with pytest.raises(ExpertFlowError, match=f"the {k} largest"):
        small_topk(torch.zeros(1, columns, device=device), k)
    with pytest.raises(ExpertFlowError, match="rows of up to"):
        small_topk(torch.zeros(8, device=device), 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.int32])
def test_numbers_that_float32_does_not_have_are_refused(dtype: torch.dtype, device: str) -> None:
    with pytest.raises(ExpertFlowError, match="narrower floats"):
        small_topk(torch.zeros(2, 8, dtype=dtype, device=device), 2)
