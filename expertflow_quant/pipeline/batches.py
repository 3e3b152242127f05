"""Calibration data: conversations made into the batches of tensors that a model takes."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from expertflow_quant.formats.errors import ExpertFlowError

CalibrationSample = dict[str, Any]
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class AnsweredBatch:
    """Conversations with their answers: ``inputs`` as the model takes them, ``[B, S]``; ``places`` int64 [N], where in
    the flattened ``[B * S]`` the token before each answer token stands; ``targets`` int64 [N], the answer tokens;
    ``sample`` int64 [N], the number of the conversation, counted over all batches."""

    inputs: Batch
    places: Tensor
    targets: Tensor
    sample: Tensor


@dataclass(frozen=True)
class CalibrationData:
    """Batches of model inputs, each made when it is asked for; ``digest`` says which data it is, ``about``
    in words.

    A batch holds ``input_ids`` [B, S] and what else the model's processor gives; ``attention_mask`` [B, S]
    marks the tokens that count.
    """

    batches: Sequence[Callable[[], Batch]]
    digest: str
    about: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.batches:
            raise ExpertFlowError("there are no calibration samples: give at least one (128 are usual)")

    @classmethod
    def from_samples(
        cls, processor: Any, samples: Sequence[CalibrationSample], batch_size: int = 16
    ) -> "CalibrationData":
        """Conversations ``{"messages": [...]}``, templated and tokenized as the model's processor does.

        ``processor`` may be a plain tokenizer for conversations without images. Raises ExpertFlowError for a
        sample that the processor refuses, naming its number.
        """
        _check_images(processor, samples)
        groups = [samples[start : start + batch_size] for start in range(0, len(samples), batch_size)]
        batches = [partial(_encode, processor, group, number * batch_size) for number, group in enumerate(groups)]
        return cls(batches, samples_digest(samples), {"samples": len(samples), "batch": batch_size})

    @classmethod
    def from_batches(cls, batches: Sequence[Batch]) -> "CalibrationData":
        """Batches that are tensors already."""
        digest = hashlib.sha256()
        for batch in batches:
            for name, tensor in sorted(batch.items()):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return cls([partial(dict, batch) for batch in batches], digest.hexdigest(), {"batches": len(batches)})


def answered_batches(processor: Any, samples: Sequence[CalibrationSample], batch_size: int = 16) -> list[AnsweredBatch]:
    """``samples`` with the places of their answers: the tokens of the last turn, which must be the assistant's, up to
    the one that ends it. Raises ExpertFlowError for a sample without an answer, naming its number."""
    _check_images(processor, samples)
    for number, sample in enumerate(samples):
        if sample["messages"][-1]["role"] != "assistant":
            raise ExpertFlowError(
                f"sample {number} ends with the turn of the {sample['messages'][-1]['role']}: predictions are judged "
                "at an answer, so give conversations whose last turn is the assistant's"
            )
    return [
        _answered(processor, samples[start : start + batch_size], start) for start in range(0, len(samples), batch_size)
    ]


def _answered(processor: Any, samples: Sequence[CalibrationSample], first: int) -> AnsweredBatch:
    whole = _encode(processor, samples, first)
    asked = _encode(processor, [{"messages": each["messages"][:-1]} for each in samples], first, True)
    ids, mask = whole["input_ids"], whole["attention_mask"].bool()
    end = getattr(processor, "tokenizer", processor).eos_token_id
    places: list[int] = []
    numbers: list[int] = []
    for row in range(len(samples)):
        begin, stop = int(asked["attention_mask"][row].sum()), int(mask[row].sum())
        if stop <= begin or not torch.equal(ids[row, :begin], asked["input_ids"][row, :begin]):
            raise ExpertFlowError(
                f"sample {first + row}: its prompt is not the beginning of the conversation in the model's chat "
                "template, so where the answer begins is not known: measure at the experts' outputs instead"
            )
        ends = (ids[row, begin:stop] == end).nonzero()
        stop = begin + int(ends[0]) + 1 if len(ends) else stop
        places += [row * ids.shape[1] + column - 1 for column in range(begin, stop)]
        numbers += [first + row] * (stop - begin)
    at = torch.tensor(places)
    return AnsweredBatch(whole, at, ids.reshape(-1)[at + 1], torch.tensor(numbers))


def samples_digest(samples: Sequence[CalibrationSample]) -> str:
    """sha256 (hex) of conversations: their text, roles, order, and their images' pixels."""
    text = json.dumps([sample["messages"] for sample in samples], default=_image_key, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _check_images(processor: Any, samples: Sequence[CalibrationSample]) -> None:
    """What transformers would leave out without a word is refused."""
    reads_images = getattr(processor, "image_processor", None) is not None
    for number, sample in enumerate(samples):
        parts = [part for turn in sample["messages"] for part in turn["content"] if isinstance(part, dict)]
        for image in [part.get("image") for part in parts if part.get("type") == "image"]:
            if not reads_images:
                raise ExpertFlowError(
                    f"calibration sample {number} has an image, but the model reads text only: give samples "
                    "without images (--samples)"
                )
            if not isinstance(image, Image.Image):
                raise ExpertFlowError(
                    f"calibration sample {number}: {image!r} is not a PIL image: open it, or use load_samples"
                )


def _image_key(value: object) -> str:
    if not isinstance(value, Image.Image):
        raise ExpertFlowError(f"a message holds a {type(value).__name__}: use text and PIL images")
    return hashlib.sha256(f"{value.mode} {value.size}".encode() + value.tobytes()).hexdigest()


def _encode(processor: Any, samples: Sequence[CalibrationSample], first: int, asks: bool = False) -> Batch:
    """``asks``: an answer is to follow."""
    conversations = [_with_parts(sample["messages"]) for sample in samples]
    tokenizer = getattr(processor, "tokenizer", processor)
    padding_side, tokenizer.padding_side = tokenizer.padding_side, "right"  # no token then sees any padding
    try:
        encoded = processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            add_generation_prompt=asks,
            **_padded(tokenizer is not processor),
        )
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
        raise ExpertFlowError(
            f"calibration samples {first} to {first + len(samples) - 1} were refused by the model's "
            f"{type(processor).__name__}: {error}: check their messages and images"
        ) from error
    finally:
        tokenizer.padding_side = padding_side
    return {name: value for name, value in encoded.items() if isinstance(value, Tensor)}


def _padded(has_images: bool) -> dict[str, Any]:
    """The options for tensors of one length, where a processor or a bare tokenizer wants them."""
    options = {"return_tensors": "pt", "padding": True}
    return {"processor_kwargs": options} if has_images else options


def _with_parts(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose content is a list of parts throughout, as processors want them."""
    return [
        {**turn, "content": [{"type": "text", "text": turn["content"]}]}
        if isinstance(turn["content"], str)
        else dict(turn)
        for turn in messages
    ]
