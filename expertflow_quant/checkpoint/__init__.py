"""The checkpoint folder: its format, written layer by layer, read by mapping. The format stands in
``writer``."""

from expertflow_quant.checkpoint.errors import CheckpointError, ResumeError
from expertflow_quant.checkpoint.manifest import ExpertEntry, FileEntry, LayerEntry, Manifest
from expertflow_quant.checkpoint.plan import Plan
from expertflow_quant.checkpoint.reader import CheckpointReader
from expertflow_quant.checkpoint.writer import CheckpointWriter

__all__ = [
    "CheckpointError",
    "CheckpointReader",
    "CheckpointWriter",
    "ExpertEntry",
    "FileEntry",
    "LayerEntry",
    "Manifest",
    "Plan",
    "ResumeError",
]
