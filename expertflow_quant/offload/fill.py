"""The todo list of ``resolve`` carried out: records from host memory into slots. Moves bytes, and decides nothing."""

from typing import Protocol

from torch import Tensor

from expertflow_quant.kernels import record_at, use_triton


class Todo(Protocol):
    """Records to be copied: the first todo_count int32 ``[1]`` entries of todo_src, todo_dst int64 (addresses) and
    todo_nbytes int32."""

    @property
    def todo_src(self) -> Tensor: ...
    @property
    def todo_dst(self) -> Tensor: ...
    @property
    def todo_nbytes(self) -> Tensor: ...
    @property
    def todo_count(self) -> Tensor: ...


def fill(todo: Todo, ahead: int = 0) -> None:
    """Copy every record on the list to where it goes. ``ahead``: 0 where the records are waited for;
    before they are, how many such fills run at once: together they leave the larger part of the link to those waited
    for.

    On a GPU one launch of few programs, which read pinned host memory through the link and leave the other
    processors to the products.
    """
    if use_triton(todo.todo_src):
        from expertflow_quant.offload.fill_kernel import launch_fill

        launch_fill(todo.todo_src, todo.todo_dst, todo.todo_nbytes, todo.todo_count, ahead)
    else:
        fill_reference(todo)


def fill_reference(todo: Todo) -> None:
    """``fill`` on a CPU, by plain copies."""
    count = int(todo.todo_count)
    entries = zip(
        todo.todo_src[:count].tolist(),
        todo.todo_dst[:count].tolist(),
        todo.todo_nbytes[:count].tolist(),
        strict=True,
    )
    for source, target, nbytes in entries:
        record_at(target, nbytes).copy_(record_at(source, nbytes))
