"""Calibration samples from folders and parquet files; what cannot be read is named."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from expertflow_quant.formats import ExpertFlowError
from expertflow_quant.pipeline.batches import samples_digest
from expertflow_quant.pipeline.samples_io import generated_samples, load_samples


def png(color: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), color).save(buffer, "PNG")
    return buffer.getvalue()


def conversation(text: str, image: str | None = None) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if image is not None:
        parts.insert(0, {"type": "image", "image": image})
    return {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "42"}]}


def texts(samples: list[dict[str, Any]]) -> list[str]:
    return [sample["messages"][0]["content"][-1]["text"] for sample in samples]


def colors(samples: list[dict[str, Any]]) -> list[tuple[int, ...]]:
    return [sample["messages"][0]["content"][0]["image"].getpixel((0, 0)) for sample in samples]


def test_a_folder_of_json_and_jsonl_files(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "pictures").mkdir()
    (tmp_path / "b" / "pictures" / "red.png").write_bytes(png("red"))
    (tmp_path / "a.json").write_text(json.dumps([conversation("one"), conversation("two")]))
    lines = [json.dumps(conversation(f"red {number}", "pictures/red.png")) for number in range(3)]
    (tmp_path / "b" / "c.jsonl").write_text("\n\n".join(lines) + "\n")
    (tmp_path / "readme.txt").write_text("ignored")
    samples = load_samples(tmp_path)
    assert texts(samples) == ["one", "two", "red 0", "red 1", "red 2"]
    assert colors(samples[2:]) == [(255, 0, 0)] * 3
    assert samples[0]["messages"][1] == {"role": "assistant", "content": "42"}
    assert texts(load_samples(tmp_path, limit=3)) == ["one", "two", "red 0"]


@pytest.mark.parametrize("as_struct", [True, False])
@pytest.mark.parametrize("as_text", [True, False])
def test_a_parquet_file(as_struct: bool, as_text: bool, tmp_path: Path) -> None:
    rows = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"n{n}"}]}] for n in range(3)]
    images: list[list[Any]] = [[png(color)] for color in ("red", "lime", "blue")]
    if as_struct:
        images = [[{"bytes": image, "path": None} for image in row] for row in images]
    messages = [json.dumps(row) for row in rows] if as_text else rows
    parquet.write_table(pa.table({"messages": messages, "images": images}), tmp_path / "x.parquet")
    samples = load_samples(tmp_path / "x.parquet")
    assert texts(samples) == ["n0", "n1", "n2"]
    assert colors(samples) == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.json", "{", r"bad\.json"),
        ("bad.jsonl", '{"messages": [}', r"bad\.jsonl"),
        ("bad.json", "[3]", r"bad\.json, sample 0: a sample is"),
        ("bad.json", '[{"messages": []}]', "at least one message"),
        ("bad.json", '{"messages": [{"role": "robot", "content": "x"}]}', "a message has a role"),
        ("bad.json", '{"messages": [{"role": "user"}]}', "a content"),
        ("bad.json", '{"messages": [{"role": "user", "content": [{"type": "video"}]}]}', "a part is"),
        ("bad.json", '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "has no image"),
        ("bad.json", json.dumps(conversation("x", "gone.png")), r"cannot read an image.*gone\.png"),
        ("bad.json", json.dumps(conversation("x", "bad.json")), "cannot read an image"),
    ],
)
def test_what_cannot_be_read_is_named(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ExpertFlowError, match=message):
        load_samples(tmp_path)


def test_bad_parquet_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    path.write_bytes(b"no parquet")
    with pytest.raises(ExpertFlowError, match=r"x\.parquet"):
        load_samples(path)
    parquet.write_table(pa.table({"text": ["a"]}), path)
    with pytest.raises(ExpertFlowError, match='no column "messages"'):
        load_samples(path)
    turn = json.dumps([{"role": "user", "content": "hi"}])
    parquet.write_table(pa.table({"messages": [turn, "{"]}), path)
    with pytest.raises(ExpertFlowError, match="row 1: messages are not JSON"):
        load_samples(path)
    parquet.write_table(pa.table({"messages": [turn], "images": [[png("red")]]}), path)
    with pytest.raises(ExpertFlowError, match="row 0: more images"):
        load_samples(path)


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(ExpertFlowError, match="holds no samples"):
        load_samples(tmp_path)
    with pytest.raises(ExpertFlowError, match="neither a folder nor a parquet file"):
        load_samples(tmp_path / "gone")


def test_generated_samples_end_with_the_answer() -> None:
    samples = generated_samples(5, seed=3)
    assert len(samples) == 5
    for sample in samples:
        user, assistant = sample["messages"]
        assert user["content"][0]["image"].size == (192, 192)
        assert assistant["role"] == "assistant"
        assert assistant["content"]
    assert samples_digest(samples) == samples_digest(generated_samples(5, seed=3))
    assert samples_digest(samples) != samples_digest(generated_samples(5, seed=4))


def test_the_digest_sees_pixels() -> None:
    one, other = Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4))
    other.putpixel((1, 1), (1, 0, 0))
    sample = {"messages": [{"role": "user", "content": [{"type": "image", "image": one}]}]}
    changed = {"messages": [{"role": "user", "content": [{"type": "image", "image": other}]}]}
    assert samples_digest([sample]) != samples_digest([changed])
    with pytest.raises(ExpertFlowError, match="set"):
        samples_digest([{"messages": [{"role": "user", "content": {1}}]}])


def test_lines_of_jsonl_end_where_json_says(tmp_path):
    good = {"messages": [{"role": "user", "content": "one\u2028line"}]}
    lines = [json.dumps(good, ensure_ascii=False), "", json.dumps(good)]
    (tmp_path / "asked.jsonl").write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())
    assert [sample["messages"][0]["content"] for sample in load_samples(tmp_path)] == ["one\u2028line"] * 2
    (tmp_path / "asked.jsonl").write_text("\n".join([*lines, "{broken"]))
    assert len(load_samples(tmp_path, 2)) == 2
    with pytest.raises(ExpertFlowError, match=r"asked.jsonl, line 4: it is not JSON"):
        load_samples(tmp_path)
