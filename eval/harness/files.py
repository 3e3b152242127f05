"""Generated charts and documents as parquet files in the schemas of the public data sets, metadata included."""

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from expertflow_quant.samples import Item, make_items

TEXT, WHOLE = {"dtype": "string", "_type": "Value"}, {"dtype": "int64", "_type": "Value"}
TEXTS, PICTURE = {"feature": TEXT, "_type": "List"}, {"_type": "Image"}
CHARTQA_FEATURES = {"type": TEXT, "question": TEXT, "answer": TEXT, "image": PICTURE}
DOCVQA_FEATURES = {
    "questionId": TEXT,
    "question": TEXT,
    "question_types": TEXTS,
    "image": PICTURE,
    "docId": WHOLE,
    "ucsf_document_id": TEXT,
    "ucsf_document_page_no": TEXT,
    "answers": TEXTS,
    "data_split": TEXT,
}


def write_generated(folder: Path, items: int, altered: bool = False) -> dict[str, Path]:
    """``items`` held-out charts as lmms-lab/ChartQA has them and as many documents as lmms-lab/DocVQA; by data set,
    its folder. ``altered``: see ``alter``."""
    charts, documents = (make_items(task, "test", items) for task in ("chart", "document"))
    if altered:
        charts, documents = ([alter(item, i) for i, item in enumerate(made)] for made in (charts, documents))
    paths = {"chartqa": folder / "ChartQA", "docvqa": folder / "DocVQA"}
    write_table(paths["chartqa"] / "data" / "test-00000-of-00001.parquet", chartqa_rows(charts), CHARTQA_FEATURES)
    write_table(
        paths["docvqa"] / "DocVQA" / "validation-00000-of-00001.parquet", docvqa_rows(documents), DOCVQA_FEATURES
    )
    return paths


def alter(item: Item, number: int) -> Item:
    """``item`` with other answers than the picture's, but for every fourth: a model that is right gets scores of every
    size. Numbers become 5 % larger (which counts as right), a percentage, or 6 % larger; words are put in capitals,
    lose their last letter, or are said twice."""

    def changed(answer: str) -> str:
        try:
            value = float(answer)
        except ValueError:
            return (answer, answer.upper(), f"{answer[:-1]}#", f"{answer} {answer} too")[number % 4]
        return (answer, repr(1.05 * value), f"{answer}%", repr(1.06 * value))[number % 4]

    return replace(item, answers=tuple(map(changed, item.answers)))


def chartqa_rows(items: Sequence[Item]) -> list[dict[str, Any]]:
    """Rows of ChartQA's test file: the first half counts as written by people."""
    kinds = ["human_test" if 2 * i < len(items) else "augmented_test" for i in range(len(items))]
    return [
        {"type": kind, "question": item.question, "answer": item.answers[0], "image": _picture(item.image, item.id)}
        for kind, item in zip(kinds, items, strict=True)
    ]


def docvqa_rows(items: Sequence[Item]) -> list[dict[str, Any]]:
    """Rows of DocVQA's validation file; questions about one page share its number."""
    pages = {key: number for number, key in enumerate(dict.fromkeys(item.image_key for item in items))}
    return [
        {
            "questionId": str(number),
            "question": item.question,
            "question_types": [item.kind],
            "image": _picture(item.image, item.id),
            "docId": pages[item.image_key],
            "ucsf_document_id": f"page{pages[item.image_key]}",
            "ucsf_document_page_no": "1",
            "answers": list(item.answers),
            "data_split": "val",
        }
        for number, item in enumerate(items)
    ]


def write_table(path: Path, rows: Sequence[dict[str, Any]], features: dict[str, Any]) -> None:
    """One parquet file that says, as the public ones do, which column holds images."""
    import pyarrow
    from pyarrow import parquet

    described = json.dumps({"info": {"features": features}})
    table = pyarrow.table({name: [row[name] for row in rows] for name in features})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table.replace_schema_metadata({"huggingface": described}), path)


def _picture(image: Image.Image, name: str) -> dict[str, Any]:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": f"{name}.png"}
