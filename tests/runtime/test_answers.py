"""Where an answer ends, and its text while it is being made."""

import pytest
from helpers.tiny import byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.runtime.answers import Sampling, TextEmitter, cut_answer, decode, find_stop

TOKENIZER = byte_tokenizer()
END = frozenset({2})


def tokens_of(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def test_an_end_token_ends_the_answer_and_counts():
    answer = cut_answer(TOKENIZER, [*tokens_of("four"), 2, 0, 0], END, ())
    assert (answer.text, answer.finish_reason) == ("four", "stop")
    assert answer.token_ids == (*tokens_of("four"), 2)


def test_without_an_end_it_is_the_length():
    answer = cut_answer(TOKENIZER, tokens_of("four"), END, ())
    assert (answer.text, answer.finish_reason, len(answer.token_ids)) == ("four", "length", 4)


def test_a_stop_text_is_cut_off_and_the_tokens_after_it():
    answer = cut_answer(TOKENIZER, [*tokens_of("one, two, three"), 2], END, (" two", ","))
    assert (answer.text, answer.finish_reason) == ("one", "stop")
    assert answer.token_ids == tuple(tokens_of("one,"))


def test_the_earliest_stop_text_counts():
    assert find_stop("abcabc", ("ca", "bc")) == 1
    assert find_stop("abc", ("x",)) is None


def pieces(token_ids, stop=()):
    emitter = TextEmitter(TOKENIZER, stop)
    made = [emitter.feed(token) for token in token_ids]
    answer = cut_answer(TOKENIZER, token_ids, END, stop)
    return [*made, emitter.finish(answer.text)], answer.text


@given(st.text(max_size=30), st.lists(st.sampled_from(["a", "ab", "\n", "é", "aba", "x y"]), max_size=2))
def test_pieces_make_up_the_text(text, stop):
    made, wanted = pieces(tokens_of(text), tuple(stop))
    assert "".join(made) == wanted
    if not stop:
        assert wanted == text


@given(st.lists(st.integers(0, 262).filter(lambda token: token not in END), max_size=30))
def test_pieces_make_up_the_text_of_any_bytes(token_ids):
    made, wanted = pieces(token_ids)
    assert "".join(made) == wanted


def test_a_character_comes_whole():
    made, _ = pieces(tokens_of("a€b"))
    assert made == ["a", "", "", "€", "b", ""]


def test_what_may_become_a_stop_text_is_held_back():
    made, _ = pieces(tokens_of("a<b</s>c"), ("</s>",))
    assert made == ["a", "", "<b", "", "", "", "", "", ""]
    assert pieces(tokens_of("a</"), ("</s>",))[0] == ["a", "", "", "</"]


def test_special_tokens_are_no_text():
    assert decode(TOKENIZER, [1, *tokens_of("hi"), 2]) == "hi"


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": 2.5},
        {"max_new_tokens": True},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"stop": ("", "x")},
    ],
)
def test_impossible_options_are_refused_with_their_value(options):
    with pytest.raises(ExpertFlowError, match=next(iter(options))):
        Sampling(**options)
