"""What one server lets a client ask for; every bound has a remedy in the error that enforces it."""

from dataclasses import dataclass, fields

from expertflow_quant.formats.errors import ExpertFlowError


@dataclass(frozen=True)
class Limits:
    """Bounds of one server. Sizes in bytes, pixels or tokens; all at least 1, ``max_queue`` at least 0."""

    max_queue: int = 16
    """Requests that may wait while one is answered; the next one gets 429."""
    max_tokens: int = 4096
    """Most tokens that one answer may ask for."""
    default_max_tokens: int = 256
    """Length of an answer whose request names none."""
    max_body_bytes: int = 32 << 20
    max_images: int = 8
    max_image_pixels: int = 4096 * 4096
    """Of one image, read from its header before a pixel is decoded."""
    max_request_pixels: int = 2 * 4096 * 4096
    """Of all images of one request together."""

    @classmethod
    def for_context(cls, context: int, max_queue: int, max_tokens: int | None = None) -> "Limits":
        """For a model that reads and writes ``context`` tokens in all: an answer that names no length leaves
        at least three quarters of it to the prompt."""
        longest = min(context, max_tokens or context)
        return cls(max_queue, longest, min(256, longest, max(1, context // 4)))

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), 0 if field.name == "max_queue" else 1
            if value < least:
                raise ExpertFlowError(f"{field.name} is {value}; it must be at least {least}: raise it")
        if self.default_max_tokens > self.max_tokens:
            raise ExpertFlowError(
                f"default_max_tokens is {self.default_max_tokens}, max_tokens {self.max_tokens}: lower it"
            )
