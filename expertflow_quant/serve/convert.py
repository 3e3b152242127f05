"""From a checked request to what the worker takes."""

from collections.abc import Iterator

from PIL import Image

from expertflow_quant.serve.errors import ApiError
from expertflow_quant.serve.images import decode_images
from expertflow_quant.serve.limits import Limits
from expertflow_quant.serve.schema import ChatRequest, Message, Part
from expertflow_quant.serve.work import ChatMessage, Sampling


def chat_messages(request: ChatRequest, limits: Limits) -> list[ChatMessage]:
    """Decode the images and write every turn as the engine reads it. Slow: not for the event loop."""
    urls = [part.image_url.url for message in request.messages for part in message.content if part.image_url]
    images = iter(decode_images(urls, limits))
    return [_chat_message(message, images) for message in request.messages]


def sampling(request: ChatRequest, limits: Limits) -> Sampling:
    """Raises ApiError when more tokens are asked for than ``limits`` allow."""
    wanted = request.token_limit
    if wanted is not None and wanted > limits.max_tokens:
        raise ApiError(
            f"max_tokens is {wanted}; this server generates at most {limits.max_tokens}: ask for fewer",
            param="max_tokens",
            code="invalid_value",
        )
    return Sampling(
        max_new_tokens=wanted or limits.default_max_tokens,
        temperature=request.temperature or 0.0,
        top_p=1.0 if request.top_p is None else request.top_p,
        seed=request.seed,
        stop=tuple(request.stop or ()),
    )


def _chat_message(message: Message, images: Iterator[Image.Image]) -> ChatMessage:
    role = "system" if message.role == "developer" else message.role
    if len(message.content) == 1 and message.content[0].type == "text":
        return {"role": role, "content": message.content[0].text}
    return {"role": role, "content": [_chat_part(part, images) for part in message.content]}


def _chat_part(part: Part, images: Iterator[Image.Image]) -> dict[str, object]:
    if part.type == "text":
        return {"type": "text", "text": part.text}
    return {"type": "image", "image": next(images)}
