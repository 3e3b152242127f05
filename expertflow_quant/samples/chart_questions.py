"""Everything that can be asked about a chart."""

import random
from dataclasses import dataclass

from expertflow_quant.samples.item import Question

MARK = {"bar": "bar", "line": "point", "pie": "slice"}


@dataclass(frozen=True)
class Table:
    """What a chart shows: values[row][column] as printed; one column only in simple charts."""

    noun: str
    names: list[str]
    series: list[str]
    values: list[list[str]]
    colors: list[str]

    def number(self, row: int, column: int = 0) -> float:
        """A printed value as a number."""
        return float(self.values[row][column])


def as_printed(value: float) -> str:
    """A number without a needless decimal point."""
    rounded = round(value, 1)
    return str(int(rounded)) if rounded == int(rounded) else f"{rounded:.1f}"


def ask_simple(rng: random.Random, table: Table, family: str) -> list[Question]:
    """Questions on a chart with one value for each name."""
    rows = range(len(table.names))
    names = table.names
    asked = [Question("value", f"What is the value of {names[i]}?", (table.values[i][0],)) for i in rows]
    ordered = sorted(rows, key=table.number)
    for word, i in (("highest", ordered[-1]), ("lowest", ordered[0])):
        asked.append(Question("name", f"Which {table.noun} has the {word} value?", (names[i],)))
        asked.append(Question("extreme", f"What is the {word} value?", (table.values[i][0],)))
    asked.append(Question("count", f"How many {MARK[family]}s are shown in the chart?", (str(len(names)),)))
    if table.colors:
        for i in rng.sample(rows, 2):
            asked.append(Question("color", f"What color is the {names[i]} {MARK[family]}?", (table.colors[i],)))
            asked.append(Question("name", f"Which {table.noun} is shown in {table.colors[i]}?", (names[i],)))
    for _ in range(2):
        i, j = rng.sample(rows, 2)
        verdict = "Yes" if table.number(i) > table.number(j) else "No"
        asked.append(Question("compare", f"Is the value of {names[i]} more than {names[j]}?", (verdict,)))
        i, j = rng.sample(rows, 2)
        total = as_printed(table.number(i) + table.number(j))
        asked.append(Question("sum", f"What is the sum of {names[i]} and {names[j]}?", (total,)))
        i, j = rng.sample(rows, 2)
        gap = as_printed(abs(table.number(i) - table.number(j)))
        asked.append(Question("difference", f"What is the difference between {names[i]} and {names[j]}?", (gap,)))
    return asked


def ask_series(rng: random.Random, table: Table) -> list[Question]:
    """Questions on a chart with two series."""
    rows = range(len(table.names))
    names, series = table.names, table.series
    asked = [
        Question("value", f"What is the value of {series[j]} in {names[i]}?", (table.values[i][j],))
        for i in rows
        for j in range(2)
    ]
    for j in range(2):
        column = [table.number(i, j) for i in rows]
        if len(set(column)) < len(column):
            continue
        asked.append(
            Question(
                "name",
                f"Which {table.noun} has the highest value of {series[j]}?",
                (names[column.index(max(column))],),
            )
        )
        asked.append(
            Question(
                "name",
                f"Which {table.noun} has the lowest value of {series[j]}?",
                (names[column.index(min(column))],),
            )
        )
    i = rng.choice(rows)
    total = as_printed(table.number(i, 0) + table.number(i, 1))
    asked.append(Question("sum", f"What is the sum of {series[0]} and {series[1]} in {names[i]}?", (total,)))
    i = rng.choice(rows)
    a, b = rng.sample(range(2), 2)
    if table.values[i][0] != table.values[i][1]:
        verdict = "Yes" if table.number(i, a) > table.number(i, b) else "No"
        asked.append(Question("compare", f"Is {series[a]} more than {series[b]} in {names[i]}?", (verdict,)))
    asked.append(Question("count", f"How many {plural(table.noun)} are shown in the chart?", (str(len(names)),)))
    return asked


def plural(noun: str) -> str:
    """The plural of a category noun."""
    return noun[:-1] + "ies" if noun[-1] == "y" and noun[-2] not in "aeiou" else noun + "s"
