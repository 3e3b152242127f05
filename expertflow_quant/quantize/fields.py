"""From quantized (or bf16) matrices to the fields of a record: the one place that joins the two by name."""

from torch import Tensor

from expertflow_quant.formats import SCALE_DTYPE, WEIGHT_DTYPE, ExpertFlowError, RecordLayout, pack_codes
from expertflow_quant.quantize.grid import require_finite
from expertflow_quant.quantize.matrix import QuantizedMatrix

Matrix = QuantizedMatrix | Tensor


def expert_fields(
    layout: RecordLayout,
    gate_up: Matrix,
    down: Matrix,
    *,
    input_scale: Tensor | None = None,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> dict[str, Tensor]:
    """What ``layout.pack`` takes, for gate_up ``[2I or I, H]`` and down ``[H, I]``.

    Integer layouts take QuantizedMatrix of exactly the layout's format, bf16 layouts take floating tensors
    (rounded to bf16 here, as biases are). Raises ExpertFlowError when a part belongs to another format, or is
    given though the layout has no room for it, or is missing, or does not fit its dtype.
    """
    fields = {
        **_matrix_fields(layout, "gate_up", gate_up),
        **_matrix_fields(layout, "down", down),
    }
    extras = {
        "gate_up.input_scale": (input_scale, SCALE_DTYPE, layout.input_scale),
        "gate_up.bias": (gate_up_bias, WEIGHT_DTYPE, layout.shape.has_bias),
        "down.bias": (down_bias, WEIGHT_DTYPE, layout.shape.has_bias),
    }
    for name, (tensor, dtype, expected) in extras.items():
        if (tensor is not None) != expected:
            raise ExpertFlowError(
                f"{name} is {'missing' if expected else 'given'}, "
                f"but this record {'has' if expected else 'lacks'} it: make layout and parts from one expert"
            )
        if tensor is not None:
            fields[name] = tensor.to(dtype)
            require_finite(**{name: fields[name]})
    return {name: tensor.cpu() for name, tensor in fields.items()}


def _matrix_fields(layout: RecordLayout, name: str, matrix: Matrix) -> dict[str, Tensor]:
    if isinstance(matrix, Tensor):
        if layout.format.has_codes:
            raise ExpertFlowError(f"{name} is a tensor, but this record is {layout.format.name}: quantize it first")
        weight = matrix.to(WEIGHT_DTYPE)
        require_finite(**{name: weight})
        return {f"{name}.weight": weight}
    if matrix.format != layout.format:
        raise ExpertFlowError(
            f"{name} is {matrix.format.name}, but this record is {layout.format.name}: "
            "both matrices of an expert share the format of its layout"
        )
    fields = {f"{name}.codes": pack_codes(matrix.codes, matrix.format.bits), f"{name}.scales": matrix.scales}
    return fields if matrix.zeros is None else fields | {f"{name}.zeros": matrix.zeros}
