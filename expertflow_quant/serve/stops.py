"""Stop texts in a stream: what may be sent, and what waits because a stop text could begin in it."""

from collections.abc import Sequence


class StopScanner:
    """Give it an answer piece by piece; it returns what is surely before any stop text."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.hit = False

    def feed(self, piece: str) -> str:
        """The text that may be sent now; after a hit nothing more comes."""
        if self.hit:
            return ""
        text = self._held + piece
        ends = [place for place in (text.find(stop) for stop in self._stops) if place >= 0]
        if ends:
            self.hit, self._held = True, ""
            return text[: min(ends)]
        cut = len(text) - self._unsure(text)
        self._held = text[cut:]
        return text[:cut]

    def rest(self) -> str:
        """What was held back and proved harmless, at the end of the answer."""
        held, self._held = self._held, ""
        return held

    def _unsure(self, text: str) -> int:
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stops):
                return size
        return 0
