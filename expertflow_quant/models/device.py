"""Which device a name means here, checked before anything is loaded onto it."""

import torch

from expertflow_quant.formats.errors import ExpertFlowError


def pick_device(name: str) -> torch.device:
    """The device called "cpu", "cuda", "cuda:N", or "auto": a GPU where torch sees one, else the CPU.

    Raises ExpertFlowError for any other name and for a GPU that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ExpertFlowError(f"device {name!r} is not known: use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ExpertFlowError(f"device {name!r} is not supported: use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ExpertFlowError(
            f"device {name!r} is not there: torch {torch.__version__} sees {torch.cuda.device_count()}: "
            "use cpu or install a torch built for CUDA"
        )
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device
