"""Decode attention against its twin, and against a loop over tokens in float64."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from expertflow_quant.formats import ExpertFlowError
from expertflow_quant.kernels.attention import decode_attention, decode_attention_reference, keys_at_a_time


def on(device: str, tensor: Tensor) -> Tensor:
    """A copy with the strides of ``tensor``, which ``to`` does not always keep."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device).copy_(tensor)


@dataclass(frozen=True)
class Case:
    """Inputs of one call on the CPU. The room that a row has not used yet is full of NaN."""

    q: Tensor
    k: Tensor
    v: Tensor
    keys: Tensor
    values: Tensor
    lengths: Tensor
    scaling: float
    sinks: Tensor | None = None
    window: int | None = None

    @classmethod
    def random(
        cls,
        lengths: list[int],
        room: int,
        *,
        group: int = 2,
        kv_heads: int = 2,
        head: int = 16,
        dtype: torch.dtype = torch.float32,
        spare_rows: int = 1,
        seed: int = 0,
    ) -> "Case":
        """Heads lie within each token, as a model's projections leave them; the cache has rows that are not asked
        for."""
        generator = torch.Generator().manual_seed(seed)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        rows = len(lengths)
        q, k, v = (drawn(rows, 1, heads, head).transpose(1, 2) for heads in (group * kv_heads, kv_heads, kv_heads))
        keys, values = (drawn(rows + spare_rows, kv_heads, room, head) for _ in range(2))
        for row, length in enumerate(lengths):
            keys[row, :, length:] = torch.nan
            values[row, :, length:] = torch.nan
        told = torch.tensor([*lengths, *[0] * spare_rows], dtype=torch.int32)
        return cls(q, k, v, keys, values, told, head**-0.5)

    def with_sinks(self) -> "Case":
        return replace(self, sinks=torch.randn(self.q.shape[1], generator=torch.Generator().manual_seed(9)))

    def run(self, device: str, attention=decode_attention, **options: int) -> tuple[Tensor, Tensor, Tensor]:
        """Output, keys and values afterwards, on the CPU."""
        kept = [each.to(device, copy=True) for each in (self.keys, self.values)]
        parts = [on(device, self.q), on(device, self.k), on(device, self.v), *kept, self.lengths.to(device)]
        sinks = None if self.sinks is None else self.sinks.to(device)
        out = attention(*parts, self.scaling, self.window, sinks, **options)
        assert torch.equal(parts[5].cpu(), self.lengths)
        return out.cpu(), parts[3].cpu(), parts[4].cpu()

    def exact(self) -> Tensor:
        """One query head, one token at a time, in float64: ``[B, 1, heads, D]``."""
        rows, heads, _, head = self.q.shape
        group = heads // self.k.shape[1]
        out = torch.zeros(rows, 1, heads, head, dtype=torch.float64)
        for row in range(rows):
            length = int(self.lengths[row])
            first = 0 if self.window is None else max(0, length + 1 - self.window)
            for each in range(heads):
                kv, query = each // group, self.q[row, each, 0].double()
                keys = [*self.keys[row, kv, first:length].double(), self.k[row, kv, 0].double()]
                values = [*self.values[row, kv, first:length].double(), self.v[row, kv, 0].double()]
                powers = [math.exp(float(query @ key) * self.scaling) for key in keys]
                total = sum(powers) + (0 if self.sinks is None else math.exp(float(self.sinks[each])))
                for power, value in zip(powers, values):
                    out[row, 0, each] += power / total * value
        return out

    def stored(self) -> tuple[Tensor, Tensor]:
        """The caches with the new token in its place."""
        keys, values = self.keys.clone(), self.values.clone()
        for row in range(self.q.shape[0]):
            keys[row, :, int(self.lengths[row])] = self.k[row, :, 0]
            values[row, :, int(self.lengths[row])] = self.v[row, :, 0]
        return keys, values

    def check(self, device: str, **options: int) -> None:
        """Kernel and twin against the loop; both write the new token and nothing else."""
        tolerance = 2e-5 if self.q.dtype == torch.float32 else 2e-2
        for attention, given_options in ((decode_attention, options), (decode_attention_reference, {})):
            out, keys, values = self.run(device, attention, **given_options)
            assert out.dtype == self.q.dtype
            torch.testing.assert_close(out.double(), self.exact(), rtol=tolerance, atol=tolerance)
            for got, want in zip((keys, values), self.stored()):
                assert torch.equal(bits(got), bits(want))


