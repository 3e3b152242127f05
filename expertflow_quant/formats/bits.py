"""Codes of 2, 3, 4 or 8 bits as a contiguous bit stream per row, least significant bit first, no slack.

Code ``i`` of a row lies in bits ``[i * bits, (i + 1) * bits)`` of the row, bit ``n`` being bit ``n % 8`` of
byte ``n // 8``. Eight codes always fill ``bits`` whole bytes: the unit of the 3-bit paths below.
"""

import torch
from torch import Tensor

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.formats.spec import CODE_MULTIPLE, INT_BITS


def packed_bytes(in_features: int, bits: int) -> int:
    """Bytes of one row of ``in_features`` codes."""
    _check_row(in_features, bits)
    return in_features * bits // 8


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes ``[O, I]``, each below ``2 ** bits``, to uint8 ``[O, I * bits / 8]`` on the same device.

    Raises ExpertFlowError for another dtype or rank, I not a multiple of 8, or a code that needs more bits.
    """
    _check_bytes(codes, "codes")
    _check_row(codes.shape[1], bits)
    if bits < 8 and codes.numel() and int(codes.max()) >> bits:
        raise ExpertFlowError(f"code {int(codes.max())} does not fit {bits} bits: the largest is {(1 << bits) - 1}")
    if bits == 8:
        return codes.contiguous().clone()
    if bits == 3:
        return _pack_three(codes)
    lanes = codes.reshape(codes.shape[0], -1, 8 // bits)
    packed = lanes[..., 0].clone()
    for lane in range(1, 8 // bits):
        packed |= lanes[..., lane] << (lane * bits)
    return packed


def unpack_codes(packed: Tensor, bits: int, in_features: int) -> Tensor:
    """uint8 ``[O, I * bits / 8]`` to uint8 codes ``[O, I]`` on the same device (8 bits: the same memory).

    Raises ExpertFlowError when the rows do not hold exactly ``in_features`` codes.
    """
    _check_bytes(packed, "packed codes")
    if packed.shape[1] != packed_bytes(in_features, bits):
        raise ExpertFlowError(
            f"{packed.shape[1]} bytes per row do not hold {in_features} codes of {bits} bits: "
            f"that takes {packed_bytes(in_features, bits)}"
        )
    if bits == 8:
        return packed
    if bits == 3:
        return _unpack_three(packed, in_features)
    codes = torch.empty(packed.shape[0], packed.shape[1], 8 // bits, dtype=torch.uint8, device=packed.device)
    mask = (1 << bits) - 1
    for lane in range(8 // bits):
        torch.bitwise_and(packed >> (lane * bits), mask, out=codes[..., lane])
    return codes.view(packed.shape[0], in_features)


def _pack_three(codes: Tensor) -> Tensor:
    c = codes.reshape(codes.shape[0], -1, 8).unbind(-1)
    first = c[0] | c[1] << 3 | c[2] << 6  # uint8 shifts drop what leaves the byte
    second = c[2] >> 2 | c[3] << 1 | c[4] << 4 | c[5] << 7
    third = c[5] >> 1 | c[6] << 2 | c[7] << 5
    return torch.stack((first, second, third), dim=-1).view(codes.shape[0], -1)


def _unpack_three(packed: Tensor, in_features: int) -> Tensor:
    first, second, third = packed.view(packed.shape[0], -1, 3).unbind(-1)
    lanes = (
        first & 7,
        first >> 3 & 7,
        first >> 6 | (second & 1) << 2,
        second >> 1 & 7,
        second >> 4 & 7,
        second >> 7 | (third & 3) << 1,
        third >> 2 & 7,
        third >> 5,
    )
    return torch.stack(lanes, dim=-1).view(packed.shape[0], in_features)


def _check_bytes(tensor: Tensor, what: str) -> None:
    if tensor.dtype != torch.uint8 or tensor.ndim != 2:
        raise ExpertFlowError(f"{what} must be a uint8 matrix, got {tensor.dtype} of shape {tuple(tensor.shape)}")


def _check_row(in_features: int, bits: int) -> None:
    if bits not in INT_BITS:
        raise ExpertFlowError(f"{bits!r} bits are not known: use one of {', '.join(map(str, INT_BITS))}")
    if in_features <= 0 or in_features % CODE_MULTIPLE:
        raise ExpertFlowError(f"a row of {in_features} codes must be a positive multiple of {CODE_MULTIPLE}: pad it")
