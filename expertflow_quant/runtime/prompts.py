"""Chat messages to model inputs: template, images, left padding, and what the prompt costs in tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import torch
from torch import Tensor

from expertflow_quant.formats.errors import ExpertFlowError

Message = Mapping[str, Any]
"""{"role", "content": str | [{"type": "text", "text"} | {"type": "image", "image": PIL.Image}]}."""

PLACEHOLDERS = ("image_token", "video_token", "audio_token", "vision_start_token", "vision_end_token")


class PromptError(ExpertFlowError):
    """A conversation that cannot be turned into a prompt, or that does not fit into the model's context."""


@dataclass(frozen=True)
class Prompts:
    """A left-padded batch: everything the processor made, passed on whole, and the tokens of each prompt."""

    inputs: dict[str, Any]
    prompt_tokens: tuple[int, ...]
    image_tokens: tuple[int, ...]

    @property
    def width(self) -> int:
        """Columns of the padded batch; generated tokens begin after them."""
        return int(self.inputs["input_ids"].shape[1])

    def __len__(self) -> int:
        return len(self.prompt_tokens)


class PromptEncoder:
    """Turns conversations into prompts for one model. ``processor``: its processor, or its tokenizer when it
    reads text only. ``room``, if set, is the most tokens that prompt and answer may have together."""

    def __init__(self, processor: Any, config: Any) -> None:
        self._processor = processor
        self._tokenizer = getattr(processor, "tokenizer", processor)
        self._tokenizer.padding_side = "left"
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._reads_images = processor is not self._tokenizer
        self._image_id = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
        self.context = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
        self.room: int | None = None
        self._reserved = [text for name in PLACEHOLDERS if (text := getattr(processor, name, None))]

    def encode(self, conversations: Sequence[Sequence[Message]], max_new_tokens: int) -> Prompts:
        """Prompts that end where the answers begin, on the CPU.

        Raises PromptError for a message that is not understood, and when a prompt and ``max_new_tokens``
        together are longer than the model's context.
        """
        texts = [self._rendered(conversation) for conversation in conversations]
        images = [_images(conversation) for conversation in conversations]
        inputs = self._processed(texts, images)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        image_tokens = _count(ids == self._image_id, mask) if self._image_id is not None else [0] * len(texts)
        prompts = Prompts(inputs, tuple(_count(torch.ones_like(ids), mask)), tuple(image_tokens))
        self._check_fits(prompts, max_new_tokens)
        return prompts

    def _rendered(self, conversation: Sequence[Message]) -> str:
        if not conversation:
            raise PromptError("a conversation holds no messages: give at least one")
        messages = [self._checked(message) for message in conversation]
        try:
            return self._processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except (jinja2.TemplateError, ValueError, KeyError, TypeError) as error:
            raise PromptError(f"the model's chat template does not take these messages: {error}") from error

    def _checked(self, message: Message) -> dict[str, Any]:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise PromptError(f'message {str(message)[:80]!r} is not understood: give {{"role", "content"}}')
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, Sequence):
            raise PromptError(f"content {str(content)[:80]!r} is not understood: give text or a list of parts")
        for part in parts:
            self._check_part(part)
        if self._reads_images and not isinstance(content, str):
            return {**message, "content": [dict(part) for part in parts]}
        return {**message, "content": "".join(part["text"] for part in parts)}

    def _check_part(self, part: Any) -> None:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            for reserved in self._reserved:
                if reserved in part["text"]:
                    raise PromptError(f"the text holds {reserved!r}, which stands for an image: leave it out")
        elif kind != "image" or part.get("image") is None:
            raise PromptError(
                f"content part of type {kind!r} is not understood: give "
                '{"type": "text", "text": ...} or {"type": "image", "image": PIL image}'
            )
        elif not self._reads_images:
            raise PromptError("this model reads text only: leave the images out")

    def _processed(self, texts: list[str], images: list[list[Any]]) -> dict[str, Any]:
        options: dict[str, Any] = {"text": texts, "padding": True, "return_tensors": "pt"}
        if not self._reads_images:
            options["return_token_type_ids"] = False
        if not self._reads_images or texts[0].startswith(self._tokenizer.bos_token or "\0"):
            options["add_special_tokens"] = False  # the template has written them
        if any(images):
            options["images"] = images
        try:
            return dict(self._processor(**options))
        except (ValueError, TypeError, IndexError, OSError) as error:
            raise PromptError(f"the processor does not take these messages: {error}") from error

    def _check_fits(self, prompts: Prompts, max_new_tokens: int) -> None:
        for prompt, image in zip(prompts.prompt_tokens, prompts.image_tokens, strict=True):
            wanted = prompt + max_new_tokens
            limits = {"the model's context of": self.context, "the room kept for a row (--context) of": self.room}
            for what, limit in limits.items():
                if limit is not None and wanted > limit:
                    raise PromptError(
                        f"a prompt of {prompt} tokens ({image} of them image) and {max_new_tokens} new ones "
                        f"exceed {what} {limit}: shorten it"
                        + (f" or ask for at most {limit - prompt}" if prompt < limit else "")
                    )


def _images(conversation: Sequence[Message]) -> list[Any]:
    contents = [message["content"] for message in conversation if not isinstance(message["content"], str)]
    return [part["image"] for parts in contents for part in parts if part["type"] == "image"]


def _count(wanted: Tensor, mask: Tensor) -> list[int]:
    counts: list[int] = (wanted.long() * mask).sum(dim=1).tolist()
    return counts
