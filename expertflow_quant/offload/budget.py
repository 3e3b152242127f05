"""Expert memory as a person writes it ("2MiB", "1.5 GiB", "25%", 65536), turned into bytes and back."""

import math
import re

from expertflow_quant.formats.errors import ExpertFlowError

UNITS = {
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", 1)},
    **{f"{prefix}IB": 1024**power for power, prefix in enumerate("KMGT", 1)},
}
KNOWN = "bytes (65536), an amount with a unit (2MiB, 1.5 GiB, 500 MB) or a share of all experts (25%)"

_AMOUNT = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(%|[A-Za-z]+)?")


class BudgetError(ExpertFlowError):
    """An expert memory that cannot be read, or that cannot hold one token's working set."""


def parse_budget(value: int | str, total_bytes: int) -> int:
    """Bytes that ``value`` grants to experts whose records take ``total_bytes`` altogether.

    A share is rounded down to whole bytes. An amount above the total is allowed and means: everything
    resident. Raises BudgetError for anything that is not an amount above zero, or a share above 100 %.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return _positive(value, value)
    match = _AMOUNT.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise BudgetError(f"expert memory {value!r} cannot be read: give {KNOWN}")
    number, unit = float(match[1]), match[2] or "B"
    if unit == "%":
        if number > 100:
            raise BudgetError(f"expert memory {value!r} is more than all experts: give at most 100%")
        return _positive(math.floor(total_bytes * number / 100), value)
    if unit.upper() not in UNITS:
        raise BudgetError(f"expert memory {value!r} has the unknown unit {unit!r}: give {KNOWN}")
    return _positive(math.floor(number * UNITS[unit.upper()]), value)


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


def _positive(nbytes: int, value: int | str) -> int:
    if nbytes <= 0:
        raise BudgetError(f"expert memory {value!r} is {nbytes} bytes: give {KNOWN}, above zero")
    return nbytes
