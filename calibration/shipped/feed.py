"""Training sheets as fixed-size arrays, drawn by worker processes while the model trains.

Every picture carries several questions at once: its tokens form one shared prefix, each question with its answer
a slot behind it that sees the prefix and itself only. One more slot holds a transcription of the picture's texts.
"""

import contextlib
import multiprocessing as mp
import string
import zlib
from dataclasses import dataclass
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import numpy as np

from calibration.shipped.architecture import MERGE, PATCH
from expertflow_quant.samples import Question, Sheet, make_sheet
from expertflow_quant.samples.canvas import SIZE
from expertflow_quant.samples.item import SUFFIX
from expertflow_quant.samples.words import COLORS

QUESTIONS = 8
# With the prefix's 149 tokens both give key lengths that are multiples of 16, as fast attention kernels want.
SLOT = 43
TRANSCRIPT = 91
ANSWER = 14
LABELS = QUESTIONS * ANSWER + TRANSCRIPT
PATCHES = (SIZE // PATCH) ** 2
CELLS = PATCHES // MERGE**2
CELL = PATCH * MERGE
WORD = 8
READ = "Read the text in the image."
CHARACTERS = string.digits + string.ascii_letters + ".,:-/$%'"
CHAR_ID = {c: i + 1 for i, c in enumerate(CHARACTERS)}
CHAR_CLASSES = len(CHARACTERS) + 1
COLOR_ID = {name: i + 1 for i, name in enumerate(COLORS)}
GLYPHS = ("patch_char", "cell_word", "cell_row", "cell_column", "cell_color")
TASKS = ("chart", "document")


@dataclass(frozen=True)
class Layout:
    """Shapes and dtypes of a batch's arrays, by name."""

    count: int

    @property
    def fields(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Name -> (shape, dtype)."""
        n = self.count
        return {
            "image": ((n, SIZE, SIZE, 3), np.uint8),
            "tokens": ((n, QUESTIONS * SLOT + TRANSCRIPT), np.int16),
            "label_at": ((n, LABELS), np.int16),
            "label": ((n, LABELS), np.int16),
            "patch_char": ((n, PATCHES), np.uint8),
            "cell_word": ((n, CELLS, WORD), np.uint8),
            "cell_row": ((n, CELLS, WORD), np.uint8),
            "cell_column": ((n, CELLS, WORD), np.uint8),
            "cell_color": ((n, CELLS), np.uint8),
        }

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays together."""
        return sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in self.fields.values())

    def arrays(self, buffer: Any) -> dict[str, np.ndarray]:
        """The arrays over one buffer."""
        out, at = {}, 0
        for name, (shape, dtype) in self.fields.items():
            out[name] = np.ndarray(shape, dtype, buffer, at)
            at += out[name].nbytes
        return out


def transcript(sheet: Sheet) -> str:
    """The sheet's texts from top to bottom, then left to right."""
    runs = sorted(sheet.canvas.runs, key=lambda run: (round(run.y / 6), run.centres[0] if run.centres else 0))
    return " ".join(run.text for run in runs)


def spelled(word: str) -> list[int]:
    """The class of each of a word's first WORD characters."""
    return [CHAR_ID.get(c, 0) for c in word[:WORD]]


def glyph_labels(sheet: Sheet, out: dict[str, np.ndarray]) -> None:
    """What is shown where, 0 where nothing is, in the image processor's order (cell by cell, its patches together).

    For each patch the character whose centre lies in it; for each cell the word it shows, the first words of the row
    and the column that this word is the value of, and the colour of its mark.
    """
    for array in out.values():
        array[:] = 0
    per_row = SIZE // CELL
    nearest = np.full(CELLS, 1e9)
    for run in sheet.canvas.runs:
        if not 0 <= run.y < SIZE:
            continue
        belongs = [spelled(name.split(" ")[0]) for name in (run.row, run.column)]
        color = COLOR_ID.get(run.color, 0)
        at = 0
        for word in run.text.split(" "):
            codes = spelled(word)
            for i in range(at, at + len(word)):
                x = run.centres[i]
                if not 0 <= x < SIZE:
                    continue
                row, column = int(run.y) // CELL, int(x) // CELL
                cell = row * per_row + column
                inner = (int(run.y) % CELL) // PATCH * MERGE + (int(x) % CELL) // PATCH
                out["patch_char"][cell * MERGE**2 + inner] = CHAR_ID.get(run.text[i], 0)
                off = abs(x - (column + 0.5) * CELL) + abs(run.y - (row + 0.5) * CELL)
                if off < nearest[cell]:
                    nearest[cell] = off
                    names = zip(("cell_word", "cell_row", "cell_column"), (codes, *belongs), strict=True)
                    for name, value in names:
                        out[name][cell] = 0
                        out[name][cell, : len(value)] = value
                    out["cell_color"][cell] = color
            at += len(word) + 1


class Encoder:
    """Sheets to arrays with one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.backend = tokenizer.backend_tokenizer
        self.end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.pad = tokenizer.pad_token_id

    def slots(self, pairs: list[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """Token ids of the question half (up to the answer's first token) and of the answer with its end."""
        texts = []
        for prompt, answer in pairs:
            texts.append(f"{prompt}<|im_end|>\n<|im_start|>assistant\n")
            texts.append(f"{answer}<|im_end|>")
        ids = [e.ids for e in self.backend.encode_batch(texts, add_special_tokens=False)]
        return list(zip(ids[::2], ids[1::2], strict=True))

    def write(self, sheet: Sheet, rng: np.random.Generator, out: dict[str, np.ndarray], row: int) -> list[Question]:
        """Fill one row of the arrays; returns the questions asked."""
        order = rng.permutation(len(sheet.questions))[:QUESTIONS]
        asked = [sheet.questions[i] for i in order]
        pairs = [(q.text + SUFFIX[sheet.task], q.answers[0]) for q in asked]
        encoded = self.slots([*pairs, (READ, transcript(sheet))])
        tokens, at, label = out["tokens"][row], out["label_at"][row], out["label"][row]
        tokens[:] = self.pad
        at[:] = 0
        label[:] = -100
        used = 0
        for i, (question, answer) in enumerate(encoded):
            is_text = i == len(encoded) - 1
            start, room = (QUESTIONS * SLOT, TRANSCRIPT) if is_text else (i * SLOT, SLOT)
            ids = (question + answer)[:room]
            if not is_text and (len(question) + len(answer) > room or len(answer) > ANSWER):
                continue
            tokens[start : start + len(ids)] = ids
            count = len(ids) - len(question)
            first = start + len(question) - 1
            at[used : used + count] = np.arange(first, first + count)
            label[used : used + count] = ids[len(question) :]
            used += count
        out["image"][row] = np.asarray(sheet.canvas.image)
        glyph_labels(sheet, {name: out[name][row] for name in GLYPHS})
        return asked


def fill(encoder: Encoder, split: str, seed: str, out: dict[str, np.ndarray]) -> list[list[tuple[str, str]]]:
    """Draw a whole batch, charts and documents in turn; returns (task, kind) of each question slot."""
    rng = np.random.default_rng(zlib.crc32(seed.encode()))
    kinds = []
    for row in range(len(out["image"])):
        sheet = make_sheet(TASKS[row % 2], split, f"{seed}/{row}")
        asked = encoder.write(sheet, rng, out, row)
        kinds.append([(sheet.task, question.kind) for question in asked])
    return kinds


def _work(tokenizer: Any, name: str, count: int, worker: int, seed: int, ready: Any, free: Any) -> None:
    memory = SharedMemory(name)
    encoder, layout, number = Encoder(tokenizer), Layout(count), 0
    while True:
        block = free.get()
        if block is None:
            return
        arrays = layout.arrays(memory.buf[block * layout.nbytes : (block + 1) * layout.nbytes])
        fill(encoder, "train", f"{seed}/{worker}/{number}", arrays)
        del arrays
        ready.put(block)
        number += 1


class Feed:
    """Worker processes that draw blocks of `count` sheets into shared memory."""

    def __init__(self, tokenizer: Any, workers: int, count: int = 256, seed: int = 0) -> None:
        self.layout = Layout(count)
        blocks = 3 * workers
        self.memory = SharedMemory(create=True, size=blocks * self.layout.nbytes)
        context = mp.get_context("fork")
        self.ready, self.free = context.Queue(), context.Queue()
        for block in range(blocks):
            self.free.put(block)
        self.workers = [
            context.Process(
                target=_work,
                args=(tokenizer, self.memory.name, count, w, seed, self.ready, self.free),
                daemon=True,
            )
            for w in range(workers)
        ]
        for worker in self.workers:
            worker.start()

    def take(self, wait: bool) -> tuple[int, dict[str, np.ndarray]] | None:
        """A finished block, or None when none is ready and `wait` is False; give it back with `give`."""
        if not wait and self.ready.empty():
            return None
        block = self.ready.get()
        start = block * self.layout.nbytes
        return block, self.layout.arrays(self.memory.buf[start : start + self.layout.nbytes])

    def give(self, block: int) -> None:
        """Let the workers overwrite a block."""
        self.free.put(block)

    def close(self) -> None:
        """Stop the workers and free the memory."""
        for worker in self.workers:
            worker.terminate()
        with contextlib.suppress(BufferError):  # a reader may still look at a block: the memory goes with the process
            self.memory.close()
        self.memory.unlink()
