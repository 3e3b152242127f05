"""A promise about a device's memory: planned before anything is on it, enforced by torch, checked once when built."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.offload.budget import format_bytes
from expertflow_quant.offload.slots import LayerRecords
from expertflow_quant.runtime import memory_device
from expertflow_quant.runtime.answers import Sampling
from expertflow_quant.runtime.engine import Engine
from expertflow_quant.runtime.fast.build import FastOptions
from expertflow_quant.runtime.fast.needs import longest_pass, share
from expertflow_quant.runtime.longest import NEW_TOKENS, longest_prompts
from expertflow_quant.runtime.memory import MemoryPlan, MemoryPlanError, Needs, parse_gpu_memory
from expertflow_quant.runtime.prompts import PromptEncoder


def device_bytes(device: torch.device) -> int:
    """All memory of a CUDA device."""
    return int(torch.cuda.get_device_properties(device).total_memory)


def make_promise(
    gpu_memory: int | str, needs: Needs, layers: Sequence[LayerRecords], wanted: int, device: torch.device
) -> tuple[MemoryPlan, int]:
    """The plan and the bytes for experts (``needs.share``) in ``gpu_memory`` of ``device``, which is torch's limit for
    this process from now on.

    Raises MemoryPlanError with the numbers where ``needs`` do not fit, BudgetError for what cannot be read.
    """
    total = parse_gpu_memory(gpu_memory, device_bytes(device))
    plan, budget = share(total, needs, layers, wanted)
    torch.cuda.empty_cache()  # what quantizing in this process left
    memory_device.limit_process(total, device)
    return plan, budget


def refuse_promise(gpu_memory: int | str, device: torch.device, fast: bool) -> None:
    """Raises ExpertFlowError where ``gpu_memory`` cannot be kept: on the CPU, and without the fast path."""
    if device.type != "cuda":
        raise ExpertFlowError(
            f"--gpu-memory {gpu_memory!r} is a promise about a GPU, and the device is {device}: bound what experts "
            "take with --expert-memory instead, or choose a GPU with --device"
        )
    if not fast:
        raise ExpertFlowError(
            f"--gpu-memory {gpu_memory!r} is kept by the fast path only, which was turned off: leave it on, or bound "
            "what experts take with --expert-memory instead"
        )


@contextmanager
def promised(plan: MemoryPlan | None) -> Iterator[None]:
    """Raises MemoryPlanError where what happens inside runs into the limit of ``plan``, if there is one."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        if plan is None:
            raise
        raise _broken(plan, f"more was needed ({str(error).splitlines()[0]})") from error


def check_promise(engine: Engine, plan: MemoryPlan, options: FastOptions) -> int:
    """Run the longest prefill, of the largest images, and a step of decoding: the bytes that were reserved at most.

    Raises MemoryPlanError with the numbers when that is more than the plan allows.
    """
    encoder = PromptEncoder(engine.processor, engine.model.config)
    encoder.room = engine.runner.room
    tokens, rows = longest_pass(options)
    prompts = longest_prompts(encoder, options.room, rows, tokens)
    sampling = Sampling(NEW_TOKENS, temperature=1.0, top_p=0.9, seed=0)
    held = int(torch.cuda.memory_allocated(engine.device))
    peak = held + memory_device.measure_peak(lambda: engine.runner.run([prompts], sampling), engine.device)
    engine.reset_stats()
    if peak > plan.reservable:
        raise _broken(plan, f"{len(prompts)} prompts of {prompts.width} tokens reserved {format_bytes(peak)}")
    return peak


def _broken(plan: MemoryPlan, what: str) -> MemoryPlanError:
    needs = plan.needs
    parts = ", ".join(f"{name} {format_bytes(nbytes)}" for name, nbytes, _ in needs.parts())
    return MemoryPlanError(
        f"--gpu-memory {format_bytes(plan.total)} could not be kept: {what}, the plan leaves "
        f"{format_bytes(plan.reservable)} to torch ({parts}, experts {format_bytes(plan.experts)}): raise "
        f"--gpu-memory, keep fewer than {needs.context} tokens a row (--context), or give the "
        "experts less with --expert-memory"
    )
