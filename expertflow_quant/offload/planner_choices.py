"""What the planner can choose from, as arrays: (expert, format, slots of its layer) and what each choice costs."""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

_CANDIDATES = 17
_LEAST = 1e-12


@dataclass(frozen=True)
class Choices:
    """L layers, E experts, F formats, S candidate ``slots`` of a layer. ``damage`` [L, E, F]; ``nbytes`` [L, F];
    ``resident`` [L, E, S] share of steps, ``misses`` [L, E, S] in a step; all float64. ``damage_per_byte``: what a
    missed byte is worth."""

    slots: tuple[int, ...]
    damage: Tensor
    nbytes: Tensor
    resident: Tensor
    misses: Tensor
    damage_per_byte: float

    @cached_property
    def value(self) -> Tensor:
        """[L, E, F, S]: damage and the worth of missed bytes."""
        missed = self.misses[:, :, None, :] * self.nbytes[:, None, :, None]
        return self.damage[..., None] + self.damage_per_byte * missed

    @cached_property
    def device_use(self) -> Tensor:
        """[L, E, F, S]: bytes of slots that the expert occupies on average."""
        return self.resident[:, :, None, :] * self.nbytes[:, None, :, None]

    @property
    def damage_use(self) -> Tensor:
        """[L, E, F, S]."""
        return self.damage[..., None].expand(self.value.shape)

    @property
    def record_use(self) -> Tensor:
        """[L, E, F, S]: bytes of the record."""
        return self.nbytes[:, None, :, None].expand(self.value.shape)


@dataclass(frozen=True)
class Allowance:
    """Limits: bytes of slots, summed damage, bytes of all records; None: no limit."""

    device_bytes: int
    most_damage: float | None
    record_bytes: int | None

    def shares(self, choices: Choices) -> list[Tensor]:
        """[L, E, F, S] of each limit that there is: the share of it that a choice uses."""
        shares = [choices.device_use / self.device_bytes]
        if self.most_damage is not None:
            shares.append(_share(choices.damage_use, self.most_damage))
        if self.record_bytes is not None:
            shares.append(_share(choices.record_use, self.record_bytes))
        return shares


@dataclass(frozen=True)
class Kept:
    """``mask`` bool [L, E, F, S]: choices that are weighed; ``slots`` bool [L, S]: candidates that are; a plan with any
    other choice costs at least ``bound + reach``, and every plan at least ``bound``."""

    mask: Tensor
    slots: Tensor
    bound: float
    reach: float


def candidate_slots(experts: int) -> tuple[int, ...]:
    """Slots that a layer of ``experts`` may have: every number up to 16 experts, else 17 numbers from none to all."""
    if experts < _CANDIDATES:
        return tuple(range(experts + 1))
    return tuple(sorted({round(experts * i / (_CANDIDATES - 1)) for i in range(_CANDIDATES)}))


def _share(use: Tensor, limit: float) -> Tensor:
    return use / max(limit, _LEAST)
