"""Systems as the command line names them."""

import re
from pathlib import Path

from eval.endpoint import Endpoint
from eval.judge import System
from expertflow_quant.formats import ExpertFlowError


def system_named(text: str, expert_memory: str) -> System:
    """PATH, LABEL=PATH, URL or LABEL=URL; a URL ends in "/v1", and "#MODEL" behind it says which model there.

    Raises ExpertFlowError for a label of which no file name can be made.
    """
    label, path = "", text
    if "=" in text and not text.startswith(("http://", "https://")) and not Path(text).exists():
        label, _, path = text.partition("=")
    if path.startswith(("http://", "https://")):
        url, _, model = path.partition("#")
        label = label or model or url.partition("//")[2]
        return System(_stem(label), label, Path(path), expert_memory, Endpoint(url, model or None))
    folder = Path(path)
    label = label or folder.resolve().name
    return System(_stem(label), label, folder, expert_memory)


def _stem(label: str) -> str:
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", label).strip("-.")
    if not stem:
        raise ExpertFlowError(f"{label!r} makes no file name: use letters and digits in labels")
    return stem
