"""How one expert's weights are coded: kind, bits, group size, symmetric or not, and the name that says so."""

import re
from dataclasses import dataclass

from expertflow_quant.formats.errors import ExpertFlowError

INT_BITS = (2, 3, 4, 8)
CODE_MULTIPLE = 8  # eight codes of any width fill whole bytes, so a row of codes never ends inside a byte
KNOWN_NAMES = (
    "bf16, or int2|int3|int4|int8 with -g<group size> or -channel, then -asym if wanted (e.g. int4-g32), "
    "or nf4 with -g<group size> or -channel (e.g. nf4-g64)"
)

_NAME = re.compile(r"(?:int([1-9][0-9]*)|nf4)-(?:g([1-9][0-9]*)|(channel))(-asym)?")


@dataclass(frozen=True)
class Format:
    """A coding of one weight matrix ``[out, in]``; ``W = (code - zero) * scale`` for the integer kinds,
    ``NF4_VALUES[code] * scale`` for nf4.

    ``group_size`` counts the input columns that share a scale, 0 means the whole row (channel). Symmetric
    formats store no zeros: theirs is ``2 ** (bits - 1)``. nf4 has 4 bits and is symmetric, bf16 has 16 bits and no
    groups.
    Raises ExpertFlowError for a combination that does not exist.
    """

    kind: str
    bits: int
    group_size: int = 0
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.kind == "bf16":
            if (self.bits, self.group_size, self.symmetric) != (16, 0, True):
                raise ExpertFlowError(
                    f"format {self!r}: bf16 has 16 bits and no groups: use BF16 or Format.parse('bf16')"
                )
            return
        if self.kind not in ("int", "nf"):
            raise ExpertFlowError(f"format kind {self.kind!r} is not known: use 'int', 'nf' or 'bf16'")
        if self.kind == "nf" and (self.bits, self.symmetric) != (4, True):
            raise ExpertFlowError(f"format {self!r}: nf has 4 bits and no zeros: use nf4-g64 or an integer format")
        if type(self.bits) is not int or self.bits not in INT_BITS:
            raise ExpertFlowError(f"{self.bits!r} bits are not known: use one of {', '.join(map(str, INT_BITS))}")
        if isinstance(self.group_size, bool) or not isinstance(self.group_size, int) or self.group_size < 0:
            raise ExpertFlowError(
                f"group size {self.group_size!r} must be a whole number of columns, or 0 for whole rows"
            )

    @property
    def name(self) -> str:
        """The one spelling of this format, which ``parse`` reads back."""
        if self.kind == "bf16":
            return "bf16"
        group = f"g{self.group_size}" if self.group_size else "channel"
        return f"{self.kind}{self.bits}-{group}{'' if self.symmetric else '-asym'}"

    @classmethod
    def parse(cls, text: str) -> "Format":
        """The format that ``text`` names. Raises ExpertFlowError, listing what is known, for other text."""
        if text == "bf16":
            return cls("bf16", 16)
        match = _NAME.fullmatch(text)
        if match is None or (int(match[1]) not in INT_BITS if match[1] else match[4]):
            raise ExpertFlowError(f"format {text!r} is not known: use {KNOWN_NAMES}")
        if match[1] is None:
            return cls("nf", 4, int(match[2] or 0))
        return cls("int", int(match[1]), int(match[2] or 0), symmetric=match[4] is None)

    @property
    def is_int(self) -> bool:
        """Whether levels lie evenly: codes are whole numbers of scales."""
        return self.kind == "int"

    @property
    def has_codes(self) -> bool:
        """Whether weights are stored as codes with scales, not as they are."""
        return self.kind != "bf16"

    @property
    def levels(self) -> int:
        """How many codes there are."""
        return 1 << self.bits

    def groups(self, in_features: int) -> int:
        """Scales per row of ``in_features`` columns; 0 for bf16, which has none."""
        self.validate_for(in_features)
        if not self.has_codes:
            return 0
        return in_features // self.group_size if self.group_size else 1

    def columns_per_group(self, in_features: int) -> int:
        """Columns that share one scale in a row of ``in_features`` columns (the row itself for channel)."""
        self.validate_for(in_features)
        return self.group_size or in_features

    def validate_for(self, in_features: int) -> None:
        """Raises ExpertFlowError unless rows of ``in_features`` columns can be coded this way."""
        if in_features <= 0:
            raise ExpertFlowError(f"a matrix with {in_features} input columns cannot be coded: it needs at least one")
        if not self.has_codes:
            return
        if in_features % CODE_MULTIPLE:
            raise ExpertFlowError(
                f"{self.name} needs columns in multiples of {CODE_MULTIPLE}, got {in_features}: use bf16"
            )
        if self.group_size and in_features % self.group_size:
            raise ExpertFlowError(
                f"{self.name}: group size {self.group_size} does not divide {in_features} input columns: "
                f"use {_dividing_sizes(in_features)} or {self.kind}{self.bits}-channel"
            )

    def __str__(self) -> str:
        return self.name


def _dividing_sizes(in_features: int) -> str:
    sizes = [size for size in (16, 32, 64, 128, 256) if in_features % size == 0] or [CODE_MULTIPLE]
    return " or ".join(f"g{size}" for size in sizes)


BF16 = Format("bf16", 16)
