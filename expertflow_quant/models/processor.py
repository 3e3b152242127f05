"""Processors of Qwen-VL-like models, also where torchvision is absent.

transformers builds a Qwen3-VL processor only beside torchvision, because its video half needs it. Images do not:
without torchvision the same files are read into a processor that has no video half.
"""

import json
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, PreTrainedTokenizerBase, Qwen3VLProcessor
from transformers.processing_utils import ProcessorMixin
from transformers.utils import is_torchvision_available

from expertflow_quant.formats.errors import ExpertFlowError


class ImageProcessor(Qwen3VLProcessor):
    """Qwen3VLProcessor for text and images only; `ProcessorMixin` reads the parts it needs off this signature."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        for name, token in (
            ("image", "<|image_pad|>"),
            ("video", "<|video_pad|>"),
            ("vision_start", "<|vision_start|>"),
            ("vision_end", "<|vision_end|>"),
        ):
            setattr(self, f"{name}_token", token)
            setattr(self, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token))
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def load_processor(path: str | Path) -> Any:
    """The processor of a model folder: images in, or, for a text-only model, its tokenizer.

    Raises ExpertFlowError when a folder that describes an image processor yields none: a bare tokenizer would
    drop the images without a word.
    """
    path = Path(path)
    if not path.is_dir():
        raise ExpertFlowError(f"{path}: no such folder; a processor is read from a model's local folder")
    described = _described(path)
    if not is_torchvision_available() and described == "Qwen3VLProcessor":
        return ImageProcessor.from_pretrained(path)
    processor = AutoProcessor.from_pretrained(path)
    if described and isinstance(processor, PreTrainedTokenizerBase):
        raise ExpertFlowError(
            f"{path} describes a {described}, but transformers returned only a tokenizer, which would ignore images; "
            "install torchvision, which that processor needs"
        )
    return processor


def _described(path: Path) -> str | None:
    for name in ("processor_config.json", "preprocessor_config.json"):
        file = path / name
        if file.is_file():
            found = json.loads(file.read_text()).get("processor_class")
            return str(found) if found else None
    return None
