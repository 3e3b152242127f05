"""The todo list of ``resolve`` carried out: records from host memory into slots. Moves bytes, and decides nothing."""

from expertflow_quant.kernels import record_at, use_triton
from expertflow_quant.offload.resident_tables import LayerTables


def fill(layer: LayerTables) -> None:
    """Copy every record on the todo list of ``layer`` into its slot.

    On a GPU one launch of few programs, which read pinned host memory through the link and leave the other
    processors to the products.
    """
    if use_triton(layer.todo_src):
        from expertflow_quant.offload.fill_kernel import launch_fill

        launch_fill(layer)
    else:
        fill_reference(layer)


def fill_reference(layer: LayerTables) -> None:
    """``fill`` on a CPU, by plain copies."""
    count = int(layer.todo_count)
    entries = zip(
        layer.todo_src[:count].tolist(),
        layer.todo_dst[:count].tolist(),
        layer.todo_nbytes[:count].tolist(),
        strict=True,
    )
    for source, target, nbytes in entries:
        record_at(target, nbytes).copy_(record_at(source, nbytes))
