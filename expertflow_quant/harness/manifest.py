"""What lmms-eval reads from the entry point group ``lmms_eval.models``: the name of our model there, and its class."""

from typing import Any

NAME = "expertflow"
CLASS = "expertflow_quant.harness.lmms.ExpertFlow"


def manifest() -> Any:
    """The ``ModelManifest`` of ``--model expertflow``; a simple model, which dictionaries of tasks require."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=NAME, simple_class_path=CLASS)
