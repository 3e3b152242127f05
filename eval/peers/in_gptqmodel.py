"""``python -m eval.peers.in_gptqmodel JOBS``: run by ``python -m eval peers`` in GPTQModel's own environment.

Every job names a model folder, a method, a format and the file for the MLP's weights as they will run. Nothing of this
repository is imported here.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.quantization import FORMAT, METHOD
from safetensors.torch import save_file


def quantize(job: dict[str, Any], sequence: int) -> None:
    settings = {"bits": job["bits"], "group_size": job["group"], "sym": job["symmetric"], "offload_to_disk": False}
    if job["method"] == "gptq":
        backend, config = BACKEND.TORCH, QuantizeConfig(**settings, **job["options"])
    else:
        backend, config = BACKEND.AWQ_TORCH, QuantizeConfig(**settings, quant_method=METHOD.AWQ, format=FORMAT.GEMM)
    model = GPTQModel.load(job["model"], config, device="cpu", dtype=torch.float16)
    count = model.model.config.vocab_size
    sequences = [list(range(start, start + sequence)) for start in range(0, count, sequence)]
    rows = [{"input_ids": ids, "attention_mask": [1] * sequence} for ids in sequences]
    model.quantize(rows, batch_size=1, backend=backend)
    saved = f"{job['out']}.model"
    model.save(saved)
    model = GPTQModel.load(saved, device="cpu", backend=backend, dtype=torch.float16)  # as it is used
    layer = model.model.model.layers[0]
    found = {"norm": layer.post_attention_layernorm.weight.detach().float()}
    with torch.no_grad():
        for name in ("gate", "up", "down"):
            linear = getattr(layer.mlp, f"{name}_proj")
            identity = torch.eye(linear.in_features, dtype=torch.float16)
            found[name] = linear(identity).float().T.contiguous()  # what it does to every unit vector
    save_file(found, job["out"])


if __name__ == "__main__":
    wanted = json.loads(Path(sys.argv[1]).read_text())
    for each in wanted["jobs"]:
        quantize(each, wanted["sequence"])
