"""``python -m calibration``: commands that look at data to decide."""

import typer

from calibration.plan_command import plan
from calibration.predictor.commands import predictor, sight
from calibration.sensitivity_command import sensitivity
from calibration.trace_command import trace

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def commands() -> None:
    """What looks at data to decide."""


app.command("trace")(trace)
app.command("sensitivity")(sensitivity)
app.command("plan")(plan)
app.command("sight")(sight)
app.command("predictor")(predictor)


if __name__ == "__main__":
    app(prog_name="python -m calibration")
