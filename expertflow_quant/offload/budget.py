"""Expert memory as a person writes it ("2MiB", "1.5 GiB", "25%", 65536), turned into bytes and back."""

import math
import re

from expertflow_quant.formats.errors import ExpertFlowError

UNITS = {
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", 1)},
    **{f"{prefix}IB": 1024**power for power, prefix in enumerate("KMGT", 1)},
}
KNOWN = "bytes (65536), an amount with a unit (2MiB, 1.5 GiB, 500 MB) or a share of {} (25%)"

_AMOUNT = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(%|[A-Za-z]+)?")


class BudgetError(ExpertFlowError):
    """An expert memory that cannot be read, or that cannot hold one token's working set."""


def parse_budget(value: int | str, total_bytes: int, what: str = "expert memory", whole: str = "all experts") -> int:
    """Bytes that ``value`` grants of ``total_bytes``: to experts, whose records take so much altogether.

    A share is rounded down to whole bytes. An amount above the total is allowed and means: everything
    resident. Raises BudgetError for anything that is not an amount above zero, or a share above 100 %.
    ``what`` is granted and ``whole`` has the total, in the words of these errors.
    """
    known = KNOWN.format(whole)
    match = _AMOUNT.fullmatch(value.strip()) if isinstance(value, str) else None
    if isinstance(value, int) and not isinstance(value, bool):
        nbytes = value
    elif match is None:
        raise BudgetError(f"{what} {value!r} cannot be read: give {known}")
    else:
        number, unit = float(match[1]), match[2] or "B"
        if unit == "%" and number > 100:
            raise BudgetError(f"{what} {value!r} is more than {whole}: give at most 100%")
        if unit != "%" and unit.upper() not in UNITS:
            raise BudgetError(f"{what} {value!r} has the unknown unit {unit!r}: give {known}")
        nbytes = math.floor(total_bytes * number / 100 if unit == "%" else number * UNITS[unit.upper()])
    if nbytes <= 0:
        raise BudgetError(f"{what} {value!r} is {nbytes} bytes: give {known}, above zero")
    return nbytes


def format_bytes(nbytes: int) -> str:
    """``nbytes`` for a person, in binary units with one decimal: 2202009 -> "2.1 MiB"."""
    amount = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def format_bytes_up(nbytes: int) -> str:
    """Like ``format_bytes``, rounded up to the shown digit, so that the amount shown is enough;
    ``parse_budget`` reads it."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= size:
            tenths = -(-nbytes * 10 // size)
            return f"{tenths // 10}.{tenths % 10} {unit}"
    return f"{nbytes} B"
