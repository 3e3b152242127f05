"""Data sets in every public layout and schema: one and the same items come out of all of them."""

import codecs
import dataclasses
import io
import json
import os
import re

import pytest
from helpers import public_files as public
from PIL import Image, ImageChops

pytest.importorskip("pyarrow")

from eval.data.columns import Columns
from eval.data.errors import DamagedRowError, DataError
from eval.data.images import ImageFolder
from eval.data.item import RowReader, split_name
from eval.data.load import file_task, make_tasks
from eval.metrics import ANLS, RELAXED_ACCURACY
from eval.records import ResultsFile
from eval.runner import run_tasks

CHARTS, DOCUMENTS = public.chart_questions(), public.document_questions()
OTHERS = public.chart_questions(4)[2:]
PATTERNS = {"train": "data/train-*", "test": "data/test-*"}


def hub(folder, table=public.lmms_lab_chartqa, readme=True):
    half = len(CHARTS) // 2 + 1
    public.write_parquet(table(CHARTS[:half]), folder / "data" / "test-00000-of-00002-12ab.parquet")
    public.write_parquet(table(CHARTS[half:]), folder / "data" / "test-00001-of-00002-34cd.parquet")
    public.write_parquet(table(OTHERS), folder / "data" / "train-00000-of-00001.parquet")
    return public.write_readme(folder, {"default": PATTERNS}) if readme else folder


def cached(folder):
    hub(folder / "blobs")
    (folder / "snapshots" / "0a1b" / "data").mkdir(parents=True)
    for path in sorted((folder / "blobs" / "data").iterdir()):
        os.symlink(path, folder / "snapshots" / "0a1b" / "data" / path.name)
    return folder


def converted(folder):
    public.write_parquet(public.lmms_lab_chartqa(CHARTS), folder / "default" / "test" / "0000.parquet")
    public.write_parquet(public.lmms_lab_chartqa(OTHERS), folder / "default" / "train" / "0000.parquet")
    return folder


CHART_LAYOUTS = {
    "hub": hub,
    "hub without README": lambda folder: hub(folder, readme=False),
    "hub, HuggingFaceM4": lambda folder: hub(folder, public.m4_chartqa),
    "hub, ahmed-masry": lambda folder: hub(folder, public.masry_chartqa),
    "hub cache": cached,
    "converted branch": converted,
    "one parquet": lambda folder: public.write_parquet(public.lmms_lab_chartqa(CHARTS), folder / "any.parquet"),
    "glob": lambda folder: hub(folder) / "data" / "test-*.parquet",
    "glob of all": lambda folder: hub(folder, readme=False) / "**" / "*.parquet",
    "save_to_disk": lambda folder: public.write_saved(public.lmms_lab_chartqa(CHARTS), folder),
    "save_to_disk, HuggingFaceM4": lambda folder: public.write_saved(public.m4_chartqa(CHARTS), folder, split=None),
    "save_to_disk, splits": lambda folder: public.write_saved_splits(
        {"train": public.m4_chartqa(OTHERS), "test": public.m4_chartqa(CHARTS)}, folder
    ),
    "json": lambda folder: public.write_chartqa_json(CHARTS, folder / "ChartQA Dataset"),
    "json, higher up": lambda folder: public.write_chartqa_json(CHARTS, folder / "ChartQA Dataset").parent,
    "json, test folder": lambda folder: public.write_chartqa_json(CHARTS, folder) / "test",
    "tsv": lambda folder: public.write_tsv(CHARTS, folder / "ChartQA_TEST.tsv"),
    "folder with tsv": lambda folder: public.write_tsv(CHARTS, folder / "ChartQA_TEST.tsv").parent,
}
DOCUMENT_LAYOUTS = {
    "hub": lambda folder: both_configs(folder, readme=True),
    "hub without README": lambda folder: both_configs(folder, readme=False),
    "save_to_disk": lambda folder: public.write_saved_splits(
        {"validation": TABLES["docvqa"](DOCUMENTS), "test": TABLES["docvqa"](without_answers())}, folder
    ),
    "json": lambda folder: public.write_rrc_json(DOCUMENTS, folder),
    "tsv": lambda folder: public.write_tsv(DOCUMENTS, folder / "DocVQA_VAL.tsv", listed=True, ids=True),
}
TABLES = {"docvqa": public.lmms_lab_docvqa, "infovqa": public.lmms_lab_infovqa}