def bits(values: Tensor) -> Tensor:
    """So that NaN equals itself."""
    return values.view(torch.int32 if values.dtype == torch.float32 else torch.int16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("head", [16, 24, 64, 128, 256])
def test_head_sizes(head: int, dtype: torch.dtype, device: str) -> None:
    Case.random([5, 37], 40, head=head, dtype=dtype).check(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_tile_of_keys_takes_no_more_for_wide_heads(dtype: torch.dtype) -> None:
    assert [keys_at_a_time(dtype, head) * head * dtype.itemsize <= 16384 for head in (16, 64, 128)] == [True] * 3
    assert keys_at_a_time(dtype, 256) * 256 * dtype.itemsize == 16384


@pytest.mark.parametrize("group", [1, 2, 7, 8])
def test_query_heads_share_a_kv_head(group: int, device: str) -> None:
    Case.random([33, 2], 34, group=group, kv_heads=3).check(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("splits", [1, 2, 4, 16])
def test_rows_of_any_length_in_any_number_of_shares(splits: int, dtype: torch.dtype, device: str) -> None:
    room = 100
    Case.random([0, 1, 31, 32, 33, room - 1], room, kv_heads=1, dtype=dtype).check(device, splits=splits)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [1, 2, 31, 33, 64, 1000])
def test_a_window_counts_the_token_itself(window: int, sinks: bool, device: str) -> None:
    case = replace(Case.random([0, 1, 32, 40, 98], 99, kv_heads=1), window=window)
    (case.with_sinks() if sinks else case).check(device, splits=2)


def test_what_lies_before_the_window_is_not_read(device: str) -> None:
    case = replace(Case.random([40, 98], 99), window=7)
    for row, length in enumerate((40, 98)):
        case.keys[row, :, : length - 6] = torch.nan
        case.values[row, :, : length - 6] = torch.nan
    assert case.run(device)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_sinks_take_part_in_the_sum_only(dtype: torch.dtype, device: str) -> None:
    case = Case.random([0, 6, 60], 64, dtype=dtype).with_sinks()
    case.check(device)
    assert case.run(device)[0].norm() < replace(case, sinks=None).run(device)[0].norm()
    ruling = replace(case, sinks=torch.full_like(case.sinks, 200.0))
    assert ruling.run(device)[0].abs().max() < 1e-6


def test_scores_far_from_zero_neither_overflow_nor_vanish(device: str) -> None:
    case = Case.random([3, 50], 60)
    case = replace(case, q=case.q * 60, scaling=1.0)
    got, _, _ = case.run(device, splits=4)
    want, _, _ = case.run("cpu", decode_attention_reference)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_values_in_any_order_of_rows_and_heads(device: str) -> None:
    case = Case.random([4, 20], 24)
    loose = replace(case, q=case.q.contiguous(), k=torch.stack([case.k, case.v], 1)[:, 0], v=case.v.contiguous())
    assert torch.equal(loose.run(device)[0], case.run(device)[0])


@settings(max_examples=12, deadline=None)
@given(
    data=st.data(),
    room=st.integers(1, 70),
    group=st.integers(1, 5),
    head=st.sampled_from([8, 16, 20]),
    window=st.none() | st.integers(1, 80),
    sinks=st.booleans(),
    splits=st.none() | st.sampled_from([1, 2, 8]),
)
def test_any_shape_equals_the_loop(
    data: st.DataObject,
    room: int,
    group: int,
    head: int,
    window: int | None,
    sinks: bool,
    splits: int | None,
    device: str,
) -> None:
    lengths = data.draw(st.lists(st.integers(0, room - 1), min_size=1, max_size=3))
    case = replace(Case.random(lengths, room, group=group, kv_heads=1, head=head), window=window)
    (case.with_sinks() if sinks else case).check(device, **({} if splits is None else {"splits": splits}))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"k": torch.zeros(1, 3, 1, 16), "v": torch.zeros(1, 3, 1, 16)}, "one new token a row"),
        ({"q": torch.zeros(1, 4, 2, 16)}, "one new token a row"),
        ({"values": torch.zeros(2, 2, 8, 8)}, "one head size"),
        ({"lengths": torch.zeros(2, dtype=torch.int64)}, "int32 lengths"),
        ({"keys": torch.zeros(2, 2, 8, 16, dtype=torch.bfloat16)}, "one dtype"),
        ({"keys": torch.zeros(2, 8, 2, 16).transpose(1, 2)}, "contiguous caches"),
        ({"q": torch.zeros(1, 4, 1, 32)[..., ::2]}, "side by side"),
        ({"k": torch.zeros(1, 2, 1, 32)[..., ::2]}, "side by side"),
        ({"v": torch.zeros(1, 2, 1, 32)[..., ::2]}, "side by side"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Tensor], named: str, device: str) -> None:
    case = replace(Case.random([3], 8), **changes)
    with pytest.raises(ExpertFlowError, match=named):
        case.run(device)
