"""One process at a time writes a checkpoint folder; the same one may again."""

import subprocess
import sys
from pathlib import Path

import pytest

from expertflow_quant.checkpoint.errors import CheckpointError, ResumeError
from expertflow_quant.checkpoint.lock import hold, release
from expertflow_quant.checkpoint.writer import CheckpointWriter

HOLDER = """
import sys
from pathlib import Path
from expertflow_quant.checkpoint.writer import CheckpointWriter
writer = CheckpointWriter(Path(sys.argv[1]), {"job": 1})
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that is writing into ``tmp_path / "out"``."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("overwrite", [False, True])
def test_another_run_is_not_disturbed(holder, overwrite, tmp_path):
    before = sorted(path.name for path in (tmp_path / "out" / ".journal").iterdir())
    with pytest.raises(ResumeError, match=r"another run is writing .*out at this moment: wait for it"):
        CheckpointWriter(tmp_path / "out", {"job": 2}, overwrite)
    assert sorted(path.name for path in (tmp_path / "out" / ".journal").iterdir()) == before
    holder.kill()
    holder.wait()
    CheckpointWriter(tmp_path / "out", {"job": 1})  # a lock ends with its process


def test_one_process_may_hold_a_folder_more_than_once(tmp_path):
    first, second = hold(tmp_path), hold(tmp_path)
    release(first)
    code = f"from pathlib import Path; from expertflow_quant.checkpoint.lock import hold; hold(Path({str(tmp_path)!r}))"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, cwd=ROOT, check=False).returncode == 1
    release(second)
    assert subprocess.run(command, capture_output=True, cwd=ROOT, check=False).returncode == 0
    release(second)  # once too often does nothing


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write to .*file/out: .*choose a folder that can be written"):
        hold(tmp_path / "file" / "out")


def test_starting_anew_removes_files_of_the_unfinished_run(tmp_path):
    writer = CheckpointWriter(tmp_path / "out", {"job": 1})
    writer.write_json("tokenizer_config.json", {"old": True})
    del writer
    CheckpointWriter(tmp_path / "out", {"job": 2}, overwrite=True)
    assert not (tmp_path / "out" / "tokenizer_config.json").exists()
