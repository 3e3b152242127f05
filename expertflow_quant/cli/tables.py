"""Tables about a checkpoint: sizes and errors by layer, bytes by format, the experts calibration hardly
reached."""

from collections import defaultdict
from collections.abc import Sequence

from rich import box
from rich.table import Table

from expertflow_quant.checkpoint.manifest import ExpertEntry, LayerEntry, Manifest
from expertflow_quant.formats.record import RecordLayout
from expertflow_quant.formats.spec import BF16

RARE_SHOWN = 12
REMEDIES = {"closest": "", "few": ", no others", "none": ", rounded only"}


def size(nbytes: int) -> str:
    """Bytes in binary units, as people read them."""
    value, units = float(nbytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, _ = value / 1024, units.pop(0)
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


def bf16_bytes(layer: LayerEntry) -> int:
    """What a layer's records would take in bf16."""
    return RecordLayout(layer.shape, BF16).nbytes * len(layer.experts)


def layer_table(manifest: Manifest) -> Table:
    """Per MoE layer and in total: experts, formats, bytes, share of bf16, mean and largest error, rare
    experts."""
    table = _table(f"{manifest.model_id} by {method_of(manifest)}", "layer")
    table.add_column("formats", min_width=9)
    for name in ("experts", "bytes", "of bf16", "error", "largest", "rare"):
        table.add_column(name, justify="right", no_wrap=True)
    for index, layer in enumerate(manifest.layers):
        table.add_row(str(index), _formats(layer.experts), *_figures([layer], manifest))
    table.add_section()
    every = [expert for layer in manifest.layers for expert in layer.experts]
    table.add_row("all", _formats(every), *_figures(manifest.layers, manifest))
    return table


def format_table(manifest: Manifest) -> Table:
    """Per format: experts, bytes, bits per weight, mean error."""
    table = _table("formats", "format")
    for name in ("experts", "bytes", "bits/weight", "error"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, (experts, weights) in sorted(_by_format(manifest).items()):
        nbytes = sum(expert.nbytes for expert in experts)
        mean = sum(expert.error for expert in experts) / len(experts)
        table.add_row(name, str(len(experts)), size(nbytes), f"{8 * nbytes / weights:.2f}", f"{mean:.4f}")
    return table


def _table(title: str, first: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=True)
    return table


def method_of(manifest: Manifest) -> str:
    return str(manifest.made.get("method", "an unknown method"))


def is_calibrated(manifest: Manifest) -> bool:
    """Whether errors were measured on outputs (else on weights)."""
    return manifest.made.get("calibration") is not None


def error_note(manifest: Manifest) -> str:
    """What the error columns are."""
    if is_calibrated(manifest):
        return "error: of an expert's output on its calibration tokens, relative to full precision"
    return "error: of the weights, relative to full precision (no calibration samples were used)"


def rare_note(manifest: Manifest) -> str | None:
    """The experts that too few calibration tokens reached, and what was done; None where all were reached."""
    if not is_calibrated(manifest):
        return None
    rare = [
        f"{layer}.{index} ({expert.tokens} tokens{REMEDIES[expert.coverage]})"
        for layer, of in enumerate(manifest.layers)
        for index, expert in enumerate(of.experts)
        if expert.coverage != "routed"
    ]
    more = f" and {len(rare) - RARE_SHOWN} more" if len(rare) > RARE_SHOWN else ""
    listed = ", ".join(rare[:RARE_SHOWN]) + more
    return (
        f"{len(rare)} experts saw few tokens and got those that came closest to choosing them as well: {listed}"
        if rare
        else None
    )


def coverage_table(manifest: Manifest) -> Table | None:
    """Per MoE layer the calibration tokens of its experts by modality: the least, the middle and the most of an expert,
    and experts that saw none; None where they were not counted."""
    every = [[expert for expert in layer.experts if expert.text_tokens is not None] for layer in manifest.layers]
    if not is_calibrated(manifest) or not any(every):
        return None
    table = _table("calibration tokens of an expert", "layer")
    for name in ("image", "text"):
        table.add_column(f"{name}: least / median / most (experts with none)", justify="right")
    for index, experts in enumerate(every):
        text = [expert.text_tokens or 0 for expert in experts]
        image = [expert.tokens - (expert.text_tokens or 0) for expert in experts]
        table.add_row(str(index), _spread(image) if any(image) else "-", _spread(text))
    return table


def _spread(counts: Sequence[int]) -> str:
    ordered, none = sorted(counts), sum(not count for count in counts)
    shown = f"{ordered[0]} / {ordered[len(ordered) // 2]} / {ordered[-1]}" if ordered else "-"
    return f"{shown} ({none})" if none else shown


def _figures(layers: Sequence[LayerEntry], manifest: Manifest) -> list[str]:
    experts = [expert for layer in layers for expert in layer.experts]
    nbytes = sum(expert.nbytes for expert in experts)
    whole = sum(bf16_bytes(layer) for layer in layers)
    errors = [expert.error for expert in experts]
    rare = sum(expert.coverage != "routed" for expert in experts)
    return [
        str(len(experts)),
        size(nbytes),
        f"{nbytes / whole:.1%}",
        f"{sum(errors) / len(errors):.4f}",
        f"{max(errors):.4f}",
        str(rare) if is_calibrated(manifest) else "-",
    ]


def _formats(experts: Sequence[ExpertEntry]) -> str:
    counts: dict[str, int] = defaultdict(int)
    for expert in experts:
        counts[expert.format.name] += 1
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))


def _by_format(manifest: Manifest) -> dict[str, tuple[list[ExpertEntry], int]]:
    """Format name to its experts and how many weights they have."""
    found: dict[str, tuple[list[ExpertEntry], int]] = {}
    for layer in manifest.layers:
        weights = sum(rows * columns for rows, columns in layer.shape.matrices.values())
        for expert in layer.experts:
            experts, count = found.get(expert.format.name, ([], 0))
            found[expert.format.name] = ([*experts, expert], count + weights)
    return found
