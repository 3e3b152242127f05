"""How an expert's weights are coded and where its bytes lie. The ground floor: values and tables only."""

from expertflow_quant.formats.bits import pack_codes, packed_bytes, unpack_codes
from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.formats.nf4 import NF4_VALUES
from expertflow_quant.formats.record import (
    FIELD_ALIGNMENT,
    RECORD_ALIGNMENT,
    SCALE_DTYPE,
    WEIGHT_DTYPE,
    ExpertShape,
    Field,
    RecordLayout,
)
from expertflow_quant.formats.spec import BF16, INT_BITS, Format

__all__ = [
    "BF16",
    "FIELD_ALIGNMENT",
    "INT_BITS",
    "NF4_VALUES",
    "RECORD_ALIGNMENT",
    "SCALE_DTYPE",
    "WEIGHT_DTYPE",
    "ExpertFlowError",
    "ExpertShape",
    "Field",
    "Format",
    "RecordLayout",
    "pack_codes",
    "packed_bytes",
    "unpack_codes",
]
