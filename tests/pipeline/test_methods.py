"""A layer's experts in batches and on threads: the same records as one by one."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from expertflow_quant.formats import ExpertFlowError, ExpertShape, Format, RecordLayout
from expertflow_quant.kernels import ExpertWeights, expert_weights
from expertflow_quant.pipeline.methods import BATCH_BYTES, Job, LayerQuantizer, MethodOptions, batch_size
from expertflow_quant.pipeline.observe import ExpertRows
from expertflow_quant.pipeline.parallel import side_by_side

SHAPE = ExpertShape(64, 32)
FORMATS = ("int4-g32", "int3-channel-asym", "bf16")


def silu_gate(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def jobs(count: int = 11, device: str = "cpu") -> Iterator[Job]:
    """Experts with very different numbers of rows, none for the third."""
    generator = torch.Generator().manual_seed(0)
    size = torch.exp(torch.randn(64, generator=generator))
    for expert in range(count):
        matrices = [torch.randn(*size, generator=generator) / 8 for size in SHAPE.matrices.values()]
        rows = 0 if expert == 2 else 30 * expert + 1
        inputs = torch.randn(rows, 64, generator=generator) * size
        found = ExpertRows(inputs.to(device), torch.rand(rows, generator=generator).to(device), rows, "routed")
        weights = ExpertWeights(*(matrix.to(device) for matrix in matrices))
        yield Job(expert, Format.parse(FORMATS[expert % 5 // 2]), weights, found)


def made(method: str, batch: int | None = None, device: str = "cpu") -> dict[int, tuple[float, Tensor, RecordLayout]]:
    quantizer = LayerQuantizer(method, SHAPE, silu_gate, MethodOptions(max_rows=128, grid=8), batch)
    return {
        expert: (entry.error, record, RecordLayout(SHAPE, entry.format, entry.input_scale))
        for expert, entry, record in quantizer.run(jobs(device=device))
    }


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("method", ["rtn", "awq", "gptq"])
def test_the_bytes_are_the_same_on_any_number_of_threads(method: str) -> None:
    found = []
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        found.append(made(method))
        assert torch.get_num_threads() == count
    assert sorted(found[0]) == list(range(11))
    for other in found[1:]:
        assert all(torch.equal(found[0][expert][1], other[expert][1]) for expert in range(11))
        assert all(found[0][expert][0] == other[expert][0] for expert in range(11))


def same_experts(one: dict[int, tuple[float, Tensor, RecordLayout]], other: object) -> None:
    """Nearly every code is the same, and errors agree within 1 %."""
    assert isinstance(other, dict)
    for expert, (error, record, layout) in one.items():
        assert other[expert][0] == pytest.approx(error, rel=0.01, abs=1e-5)
        mine, theirs = (
            expert_weights(layout.views(each), layout, torch.float32) for each in (record, other[expert][1])
        )
        same = [a == b for a, b in ((mine.gate_up, theirs.gate_up), (mine.down, theirs.down))]
        assert float(torch.cat([each.flatten() for each in same]).float().mean()) > 0.99


@pytest.mark.parametrize("method", ["rtn", "awq", "gptq"])
def test_batches_give_what_experts_give_one_by_one(method: str) -> None:
    alone = made(method, 1)
    for batch in (3, 16):
        same_experts(alone, made(method, batch))


@pytest.mark.cuda
@pytest.mark.parametrize("method", ["rtn", "awq", "gptq"])
def test_a_gpu_gives_what_the_cpu_gives(method: str) -> None:
    same_experts(made(method), made(method, device="cuda"))


def test_batches_fit_their_bytes() -> None:
    large = ExpertShape(2048, 768)
    assert batch_size(large, torch.device("cpu")) == 1
    assert batch_size(SHAPE, torch.device("cpu")) == 4
    count = batch_size(large, torch.device("cuda"))
    assert 8 <= count <= 32
    assert count * 4 * 8 * 2048**2 <= BATCH_BYTES["cuda"]


@pytest.mark.usefixtures("threads")
def test_pieces_are_asked_for_as_needed_and_each_has_one_thread() -> None:
    torch.set_num_threads(3)
    asked: list[int] = []

    def pieces() -> Iterator[int]:
        for piece in range(20):
            asked.append(piece)
            yield piece

    found = side_by_side(pieces(), lambda piece: (piece, torch.get_num_threads()), lambda piece: piece % 5 > 0)
    first = next(found)
    assert len(asked) <= 5
    everything = [first, *found]
    assert sorted(piece for piece, _ in everything) == list(range(20))
    assert all(count == 1 for piece, count in everything if piece % 5)


@pytest.mark.usefixtures("threads")
def test_an_error_in_one_piece_is_told() -> None:
    torch.set_num_threads(2)

    def make(piece: int) -> int:
        if piece == 4:
            raise ExpertFlowError("piece 4 holds NaN")
        return piece

    with pytest.raises(ExpertFlowError, match="piece 4 holds NaN"):
        list(side_by_side(iter(range(20)), make, lambda piece: True))
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("name", ["gate_up", "down"])
@pytest.mark.parametrize(("method", "form"), [("rtn", "nf4-g32"), ("awq", "int4-g32"), ("gptq", "int3-channel-asym")])
def test_weights_beyond_any_scale_are_refused_by_name(method: str, form: str, name: str) -> None:
    given = [replace(job, format=Format.parse(form)) for job in jobs(4)]
    getattr(given[3].weights, name)[5, 40 if name == "gate_up" else 20] = 3e6
    quantizer = LayerQuantizer(method, SHAPE, silu_gate, MethodOptions(), batch=4)
    with pytest.raises(ExpertFlowError, match=f"^expert 3: {name}: weights as large as .* beyond 65504 in "):
        list(quantizer.run(iter(given)))
