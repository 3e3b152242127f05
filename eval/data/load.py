"""Tasks from files: ``file_task("chartqa", PATH)``; and tasks by name, generated ones among them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from eval.data.errors import DataError
from eval.data.item import DataItem, RowReader
from eval.data.layouts import Source, open_source
from eval.data.sets import DATA_SETS, DataSet
from eval.tasks import GENERATED, Task, generated_task

TASK_NAMES = (*GENERATED, *DATA_SETS)


def make_tasks(
    names: Sequence[str],
    paths: Mapping[str, Path | str],
    *,
    limit: int | None = None,
    generated: int = 320,
    seed: int = 0,
    max_pixels: int | None = None,
    grain: float = 0.0,
) -> list[Task]:
    """Tasks in the order of ``names`` (``TASK_NAMES``); ``paths`` tells where the files of each data set are.

    ``limit``: ask only the first so many items of each; a generated task has ``limit`` or else ``generated`` of them,
    with ``grain`` on their pictures.
    """
    tasks = []
    for name in dict.fromkeys(names):
        if name in GENERATED:
            tasks.append(generated_task(name, limit or generated, seed, grain))
        elif name in DATA_SETS:
            if name not in paths:
                raise DataError(f"task {name} needs its files: {DATA_SETS[name].remedy}")
            tasks.append(file_task(name, paths[name], limit, max_pixels))
        else:
            raise DataError(f"task {name!r} is not known: use one of {', '.join(TASK_NAMES)}")
    if not tasks:
        raise DataError(f"no task is named: use one of {', '.join(TASK_NAMES)}")
    return tasks


def file_task(name: str, path: Path | str, limit: int | None = None, max_pixels: int | None = None) -> Task:
    """The task that files hold, in their order, as many as ``limit``; images shrunk to ``max_pixels`` if that is set.

    Raises DataError where there is nothing, nothing that is understood, or no row that can be asked.
    """
    data_set = DATA_SETS[name]
    source = open_source(data_set, path)
    items = read_items(data_set, source, limit, max_pixels)
    if not items:
        raise DataError(f"{data_set.title}: {path} holds no rows: {data_set.remedy}")
    if all(item.damage is not None for item in items):
        raise DataError(
            f"{data_set.title}: none of {len(items)} rows of {path} can be asked; the first one: {items[0].damage} "
            f"(the answers of DocVQA's test split are not public): {data_set.remedy}"
        )
    told = f", split {source.split}" if source.split else ""
    shrunk = f", at most {max_pixels} pixels an image" if max_pixels else ""
    share = f", {len(items)} of {data_set.rows} questions" if data_set.rows not in (None, len(items)) else ""
    return Task(name, data_set.title, data_set.metric, items, f"{source.layout} layout{told}{share}{shrunk}")


def read_items(
    data_set: DataSet, source: Source, limit: int | None = None, max_pixels: int | None = None
) -> list[DataItem]:
    """The first ``limit`` items; each image is read once, for its key, and not kept."""
    readers = [
        (RowReader(data_set.name, data_set.style, p.columns, p.folder, source.split, p.labels, max_pixels), p.rows)
        for p in source.parts
    ]
    rows = ((reader, row) for reader, part in readers for row in part)
    items = [reader.item(row, i) for i, (reader, row) in enumerate(islice(rows, limit))]
    count = Counter(item.id for item in items)
    if max(count.values(), default=1) > 1:  # numbers that are no identity: count the rows instead
        items = [replace(item, id=f"{data_set.name}-{i}") for i, item in enumerate(items)]
    return items
