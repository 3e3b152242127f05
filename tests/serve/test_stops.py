"""Stop texts against the plain definition: the answer up to the first place where any of them begins."""

from hypothesis import given
from hypothesis import strategies as st

from expertflow_quant.serve.stops import StopScanner

pieces = st.lists(st.text("ab", max_size=4), max_size=8)
stops = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)


@given(pieces, stops)
def test_streamed_equals_whole(given_pieces, given_stops):
    scanner, sent = StopScanner(given_stops), []
    for piece in given_pieces:
        sent.append(scanner.feed(piece))
        if scanner.hit:
            break
    sent.append(scanner.rest())
    assert "".join(sent) == before_any_stop(given_pieces, given_stops)


@given(pieces, stops)
def test_nothing_waits_that_no_stop_text_could_begin_with(given_pieces, given_stops):
    scanner, sent, seen = StopScanner(given_stops), "", ""
    for piece in given_pieces:
        sent, seen = sent + scanner.feed(piece), seen + piece
        if scanner.hit:
            return
        held = seen[len(sent) :]
        assert not held or any(stop.startswith(held) for stop in given_stops)


def before_any_stop(given_pieces, given_stops):
    """Piece by piece: a short stop text ends the answer before a longer one that began earlier is."""
    text = ""
    for piece in given_pieces:
        text += piece
        places = [text.find(stop) for stop in given_stops if stop in text]
        if places:
            return text[: min(places)]
    return text
