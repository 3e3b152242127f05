"""For all tests: helpers on the path, one thread, nothing from a hub, quiet libraries."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))  # `from helpers import ...`

import pytest
import torch
import transformers

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason=f"no NVIDIA GPU that torch {torch.__version__} can use")
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(skip)