def without_answers():
    return [dataclasses.replace(q, answers=None) for q in DOCUMENTS[:2]]


def both_configs(folder, readme):
    """lmms-lab/DocVQA: two configurations, each with validation and test."""
    for config, table, shift in (("DocVQA", TABLES["docvqa"], 0), ("InfographicVQA", TABLES["infovqa"], 90000)):
        moved = [dataclasses.replace(q, number=q.number + shift) for q in DOCUMENTS]
        public.write_parquet(table(moved[:4]), folder / config / "validation-00000-of-00002.parquet", group=2)
        public.write_parquet(table(moved[4:]), folder / config / "validation-00001-of-00002.parquet", group=2)
        public.write_parquet(table(without_answers()), folder / config / "test-00000-of-00001.parquet")
    splits = {c: {"validation": f"{c}/validation-*", "test": f"{c}/test-*"} for c in ("DocVQA", "InfographicVQA")}
    return public.write_readme(folder, splits) if readme else folder


def expected(questions, task):
    return [
        {
            "id": f"{task}-{q.number}",
            "question": q.text,
            "answers": tuple(q.answers),
            "split": q.split,
            "kind": q.types[0] if q.types else q.split,
            "image": q.image,
        }
        for q in questions
    ]


def shown(task):
    return [
        {name: getattr(item, name) for name in ("id", "question", "answers", "split", "kind")}
        | {"image": item.source.read()}
        for item in task.items
    ]


@pytest.mark.parametrize("layout", CHART_LAYOUTS)
def test_chartqa_is_the_same_in_every_layout(layout, tmp_path):
    task = file_task("chartqa", CHART_LAYOUTS[layout](tmp_path))
    assert shown(task) == expected(CHARTS, "chartqa")
    reference = file_task("chartqa", CHART_LAYOUTS["one parquet"](tmp_path / "reference"))
    assert task.items == reference.items
    assert task.fingerprint == reference.fingerprint
    assert task.damaged == {}
    assert len({item.image_key for item in task.items}) == 4
    assert (task.metric, task.items[0].family) == (RELAXED_ACCURACY, "human")


@pytest.mark.parametrize("layout", DOCUMENT_LAYOUTS)
def test_docvqa_is_the_same_in_every_layout(layout, tmp_path):
    task = file_task("docvqa", DOCUMENT_LAYOUTS[layout](tmp_path))
    assert shown(task) == expected(DOCUMENTS, "docvqa")
    reference = file_task("docvqa", DOCUMENT_LAYOUTS["hub"](tmp_path / "reference"))
    assert task.items == reference.items
    assert (task.metric, task.items[0].split) == (ANLS, "val")


@pytest.mark.parametrize("layout", ["hub", "hub without README", "json", "tsv"])
def test_infographics_are_the_same_in_every_layout(layout, tmp_path):
    if layout == "json":
        path = public.write_rrc_json(DOCUMENTS, tmp_path, info=True)
    elif layout == "tsv":
        path = public.write_tsv(DOCUMENTS, tmp_path / "InfoVQA_VAL.tsv", listed=True, ids=True)
    else:
        path = DOCUMENT_LAYOUTS[layout](tmp_path)
    shift = 90000 if layout.startswith("hub") else 0
    wanted = expected([dataclasses.replace(q, number=q.number + shift) for q in DOCUMENTS], "infovqa")
    task = file_task("infovqa", path)
    assert shown(task) == wanted
    assert task.metric == ANLS
    assert all("ocr" not in item.extras for item in task.items)


def test_chartqa_x_keeps_its_explanations(tmp_path):
    public.write_parquet(public.chartqa_x(CHARTS), tmp_path / "data" / "test-00000-of-00001.parquet")
    task = file_task("chartqa-x", tmp_path)
    assert task.metric == RELAXED_ACCURACY
    assert [item.extras["explanation"] for item in task.items] == [f"Look at {q.number}." for q in CHARTS]
    assert [item.answers for item in task.items] == [tuple(q.answers) for q in CHARTS]
    assert {item.split for item in task.items} == {"test"}


