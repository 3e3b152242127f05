"""The public data sets in small: generated pictures and questions, written in the exact public schemas and layouts."""

import base64
import csv
import io
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from expertflow_quant.samples import make_items


@dataclass(frozen=True)
class Question:
    """A question as all copies of a data set have it; ``image`` holds a PNG's bytes."""

    number: int
    split: str
    text: str | None
    answers: list[str] | None
    image: bytes | None = field(repr=False)
    image_name: str
    types: tuple[str, ...] = ()


def chart_questions(count: int = 8) -> list[Question]:
    """Two questions an image, the first half human; texts and golds of the kinds that trip readers up."""
    made = _questions("chart", count)
    odd = ["[Yes, No]", "14.0", "0.57", "Democrat (scores 60 to 100)"]
    made = [replace(q, answers=[odd[i]]) if i < len(odd) else q for i, q in enumerate(made)]
    made[1] = replace(made[1], text='He said "50%",\tthen\nwhat? ')
    return [replace(q, split="human" if i < count // 2 else "augmented") for i, q in enumerate(made)]


def document_questions(count: int = 6) -> list[Question]:
    """Numbers that are not positions, several answers, several types."""
    made = _questions("document", count)
    types = (("form",), ("handwritten", "form"), ("table/list", "layout"))
    return [
        replace(q, number=49153 + 7 * i, split="val", answers=[*q.answers, f"'{i}' or so"], types=types[i % 3])
        for i, q in enumerate(made)
    ]


def _questions(task: str, count: int) -> list[Question]:
    questions = []
    for i, item in enumerate(make_items(task, "test", count, seed=3)):
        name = f"{item.image_key[:12]}.png"
        questions.append(Question(i, "", item.question, list(item.answers), png(item.image), name))
    return questions


def png(image: Any) -> bytes:
    """A PIL image as the bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _struct(question: Question) -> dict[str, Any]:
    return {"bytes": question.image, "path": None}


def lmms_lab_chartqa(questions: list[Question]) -> Any:
    """lmms-lab/ChartQA: type, question, answer, image."""
    rows = [
        {
            "type": f"{q.split}_test",
            "question": q.text,
            "answer": q.answers[0] if q.answers else None,
            "image": _struct(q),
        }
        for q in questions
    ]
    text = _value("string")
    return _table(rows, {"type": text, "question": text, "answer": text, "image": IMAGE})


def m4_chartqa(questions: list[Question]) -> Any:
    """HuggingFaceM4/ChartQA: image, query, label list, human_or_machine as a class number."""
    rows = [
        {"image": _struct(q), "query": q.text, "label": q.answers, "human_or_machine": int(q.split == "augmented")}
        for q in questions
    ]
    label = {"names": ["human", "machine"], "_type": "ClassLabel"}
    text = _value("string")
    features = {"image": IMAGE, "query": text, "label": _list("string"), "human_or_machine": label}
    return _table(rows, features)


def masry_chartqa(questions: list[Question]) -> Any:
    """ahmed-masry/ChartQA: imgname, query, label, type, image as plain bytes."""
    rows = [
        {"imgname": q.image_name, "query": q.text, "label": q.answers[0], "type": q.split, "image": q.image}
        for q in questions
    ]
    text = _value("string")
    return _table(rows, {"imgname": text, "query": text, "label": text, "type": text, "image": _value("binary")})


def chartqa_x(questions: list[Question]) -> Any:
    """A question with its answer and explanation."""
    rows = [
        {"image": _struct(q), "question": q.text, "answer": q.answers[0], "explanation": f"Look at {q.number}."}
        for q in questions
    ]
    text = _value("string")
    return _table(rows, {"image": IMAGE, "question": text, "answer": text, "explanation": text})


def lmms_lab_docvqa(questions: list[Question]) -> Any:
    """lmms-lab/DocVQA, configuration DocVQA."""
    rows = [
        {
            "questionId": str(q.number),
            "question": q.text,
            "question_types": list(q.types),
            "image": _struct(q),
            "docId": 1000 + q.number,
            "ucsf_document_id": "xnbl0037",
            "ucsf_document_page_no": "1",
            "answers": q.answers,
            "data_split": "val",
        }
        for q in questions
    ]
    text, texts = _value("string"), _list("string")
    return _table(rows, {
        "questionId": text, "question": text, "question_types": texts, "image": IMAGE, "docId": _value("int64"),
        "ucsf_document_id": text, "ucsf_document_page_no": text, "answers": texts, "data_split": text,
    })  # fmt: skip


def lmms_lab_infovqa(questions: list[Question]) -> Any:
    """lmms-lab/DocVQA, configuration InfographicVQA."""
    rows = [
        {
            "questionId": str(q.number),
            "question": q.text,
            "answers": q.answers,
            "answer_type": list(q.types),
            "image": _struct(q),
            "image_url": "an address",
            "operation/reasoning": ["counting"],
            "ocr": "{}" * 1000,
            "data_split": "val",
        }
        for q in questions
    ]
    text, texts = _value("string"), _list("string")
    return _table(rows, {
        "questionId": text, "question": text, "answers": texts, "answer_type": texts, "image": IMAGE,
        "image_url": text, "operation/reasoning": texts, "ocr": text, "data_split": text,
    })  # fmt: skip


IMAGE = {"_type": "Image"}


def _value(dtype: str) -> dict[str, str]:
    return {"dtype": dtype, "_type": "Value"}


def _list(dtype: str) -> dict[str, Any]:
    return {"feature": _value(dtype), "_type": "List"}


def _table(rows: list[dict[str, Any]], features: dict[str, Any]) -> Any:
    import pyarrow as pa

    def arrow_type(feature: dict[str, Any]) -> Any:
        if feature["_type"] == "Image":
            return pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        if feature["_type"] == "List":
            return pa.list_(arrow_type(feature["feature"]))
        if feature["_type"] == "ClassLabel":
            return pa.int64()
        return {"string": pa.string(), "binary": pa.binary(), "int64": pa.int64()}[feature["dtype"]]

    schema = pa.schema(
        [(name, arrow_type(feature)) for name, feature in features.items()],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    return pa.Table.from_pylist(rows, schema=schema)


def write_parquet(table: Any, path: Path, group: int = 3) -> Path:
    """One file with row groups of ``group`` rows."""
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path, row_group_size=group)
    return path


def write_readme(folder: Path, configs: dict[str, dict[str, str]]) -> Path:
    """A data card whose header names the files of each configuration and split."""
    lines = ["---", "license: gpl-3.0", "configs:"]
    for config, splits in configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for split, pattern in splits.items():
            lines += [f"  - split: {split}", f"    path: {pattern}"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text("\n".join([*lines, "---", "# A card", ""]))
    return folder


def write_saved(table: Any, folder: Path, split: str | None = "test", shards: int = 2) -> Path:
    """What ``datasets`` leaves with ``save_to_disk``: arrow streams with a state file."""
    import pyarrow as pa

    folder.mkdir(parents=True, exist_ok=True)
    size, names = -(-table.num_rows // shards), []
    for i in range(shards):
        names.append(f"data-{i:05d}-of-{shards:05d}.arrow")
        with pa.OSFile(str(folder / names[-1]), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table.slice(i * size, size), max_chunksize=2)
    state = {"_data_files": [{"filename": name} for name in names], "_split": split, "_fingerprint": "0"}
    state |= {"_format_columns": None, "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False}
    (folder / "state.json").write_text(json.dumps(state))
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    return folder


def write_saved_splits(tables: dict[str, Any], folder: Path) -> Path:
    """The same of several splits."""
    for split, table in tables.items():
        write_saved(table, folder / split, split)
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(tables)}))
    return folder


def write_images(questions: list[Question], folder: Path) -> None:
    """Each image once, under its name."""
    folder.mkdir(parents=True, exist_ok=True)
    for q in questions:
        if q.image is not None:
            (folder / q.image_name).write_bytes(q.image)


def write_chartqa_json(questions: list[Question], folder: Path) -> Path:
    """The authors' folder: test/test_human.json, test/test_augmented.json, test/png/."""
    for split in ("human", "augmented"):
        rows = [
            {"imgname": q.image_name, "query": q.text, "label": q.answers[0] if q.answers else None}
            for q in questions
            if q.split == split
        ]
        (folder / "test").mkdir(parents=True, exist_ok=True)
        (folder / "test" / f"test_{split}.json").write_text(json.dumps(rows), encoding="utf-8")
    write_images(questions, folder / "test" / "png")
    # another part of the data set, with an image of the same name
    write_images([replace(q, image=b"another image") for q in questions[:1]], folder / "train" / "png")
    (folder / "train" / "train_human.json").write_text("[]")
    return folder


def write_rrc_json(questions: list[Question], folder: Path, info: bool = False) -> Path:
    """The RRC's folder: one JSON file beside a folder of images."""
    rows = []
    for q in questions:
        if info:
            named = {"image_local_name": q.image_name, "image_url": "an address", "answer_type": list(q.types)}
        else:
            named = {"image": f"documents/{q.image_name}", "docId": 7, "question_types": list(q.types)}
        rows.append({"questionId": q.number, "question": q.text, "answers": q.answers, "data_split": "val"} | named)
    name, images = ("infographicsVQA_val_v1.0_withQT.json", "infographicsvqa_images")
    if not info:
        name, images = ("val_v1.0_withQT.json", "spdocvqa_images")
    write_images(questions, folder / images)
    whole = {"dataset_name": "SP-DocVQA", "dataset_version": "1.0", "dataset_split": "val", "data": rows}
    (folder / name).write_text(json.dumps(whole), encoding="utf-8")
    return folder


def write_tsv(questions: list[Question], path: Path, listed: bool = False, ids: bool = False) -> Path:
    """VLMEvalKit's table; an image that an earlier row has is that row's index. ``listed``: answers as lists."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = ["index", "image", "question", "answer", "split", *(["questionId", "question_types"] if ids else [])]
    seen: dict[bytes, int] = {}
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, delimiter="\t", lineterminator="\n")
        table.writerow(names)
        for i, q in enumerate(questions):
            image = base64.b64encode(q.image or b"").decode()
            image = str(seen[q.image]) if q.image in seen else image
            seen.setdefault(q.image or b"", i)
            answer = str(q.answers) if listed else (q.answers or [""])[0]
            split = f"test_{q.split}" if q.split in ("human", "augmented") else q.split
            table.writerow([i, image, q.text, answer, split, *([q.number, str(list(q.types))] if ids else [])])
    return path
