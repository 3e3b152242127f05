"""`inspect`: what a checkpoint holds. `verify`: whether every byte of it is as its manifest says."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from expertflow_quant.checkpoint.manifest import Manifest
from expertflow_quant.checkpoint.reader import CheckpointReader
from expertflow_quant.cli.tables import (
    coverage_table,
    error_note,
    format_table,
    is_calibrated,
    layer_table,
    method_of,
    rare_note,
    size,
)

Checkpoint = Annotated[Path, typer.Argument(metavar="OUT", help="Folder that `quantize` wrote.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the figures as one JSON document.")]


def register(app: typer.Typer) -> None:
    """Adds the commands `inspect` and `verify`."""
    app.command("inspect")(inspect)
    app.command("verify")(verify)


def inspect(checkpoint: Checkpoint, as_json: AsJson = False) -> None:
    """Show formats, bytes and errors by layer, and how the checkpoint was made."""
    manifest = CheckpointReader(checkpoint).manifest
    if as_json:
        typer.echo(json.dumps(_figures(manifest), indent=2))
        return
    console = Console()
    console.print(layer_table(manifest))
    console.print(format_table(manifest))
    if (covered := coverage_table(manifest)) is not None:
        console.print(covered)
    console.print(error_note(manifest), highlight=False)
    if (note := rare_note(manifest)) is not None:
        console.print(note, style="yellow", highlight=False)
    backbone = sum(entry.nbytes for entry in manifest.backbone)
    console.print(
        f"experts {size(manifest.expert_bytes)}, everything else {size(backbone)}; "
        f"{manifest.model_type} by {method_of(manifest)}, {_packages(manifest)}",
        highlight=False,
    )


def verify(checkpoint: Checkpoint) -> None:
    """Check every file's size and sha256 against the manifest; exit code 2 where one differs."""
    reader = CheckpointReader(checkpoint)
    reader.verify(full=True)
    files = reader.manifest.all_files
    total = size(sum(entry.nbytes for entry in files))
    typer.echo(f"{checkpoint}: {len(files)} files, {total}, all as the manifest says")


def _figures(manifest: Manifest) -> dict[str, object]:
    return {
        "model": {"id": manifest.model_id, "type": manifest.model_type},
        "expert_bytes": manifest.expert_bytes,
        "backbone_bytes": sum(entry.nbytes for entry in manifest.backbone),
        "error_of": "outputs" if is_calibrated(manifest) else "weights",
        "layers": [
            {
                "module": layer.module,
                "top_k": layer.top_k,
                "bytes": layer.record_bytes,
                "experts": [expert.to_json() for expert in layer.experts],
            }
            for layer in manifest.layers
        ],
        "made": dict(manifest.made),
    }


def _packages(manifest: Manifest) -> str:
    packages = manifest.made.get("packages")
    return ", ".join(f"{name} {version}" for name, version in packages.items()) if isinstance(packages, dict) else ""