def test_prompts_limits_and_pixels_are_the_harness_s(tmp_path):
    chart = file_task("chartqa", CHART_LAYOUTS["hub"](tmp_path / "c")).items[0]
    document = file_task("docvqa", DOCUMENT_LAYOUTS["hub"](tmp_path / "d")).items[0]
    assert chart.prompt == f"{chart.question}\nAnswer the question with a single word."
    assert document.prompt == f"{document.question}\nAnswer the question using a single word or phrase."
    assert (chart.max_new_tokens, document.max_new_tokens) == (16, 32)
    image, text = chart.messages[0]["content"]
    assert text == {"type": "text", "text": chart.prompt}
    original = Image.open(io.BytesIO(CHARTS[0].image)).convert("RGB")
    assert ImageChops.difference(image["image"], original).getbbox() is None


def test_images_are_shrunk_for_every_system_alike(tmp_path):
    path = CHART_LAYOUTS["hub"](tmp_path)
    small = file_task("chartqa", path, max_pixels=5000)
    width, height = small.items[0].image.size
    assert 4500 < width * height <= 5000
    assert "5000 pixels" in small.source
    assert small.items[0].image_key == file_task("chartqa", path).items[0].image_key
    assert file_task("chartqa", path, max_pixels=10**6).items[0].image.size == (192, 192)


def test_a_limit_takes_the_first_items(tmp_path):
    path = CHART_LAYOUTS["hub"](tmp_path)
    task = file_task("chartqa", path, limit=3)
    assert task.items == file_task("chartqa", path).items[:3]
    assert task.source == "hub layout, split test, 3 of 2500 questions"


