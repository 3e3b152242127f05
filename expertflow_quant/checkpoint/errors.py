"""What goes wrong with files: the checkpoint's branch of the error family."""

from expertflow_quant.formats.errors import ExpertFlowError


class CheckpointError(ExpertFlowError):
    """A file of a checkpoint is missing, damaged, unknown or cannot be written: names file, rule and
    remedy."""


class ResumeError(CheckpointError):
    """The output folder holds something that this run must not continue or replace."""
