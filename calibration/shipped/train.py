"""Train the shipped models: `python -m calibration.shipped.train moe|dense|dense-total OUT`.

Two stages. The tower stage teaches the vision tower to name, for each patch, the character it shows and, for each
cell, the word, what the word is the value of, and its mark's colour (linear heads that are dropped afterwards):
dense supervision that makes reading appear within minutes where questions alone stay at answer priors. The joint
stage trains everything on questions, on a transcription of each picture and, with a falling weight, on the heads.
On a GPU each step is one CUDA graph.
"""

import argparse
import collections
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from calibration.shipped import feed, forward
from calibration.shipped.architecture import HIDDEN, KINDS, VISION, build_model
from calibration.shipped.pool import Pool
from expertflow_quant.models.processor import load_processor

RECIPE = Path(__file__).with_name("recipe.json")
WORDS = ("word", "row", "column")


class Heads(torch.nn.Module):
    """The heads of the tower stage: patch -> its character; cell -> its word, that word's row, column and colour."""

    def __init__(self) -> None:
        super().__init__()
        self.char = torch.nn.Linear(VISION["hidden_size"], feed.CHAR_CLASSES)
        for name in WORDS:
            setattr(self, name, torch.nn.Linear(HIDDEN, feed.WORD * feed.CHAR_CLASSES))
        self.color = torch.nn.Linear(HIDDEN, len(feed.COLOR_ID) + 1)