def damaged_questions():
    """Five rows, each with its own damage, among good ones."""
    good = public.chart_questions(8)
    good[1] = dataclasses.replace(good[1], text=None)
    good[2] = dataclasses.replace(good[2], answers=None)
    good[3] = dataclasses.replace(good[3], image=b"no image at all", image_name="a.png")
    good[5] = dataclasses.replace(good[5], image=None, image_name="b.png")
    good[6] = dataclasses.replace(good[6], image=good[6].image[: len(good[6].image) // 2], image_name="c.png")
    return good


class Echo:
    """Answers with the answer of whatever is asked, and remembers how much was asked at once."""

    def __init__(self, gold):
        self.gold, self.batches = gold, []

    def generate(self, conversations, max_new_tokens=32):
        self.batches.append(len(conversations))
        prompts = [messages[0]["content"][1]["text"] for messages in conversations]
        return [type("Answer", (), {"text": self.gold[p], "prompt_tokens": 1, "image_tokens": 1,
                                    "completion_tokens": 1}) for p in prompts]  # fmt: skip


@pytest.mark.parametrize("layout", ["parquet", "json", "tsv", "save_to_disk"])
def test_damaged_rows_are_counted_named_and_score_zero(layout, tmp_path):
    questions = damaged_questions()
    path = {
        "parquet": lambda: public.write_parquet(public.lmms_lab_chartqa(questions), tmp_path / "x.parquet"),
        "json": lambda: public.write_chartqa_json(questions, tmp_path),
        "tsv": lambda: public.write_tsv(questions, tmp_path / "ChartQA_TEST.tsv"),
        "save_to_disk": lambda: public.write_saved(public.lmms_lab_chartqa(questions), tmp_path / "saved"),
    }[layout]()
    task = file_task("chartqa", path)
    assert [item.id for item in task.items] == [f"chartqa-{i}" for i in range(8)]
    assert sorted(task.damaged) == [f"chartqa-{i}" for i in (1, 2, 3, 5, 6)]
    assert task.damaged["chartqa-1"] == "it has no question"
    assert task.damaged["chartqa-2"] == "it has no answers"
    assert "cannot be decoded" in task.damaged["chartqa-3"]
    assert re.search("no image|cannot be read", task.damaged["chartqa-5"])
    assert "cannot be decoded" in task.damaged["chartqa-6"]
    assert task.description["damaged"] == task.damaged
    engine = Echo({item.prompt: item.answers[0] for item in task.items if item.answers})
    results = run_tasks(engine, [task], 8, ResultsFile.open(tmp_path / "run.jsonl", {}))
    assert [r.score for r in results] == [1, 0, 0, 0, 1, 0, 0, 1]
    assert engine.batches == [3]  # the good ones, asked once and together
    assert all(r.error == f"DamagedRowError: {task.damaged[r.id]}" for r in results if r.score == 0)
    with pytest.raises(DamagedRowError):
        _ = task.items[5].image


def spoil(path, column, group):
    """Overwrite the beginning of a column in one row group, as a bad disk or an interrupted copy does."""
    from pyarrow import parquet

    row_group = parquet.ParquetFile(path).metadata.row_group(group)
    chunks = (row_group.column(i) for i in range(row_group.num_columns))
    chunk = next(chunk for chunk in chunks if chunk.path_in_schema.startswith(column))
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 40] = bytes(byte ^ 0x5A for byte in data[start : start + 40])
    path.write_bytes(data)
    return path


def test_a_parquet_file_damaged_inside_costs_its_images_or_is_refused_by_name(tmp_path):
    images = spoil(public.write_parquet(public.lmms_lab_chartqa(CHARTS), tmp_path / "test-0.parquet"), "image", 1)
    task = file_task("chartqa", images)
    assert list(task.damaged) == ["chartqa-3", "chartqa-4", "chartqa-5"]
    assert task.damaged["chartqa-3"] == "its image cannot be read, test-0.parquet is damaged there: download it again"
    with pytest.raises(DamagedRowError):
        _ = task.items[3].image
    texts = spoil(public.write_parquet(public.lmms_lab_chartqa(CHARTS), tmp_path / "test-1.parquet"), "question", 1)
    with pytest.raises(DataError, match=r"cannot read .*test-1\.parquet \(.*download it again"):
        file_task("chartqa", texts)


@pytest.mark.parametrize("task", ["docvqa", "infovqa"])
def test_two_editions_of_one_file_are_not_asked_twice(task, tmp_path):
    """The RRC gives the same questions with and without their types."""
    folder = public.write_rrc_json(DOCUMENTS, tmp_path, info=task == "infovqa")
    (path,) = folder.glob("*_withQT.json")
    (folder / path.name.replace("_withQT", "")).write_text(path.read_text().replace("_type", "_other"))
    items = file_task(task, folder).items
    assert [(item.id, item.kind) for item in items] == [(f"{task}-{q.number}", q.types[0]) for q in DOCUMENTS]


def test_a_row_of_json_that_is_no_object_is_damaged(tmp_path):
    folder = public.write_chartqa_json(CHARTS, tmp_path)
    path = folder / "test" / "test_human.json"
    path.write_text(json.dumps([None, *json.loads(path.read_text()), "cut"]))
    task = file_task("chartqa", folder)
    assert len(task.items) == len(CHARTS) + 2
    assert task.damaged == dict.fromkeys(["chartqa-0", "chartqa-5"], "it has no question")


def test_a_byte_order_mark_belongs_to_no_name(tmp_path):
    public.write_chartqa_json(CHARTS[:4], tmp_path)
    json_file, table = tmp_path / "test" / "test_human.json", public.write_tsv(CHARTS, tmp_path / "ChartQA_TEST.tsv")
    for path, count in ((json_file, 4), (table, 8)):
        path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
        assert len(file_task("chartqa", path).items) == count


@pytest.mark.parametrize("pattern", ["/data/test-*", "''"])
def test_a_readme_whose_patterns_name_no_files_here_is_passed_over(pattern, tmp_path):
    hub(tmp_path, readme=False)
    public.write_readme(tmp_path, {"default": {"test": pattern}})
    assert shown(file_task("chartqa", tmp_path)) == expected(CHARTS, "chartqa")


def test_images_may_be_named_instead_of_held(tmp_path):
    """A table may hold paths: in the image's struct, as a text, or in a TSV of which the images were moved out."""
    import pyarrow as pa

    public.write_images(CHARTS, tmp_path / "images")
    whole, tables = public.lmms_lab_chartqa(CHARTS), {}
    paths = [{"bytes": None, "path": f"images/{q.image_name}"} for q in CHARTS]
    at = whole.schema.get_field_index("image")
    tables["struct"] = whole.set_column(at, "image", pa.array(paths, whole.schema.field(at).type))
    tables["text"] = whole.set_column(at, "image", pa.array([q.image_name for q in CHARTS]))
    for name, table in tables.items():
        task = file_task("chartqa", public.write_parquet(table, tmp_path / f"{name}.parquet"))
        assert shown(task) == expected(CHARTS, "chartqa")
    lines = [f"{q.number}\timages/{q.image_name}\t{q.number}?\tgold\ttest_{q.split}" for q in CHARTS]
    names = "index\timage_path\tquestion\tanswer\tsplit"
    (tmp_path / "ChartQA_TEST_local.tsv").write_text("\n".join([names, *lines]) + "\n")
    items = file_task("chartqa", tmp_path / "ChartQA_TEST_local.tsv").items
    assert [item.source.read() for item in items] == [q.image for q in CHARTS]


def test_images_that_are_missing_altogether_are_no_task(tmp_path):
    folder = public.write_chartqa_json(CHARTS, tmp_path)
    for path in (folder / "test" / "png").iterdir():
        path.unlink()
    (folder / "train" / "png" / CHARTS[0].image_name).unlink()
    with pytest.raises(DataError, match=r"none of 8 rows .* can be asked; the first one: image file .*\.png cannot be"):
        file_task("chartqa", folder)


@pytest.mark.parametrize("saved", ["one split", "splits", "parquet"])
def test_what_the_datasets_library_writes_is_read(saved, tmp_path):
    datasets = pytest.importorskip("datasets")
    types = {"human_or_machine": datasets.ClassLabel(names=["human", "machine"]), "image": datasets.Image()}
    features = datasets.Features({**types, "query": datasets.Value("string"), "label": [datasets.Value("string")]})
    rows = [
        {
            "query": q.text,
            "label": q.answers,
            "human_or_machine": int(q.split == "augmented"),
            "image": {"bytes": q.image, "path": None},
        }
        for q in CHARTS
    ]
    made = datasets.Dataset.from_list(rows, features=features)
    if saved == "one split":
        made.save_to_disk(tmp_path / "x", num_shards=2)
    elif saved == "splits":
        datasets.DatasetDict({"train": made.select([0]), "test": made}).save_to_disk(tmp_path / "x")
    else:
        (tmp_path / "x" / "data").mkdir(parents=True)
        made.to_parquet(tmp_path / "x" / "data" / "test-00000-of-00001.parquet")
    assert shown(file_task("chartqa", tmp_path / "x")) == expected(CHARTS, "chartqa")


def test_a_jpeg_cut_short_is_found_when_it_is_asked(tmp_path):
    buffer = io.BytesIO()
    Image.effect_noise((200, 200), 90).convert("RGB").save(buffer, "JPEG")
    questions = [dataclasses.replace(q, image=buffer.getvalue()[:2000]) for q in CHARTS[:1]] + CHARTS[1:3]
    task = file_task("chartqa", public.write_parquet(public.lmms_lab_chartqa(questions), tmp_path / "x.parquet"))
    engine = Echo({item.prompt: item.answers[0] for item in task.items})
    results = run_tasks(engine, [task], 3, ResultsFile.open(tmp_path / "run.jsonl", {}))
    assert [r.score for r in results] == [0, 1, 1]
    assert results[0].error.startswith("DamagedRowError: its image of 2000 bytes cannot be decoded")
    assert engine.batches == [2]


def test_rows_in_memory_are_read_too(tmp_path):
    """Rows of an open data set, whose images are PIL images and whose numbers have names."""
    rows = [{"query": "q?", "label": ["a", None, "b"], "image": Image.new("RGB", (9, 9)), "human_or_machine": 1}]
    columns = Columns.detect(rows[0], "rows")
    reader = RowReader("chartqa", "chart", columns, ImageFolder((tmp_path,)), "", {"human_or_machine": ("human", "m2")})
    item = reader.item(rows[0], 0)
    assert (item.answers, item.split, item.image.size, item.damage) == (("a", "b"), "m2", (9, 9), None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "nowhere", r"nothing at .*nowhere.*lmms-lab/ChartQA.*--chartqa-path"),
        (lambda folder: folder, r"no \*\.parquet.*test_human\.json.*ChartQA_TEST\.tsv"),
        (lambda folder: folder / "*.parquet", "there is nothing at"),
        (lambda folder: write(folder / "x.parquet", "no parquet"), "cannot read .*download it again"),
        (lambda folder: write(folder / "x.csv", "a,b"), "no known layout"),
        (lambda folder: write(folder / "test_human.json", "{}"), "holds no questions"),
        (lambda folder: write(folder / "test_human.json", '[{"query": "q"}]'), "no column for the answers"),
        (lambda folder: write(folder / "x.tsv", "index\tquestion\tanswer\n"), "no column for the image"),
        (lambda folder: write(folder / "x.tsv", "index\tquestion\tanswer\timage\n"), "holds no rows"),
        (lambda folder: write(folder / "x.tsv", "answer\timage\tquestion\n1\tx\tcaf\udce9\n"), r"x\.tsv .*in UTF-8"),
        (lambda folder: write(folder / "x.tsv", "question caf\udce9\n"), r"x\.tsv .*in UTF-8"),
        (lambda folder: write(folder / "test_human.json", "[null, 7]"), "holds no questions"),
        (lambda folder: write(folder / "state.json", "{"), "save the data set again"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_remedy(make, message, tmp_path):
    with pytest.raises(DataError, match=message) as raised:
        file_task("chartqa", make(tmp_path))
    assert "://" not in str(raised.value)


def write(path, text):
    path.write_text(text, errors="surrogateescape")
    return path if path.suffix != ".json" else path.parent


def test_splits_and_configurations_that_cannot_be_told_are_named(tmp_path):
    for name in ("train", "val"):
        public.write_parquet(public.lmms_lab_chartqa(CHARTS), tmp_path / f"{name}-0.parquet")
    with pytest.raises(DataError, match="'train', 'val' and none of 'test'"):
        file_task("chartqa", tmp_path)
    for name in ("a", "b"):
        public.write_parquet(public.lmms_lab_chartqa(CHARTS), tmp_path / "two" / name / "test-0.parquet")
    with pytest.raises(DataError, match="configurations 'a', 'b'"):
        file_task("chartqa", tmp_path / "two")
    both_configs(tmp_path / "half", readme=True)
    for path in (tmp_path / "half" / "DocVQA").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="holds the configuration InfographicVQA and not DocVQA"):
        file_task("docvqa", tmp_path / "half")
    public.write_parquet(TABLES["docvqa"](without_answers()), tmp_path / "test-0.parquet")
    with pytest.raises(DataError, match=r"none of 2 rows .* can be asked; the first one: it has no answers"):
        file_task("docvqa", tmp_path / "test-0.parquet")


def test_tasks_are_made_by_name(tmp_path):
    paths = {"docvqa": DOCUMENT_LAYOUTS["hub"](tmp_path)}
    tasks = make_tasks(["document", "docvqa", "document"], paths, limit=2)
    assert [(task.name, len(task.items)) for task in tasks] == [("document", 2), ("docvqa", 2)]
    with pytest.raises(DataError, match=r"chartqa needs its files.*--chartqa-path"):
        make_tasks(["chartqa"], {})
    with pytest.raises(DataError, match="'poem' is not known: use one of chart, document, chartqa"):
        make_tasks(["poem"], {})
    with pytest.raises(DataError, match="no task is named"):
        make_tasks([], {})


def test_split_names():
    names = ["human_test", "test_human", "human", "augmented_test", "machine", "validation", "val", "test", None, ""]
    wanted = ["human"] * 3 + ["augmented"] * 2 + ["val"] * 2 + ["test", "part", "part"]
    assert [split_name(name, "part") for name in names] == wanted
