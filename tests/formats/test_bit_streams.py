"""Bit streams: round trips, the bytes written out bit by bit, and what is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from expertflow_quant.formats import INT_BITS, ExpertFlowError, pack_codes, packed_bytes, unpack_codes


@st.composite
def matrices(draw: st.DrawFn) -> tuple[Tensor, int]:
    bits = draw(st.sampled_from(INT_BITS))
    rows, eights = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    row = st.lists(st.integers(0, (1 << bits) - 1), min_size=8 * eights, max_size=8 * eights)
    values = draw(st.lists(row, min_size=rows, max_size=rows))
    return torch.tensor(values, dtype=torch.uint8), bits


def bytes_bit_by_bit(row: list[int], bits: int) -> list[int]:
    stream = sum(code << (bits * place) for place, code in enumerate(row))
    return list(stream.to_bytes(len(row) * bits // 8, "little"))


@given(matrices())
def test_round_trip_and_bytes(case: tuple[Tensor, int]) -> None:
    codes, bits = case
    before = codes.clone()
    packed = pack_codes(codes, bits)
    assert packed.shape == (codes.shape[0], packed_bytes(codes.shape[1], bits))
    assert packed.tolist() == [bytes_bit_by_bit(row, bits) for row in codes.tolist()]
    assert torch.equal(unpack_codes(packed, bits, codes.shape[1]), codes)
    assert torch.equal(codes, before)


@pytest.mark.parametrize("bits", INT_BITS)
def test_strided_codes_pack_as_their_copy(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (16, 24), dtype=torch.uint8).T
    assert torch.equal(pack_codes(codes[:, :8], bits), pack_codes(codes[:, :8].contiguous(), bits))


def test_eight_bits_are_stored_as_they_are_and_not_shared() -> None:
    codes = torch.arange(8, dtype=torch.uint8).view(1, 8)
    packed = pack_codes(codes, 8)
    packed += 1
    assert codes.tolist() == [list(range(8))]


@pytest.mark.parametrize(
    ("codes", "bits", "message"),
    [
        (torch.full((1, 8), 8, dtype=torch.uint8), 3, "code 8 does not fit 3 bits: the largest is 7"),
        (torch.zeros(1, 12, dtype=torch.uint8), 4, "12 codes must be a positive multiple of 8: pad it"),
        (torch.zeros(1, 0, dtype=torch.uint8), 4, "0 codes must be a positive multiple of 8"),
        (torch.zeros(1, 8, dtype=torch.int32), 4, "must be a uint8 matrix, got torch.int32"),
        (torch.zeros(8, dtype=torch.uint8), 4, "must be a uint8 matrix"),
        (torch.zeros(1, 8, dtype=torch.uint8), 5, "5 bits are not known: use one of 2, 3, 4, 8"),
    ],
)
def test_bad_codes_are_refused(codes: Tensor, bits: int, message: str) -> None:
    with pytest.raises(ExpertFlowError, match=message):
        pack_codes(codes, bits)


def test_rows_of_another_length_are_refused() -> None:
    with pytest.raises(ExpertFlowError, match="4 bytes per row do not hold 16 codes of 4 bits: that takes 8"):
        unpack_codes(torch.zeros(2, 4, dtype=torch.uint8), 4, 16)
