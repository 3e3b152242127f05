"""The public data sets that are understood: how they are scored and asked, and which public files hold them."""

from dataclasses import dataclass

from eval.metrics import ANLS, RELAXED_ACCURACY, Metric


@dataclass(frozen=True)
class DataSet:
    """``style`` names the prompt and token limit; ``splits`` and ``configs`` what is taken where files hold several,
    best first; ``json_files`` and ``tsv_files`` match file names of the other layouts; ``sources`` where to get it;
    ``rows`` how many questions the split has that is judged on, where that is known."""

    name: str
    title: str
    metric: Metric
    style: str
    splits: tuple[str, ...]
    configs: tuple[str, ...]
    json_files: str
    tsv_files: str
    sources: tuple[str, ...]
    rows: int | None = None

    @property
    def foreign_configs(self) -> tuple[str, ...]:
        """Configurations that hold other data sets than this."""
        return tuple(name for other in DATA_SETS.values() for name in other.configs if name not in self.configs)

    @property
    def option(self) -> str:
        """The option of the commands that takes its path."""
        return f"--{self.name}-path"

    @property
    def remedy(self) -> str:
        """Which files to get and where to put them."""
        given = f"{self.option} FOLDER (to compare: --task {self.name}=FOLDER)"
        return f"get one of {'; '.join(self.sources)}; put it into a folder and give that folder as {given}"


VALIDATION = ("validation", "val", "dev")

CHARTQA = DataSet(
    "chartqa",
    "ChartQA",
    RELAXED_ACCURACY,
    "chart",
    ("test",),
    ("ChartQA",),
    r"test_(human|augmented)\.json",
    r"ChartQA_TEST(_local)?\.tsv",
    (
        "the data set lmms-lab/ChartQA or HuggingFaceM4/ChartQA (data/test-*.parquet, 70 MB)",
        'the authors\' "ChartQA Dataset" (test/test_human.json, test/test_augmented.json, test/png/)',
        "VLMEvalKit's ChartQA_TEST.tsv",
    ),
    rows=2500,
)
CHARTQA_X = DataSet(
    "chartqa-x",
    "ChartQA-X",
    RELAXED_ACCURACY,
    "chart",
    ("test",),
    ("ChartQA-X",),
    r".*test.*\.json",
    r"ChartQA-?X.*\.tsv",
    ("the data set shamanthakhegde/ChartQA-X (data/test-*.parquet)",),
)
DOCVQA = DataSet(
    "docvqa",
    "DocVQA",
    ANLS,
    "document",
    VALIDATION,
    ("DocVQA",),
    r"val_v[0-9.]+(_withQT)?\.json",
    r"DocVQA_VAL(_local)?\.tsv",
    (
        "the data set lmms-lab/DocVQA (README.md, DocVQA/validation-*.parquet, 2.5 GB)",
        "task 1 of the RRC's DocVQA challenge (val_v1.0_withQT.json, spdocvqa_images/)",
        "VLMEvalKit's DocVQA_VAL.tsv",
    ),
    rows=5349,
)
INFOVQA = DataSet(
    "infovqa",
    "InfographicVQA",
    ANLS,
    "document",
    VALIDATION,
    ("InfographicVQA",),
    r"infographicsVQA_val_v[0-9.]+(_withQT)?\.json",
    r"InfoVQA_VAL(_local)?\.tsv",
    (
        "the data set lmms-lab/DocVQA (README.md, InfographicVQA/validation-*.parquet)",
        "task 3 of the RRC's DocVQA challenge (infographicsVQA_val_v1.0_withQT.json, infographicsvqa_images/)",
        "VLMEvalKit's InfoVQA_VAL.tsv",
    ),
    rows=2801,
)
DATA_SETS = {data_set.name: data_set for data_set in (CHARTQA, CHARTQA_X, DOCVQA, INFOVQA)}
