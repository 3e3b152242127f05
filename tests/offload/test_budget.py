"""Budgets as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertflow_quant.offload.budget import BudgetError, format_bytes, format_bytes_up, parse_budget


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        (65536, 65536),
        ("65536", 65536),
        ("65536 B", 65536),
        ("2MiB", 2 * 2**20),
        ("1.5 GiB", 3 * 2**29),
        (" 0.5gb ", 500_000_000),
        ("3 KB", 3000),
        ("25%", 250),
        ("12.5 %", 125),
        ("100%", 1000),
    ],
)
def test_amounts_and_shares(text, nbytes):
    assert parse_budget(text, 1000) == nbytes


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ("", "cannot be read"),
        ("lots", "cannot be read"),
        ("-2MiB", "cannot be read"),
        ("1,5 GiB", "cannot be read"),
        ("1e3", "cannot be read"),
        ("2 MiB extra", "cannot be read"),
        ("2 parsecs", "unknown unit 'parsecs'"),
        ("101%", "more than all experts"),
        ("0%", "above zero"),
        ("0", "above zero"),
        (0, "above zero"),
        (-1, "above zero"),
        (True, "cannot be read"),
        (1.5, "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_what_is_no_budget_is_refused_with_the_value(value, part):
    with pytest.raises(BudgetError, match=part) as error:
        parse_budget(value, 1000)
    assert repr(value) in str(error.value)
    assert "give" in str(error.value)


def test_a_share_that_rounds_to_nothing_is_refused():
    with pytest.raises(BudgetError, match="above zero"):
        parse_budget("0.01%", 100)


def test_bytes_for_a_person():
    assert [format_bytes(n) for n in (0, 1023, 2202009, 2**30, 2**41)] == [
        "0 B",
        "1023 B",
        "2.1 MiB",
        "1.0 GiB",
        "2.0 TiB",
    ]


@given(st.integers(1, 2**45))
def test_the_amount_named_as_a_remedy_is_enough(nbytes):
    shown = parse_budget(format_bytes_up(nbytes), nbytes)
    assert nbytes <= shown <= nbytes * 1.11 + 1
