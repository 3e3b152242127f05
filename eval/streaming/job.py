"""The process whose memory is watched: quantizes one model, and says on its standard output how far it is.

``python -m eval.streaming.job MODEL OUT METHOD FORMAT BATCHES ROWS TOKENS DEVICE``; 0 batches: without
calibration.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from expertflow_quant.pipeline.batches import CalibrationData
from expertflow_quant.pipeline.observe import Observations
from expertflow_quant.pipeline.quantize import quantize_model
from expertflow_quant.pipeline.stream import ModelStream


def main(arguments: list[str]) -> None:
    model, out, method, form = arguments[:4]
    batches, rows, tokens = (int(number) for number in arguments[4:7])
    device = arguments[7]
    say("libraries are loaded")
    stream = ModelStream(model)
    say("headers are read")
    data = random_tokens(stream, batches, rows, tokens) if batches else None
    report = quantize_model(
        stream,
        Path(out),
        method=method,
        plan=form,
        observations=None if data is None else Observations(stream, data, device=device),
        device=device,
        progress=tell,
    )
    say("done", seconds=round(report.seconds, 1), expert_bytes=report.expert_bytes)


def random_tokens(stream: ModelStream, batches: int, rows: int, tokens: int) -> CalibrationData:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(stream.config.vocab_size, (rows, tokens), generator=generator) for _ in range(batches)]
    return CalibrationData.from_batches([{"input_ids": each} for each in ids])


def tell(done: int, total: int, what: str) -> None:
    say(what, done=done, total=total)


def say(what: str, **more: Any) -> None:
    print(json.dumps({"time": time.time(), "what": what, **more}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