def glyph_loss(
    heads: dict[str, Tensor], patches: Tensor, cells: Tensor, batch: dict[str, Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Cross entropy of all heads, and the shares of words, rows, columns and colours that are right."""
    chars = batch["patch_char"].long()
    logits = F.linear(patches, heads["char.weight"], heads["char.bias"]).float()
    each = F.cross_entropy(logits.flatten(0, 1), chars.flatten(), reduction="none")
    inked = (chars.flatten() > 0).float()
    total = (each * inked).sum() / inked.sum().clamp_min(1) + 0.2 * (each * (1 - inked)).mean()
    shares = []
    for name in WORDS:
        words = batch[f"cell_{name}"].long()
        logits = F.linear(cells, heads[f"{name}.weight"], heads[f"{name}.bias"]).float().unflatten(-1, (feed.WORD, -1))
        shown = (words[..., 0] > 0).float()
        each = F.cross_entropy(logits.flatten(0, 2), words.flatten(), reduction="none").view(words.shape).mean(-1)
        total = total + 2 * (each * shown).sum() / shown.sum().clamp_min(1)
        shares.append(((logits.argmax(-1) == words).all(-1) * shown).sum() / shown.sum().clamp_min(1))
    colors = batch["cell_color"].long()
    logits = F.linear(cells, heads["color.weight"], heads["color.bias"]).float()
    shown = (colors > 0).float()
    each = F.cross_entropy(logits.flatten(0, 1), colors.flatten(), reduction="none").view(colors.shape)
    total = total + (each * shown).sum() / shown.sum().clamp_min(1)
    shares.append(((logits.argmax(-1) == colors) * shown).sum() / shown.sum().clamp_min(1))
    return total, [share.detach() for share in shares]


def answer_loss(
    hidden: Tensor, table: Tensor, batch: dict[str, Tensor], transcript_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted cross entropy at the labelled places, the answers' own loss, and which labels are right."""
    at, label = batch["label_at"].long(), batch["label"].long()
    picked = hidden.gather(1, at[..., None].expand(-1, -1, hidden.shape[-1]))
    logits = F.linear(picked, table).float()
    each = F.cross_entropy(logits.flatten(0, 1), label.flatten(), reduction="none", ignore_index=-100).view(label.shape)
    used = (label >= 0).float()
    read = used * (at >= feed.QUESTIONS * feed.SLOT)
    asked = used - read
    answers = (each * asked).sum() / asked.sum().clamp_min(1)
    texts = (each * read).sum() / read.sum().clamp_min(1)
    return answers + transcript_weight * texts, answers.detach(), logits.argmax(-1) == label


class Trainer:
    """One model, its float32 parameters, and steps on batches of a pool."""

    def __init__(self, kind: str, processor: Any, recipe: dict[str, Any], device: str) -> None:
        torch.manual_seed(recipe["seed"])
        self.recipe, self.device, self.cuda = recipe, device, device == "cuda"
        self.model = build_model(kind, processor)
        self.constants = forward.constants(self.model, processor, device)
        self.model.to(device)
        self.heads = Heads().to(device)
        self.params = dict(self.model.named_parameters())
        self.table = "model.language_model.embed_tokens.weight"
        self.weights = torch.zeros(3, device=device)
        fast: Callable[[Any], Any] = torch.compile if self.cuda else lambda f: f
        self.block, self.attend = fast(forward.vision_block), fast(forward.attention)
        if self.cuda:
            torch._dynamo.config.automatic_dynamic_shapes = False
            for name in ("rms", "merge"):
                if not hasattr(getattr(forward, name), "_torchdynamo_orig_callable"):
                    setattr(forward, name, torch.compile(getattr(forward, name)))
        self.experts = fast(forward.experts_grouped) if self.cuda else forward.experts_dense

    def _half(self, named: Any) -> dict[str, Tensor]:
        return {n: p.to(torch.bfloat16) if self.cuda else p for n, p in named}

    def tower_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Loss of the tower stage."""
        p = self._half((n, p) for n, p in self.params.items() if ".visual." in n)
        patches, cells, _ = forward.tower(p, batch["image"], self.constants, self.block)
        loss, shares = glyph_loss(self._half(self.heads.named_parameters()), patches, cells, batch)
        return loss, [loss.detach(), *shares]

    def joint_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Loss of the joint stage."""
        p = self._half(self.params.items())
        patches, cells, deep = forward.tower(p, batch["image"], self.constants, self.block)
        glyphs, shares = glyph_loss(self._half(self.heads.named_parameters()), patches, cells, batch)
        hidden, balance = forward.decoder(
            p, batch["tokens"].long(), cells, deep, self.constants, self.attend, self.experts
        )
        loss, answers, _ = answer_loss(hidden, p[self.table], batch, self.weights[0])
        total = loss + self.weights[1] * glyphs + self.recipe["balance"] * balance
        return total, [total.detach(), answers, balance.detach(), *shares]

    def run(
        self,
        stage: str,
        pool: Pool,
        log: Callable[[dict[str, Any]], None],
        check: Callable[[], dict[str, Any]],
    ) -> None:
        """All steps of a stage; `check` adds to each logged entry."""
        plan, recipe = self.recipe[stage], self.recipe
        loss_of = self.tower_loss if stage == "tower" else self.joint_loss
        trained = [p for n, p in self.params.items() if stage == "joint" or ".visual." in n]
        trained += list(self.heads.parameters())
        lr = torch.tensor(0.0, device=self.device)
        decayed, plain = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
        optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": recipe["weight_decay"]},
                {"params": plain, "weight_decay": 0.0},
            ],
            lr=lr,
            betas=tuple(recipe["betas"]),
            fused=self.cuda,
            capturable=self.cuda,
        )
        for group in optimizer.param_groups:
            group["lr"] = lr
        generator = torch.Generator().manual_seed(recipe["seed"])
        rows = pool.draw(generator, recipe["batch"]).to(self.device)
        shown: list[Tensor] = []

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            loss, parts = loss_of({n: t[rows] for n, t in pool.data.items()})
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(trained, recipe["clip"])
            optimizer.step()
            for i, part in enumerate([*parts, norm]):
                if len(shown) <= i:
                    shown.append(torch.zeros((), device=self.device))
                shown[i].copy_(part)

        replay = self._capture(step) if self.cuda else step
        begun = last = time.time()
        done = 0
        for number in range(plan["steps"]):
            share = number / plan["steps"]
            warm = min(1.0, (number + 1) / plan["warmup"])
            cool = 1.0 if share < recipe["hold"] else (1 - share) / (1 - recipe["hold"])
            lr.fill_(plan["lr"] * warm * max(recipe["floor"], cool))
            for i, name in enumerate(("transcript_weight", "glyph_weight")):
                first, final = recipe[name]
                self.weights[i].fill_(first + (final - first) * min(1.0, share / recipe["hold"]))
            rows.copy_(pool.draw(generator, recipe["batch"]), non_blocking=False)
            replay()
            if time.time() - last > plan["log_seconds"] or number + 1 == plan["steps"]:
                pool.check()
                values = [round(v.item(), 4) for v in shown]
                now = time.time()
                entry = {
                    "stage": stage,
                    "step": number + 1,
                    "seconds": round(now - begun, 1),
                    "ms_per_step": round(1000 * (now - last) / (number + 1 - done), 2),
                    "sheets": (number + 1) * recipe["batch"],
                    "drawn": pool.written * pool.count,
                    "losses": values,
                }
                if not np.isfinite(values[0]):
                    raise RuntimeError(f"loss {values[0]} at step {number + 1}: lower the learning rate")
                if stage == "joint":
                    entry |= check()
                log(entry)
                last, done = time.time(), number + 1

    def _capture(self, step: Callable[[], None]) -> Callable[[], None]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # the feed copies meanwhile
            step()
        return graph.replay

    @torch.no_grad()
    def exact(self, held: list[tuple[dict[str, Tensor], list[list[tuple[str, str]]]]]) -> dict[str, Any]:
        """Share of held-out answers whose every token is the most likely one, by task and kind."""
        p = self._half(self.params.items())
        right, total = collections.Counter[str](), collections.Counter[str]()
        with torch.compiler.set_stance("force_eager"):
            self._count_exact(p, held, right, total)
        return {"exact": {key: round(right[key] / total[key], 4) for key in sorted(total)}}

    def _count_exact(
        self,
        p: dict[str, Tensor],
        held: list[Any],
        right: collections.Counter[str],
        total: collections.Counter[str],
    ) -> None:
        for batch, kinds in held:
            _, cells, deep = forward.tower(p, batch["image"], self.constants, self.block)
            hidden, _ = forward.decoder(
                p, batch["tokens"].long(), cells, deep, self.constants, self.attend, self.experts
            )
            _, _, good = answer_loss(hidden, p[self.table], batch, self.weights[0])
            slot = (batch["label_at"] // feed.SLOT).cpu().numpy()
            used, good_at = (batch["label"] >= 0).cpu().numpy(), good.cpu().numpy()
            for row, asked in enumerate(kinds):
                for i, (task, kind) in enumerate(asked):
                    mine = used[row] & (slot[row] == i)
                    if mine.any():
                        for key in (task, f"{task}/{kind}"):
                            total[key] += 1
                            right[key] += bool(good_at[row][mine].all())


def held_out(processor: Any, count: int, batches: int, device: str) -> list[Any]:
    """Batches of test sheets."""
    encoder, held = feed.Encoder(processor.tokenizer), []
    for i in range(batches):
        layout = feed.Layout(count)
        arrays = layout.arrays(bytearray(layout.nbytes))
        kinds = feed.fill(encoder, "test", f"watch/{i}", arrays)
        held.append(({n: torch.from_numpy(a).to(device) for n, a in arrays.items()}, kinds))
    return held


def save_parts(tensors: dict[str, Tensor], out: Path, name: str, limit: int = 15 << 20) -> None:
    """bfloat16 weights in files of at most `limit` bytes: NAME-0.safetensors, NAME-1.safetensors ..."""
    parts: list[dict[str, Tensor]] = [{}]
    room = limit
    for key, tensor in tensors.items():
        half = tensor.detach().to(torch.bfloat16).cpu().contiguous()
        if half.nbytes > room and parts[-1]:
            parts.append({})
            room = limit
        parts[-1][key] = half
        room -= half.nbytes
    for i, part in enumerate(parts):
        save_file(part, out / f"{name}-{i}.safetensors")


def main() -> None:
    """Train one of the models."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("out", type=Path, help="folder for weights and loss curve")
    shared = Path(__file__).with_name("moe")
    parser.add_argument("--processor", type=Path, default=shared, help="folder of the processor that all models share")
    parser.add_argument(
        "--tower", type=Path, help="start from this trained tower (tower.safetensors of an earlier run)"
    )
    parser.add_argument("--more-tower", action="store_true", help="train the tower given by --tower further")
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--set", action="append", default=[], help="override, as joint.steps=100")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    args = parser.parse_args()
    recipe = json.loads(args.recipe.read_text())
    for change in args.set:
        path, value = change.split("=", 1)
        *parents, last = path.split(".")
        place = recipe
        for parent in parents:
            place = place[parent]
        place[last] = json.loads(value)
    args.out.mkdir(parents=True, exist_ok=True)
    processor = load_processor(args.processor)
    source = feed.Feed(processor.tokenizer, args.workers, recipe["block"], recipe["seed"])
    started = time.time()

    def log(entry: dict[str, Any]) -> None:
        line = json.dumps({"kind": args.kind, "since_start": round(time.time() - started, 1)} | entry)
        print(line, flush=True)
        with open(args.out / f"{args.kind}-curve.jsonl", "a") as curve:
            curve.write(line + "\n")

    pool = Pool(source, recipe["pool_blocks"], args.device)
    try:
        held = held_out(processor, min(recipe["batch"], 256), 2, args.device)
        trainer = Trainer(args.kind, processor, recipe, args.device)
        log({"stage": "start", "recipe": recipe, "torch": torch.__version__, "device": args.device})
        if args.tower:
            kept = load_file(args.tower)
            with torch.no_grad():
                for name, tensor in kept.items():
                    own = trainer.params.get(name)
                    (trainer.heads.get_parameter(name[6:]) if own is None else own).copy_(tensor)
        if not args.tower or args.more_tower:
            trainer.run("tower", pool, log, dict)
            kept = {n: p.detach().cpu() for n, p in trainer.params.items() if ".visual." in n}
            kept |= {f"heads.{n}": p.detach().cpu() for n, p in trainer.heads.named_parameters()}
            save_file(kept, args.out / "tower.safetensors")

        def check() -> dict[str, Any]:
            save_parts(trainer.params, args.out, args.kind)
            return trainer.exact(held)

        trainer.run("joint", pool, log, check)
        save_parts(trainer.params, args.out, args.kind)
        log({"stage": "end"})
    finally:
        pool.stop.set()
        pool.thread.join(timeout=30)
        source.close()


if __name__ == "__main__":
    main()
