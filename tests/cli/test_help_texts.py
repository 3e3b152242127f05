"""Help texts arrive whole: rich takes words in square brackets for markup and drops them."""

import pytest
import typer
from rich.text import Text

from calibration.__main__ import app as calibration
from eval.__main__ import app as evaluation
from expertflow_quant.cli.main import app as library


@pytest.mark.parametrize("app", [library, calibration, evaluation])
def test_no_word_of_a_help_text_is_lost(app: typer.Typer) -> None:
    commands = list(typer.main.get_group(app).commands.values())
    assert len(commands) > 3
    texts = [getattr(option, "help", None) or "" for command in commands for option in command.params]
    texts += [command.help or "" for command in commands]
    assert sum(map(len, texts)) > 500
    for text in texts:
        assert Text.from_markup(text).plain == text
