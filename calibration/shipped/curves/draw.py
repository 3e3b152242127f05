"""Draw the shipped models' learning curves: `python -m calibration.shipped.curves.draw`."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

HERE = Path(__file__).parent


def entries(name: str, stage: str) -> list[dict]:
    """The logged entries of one run's stage."""
    lines = [json.loads(line) for line in (HERE / f"{name}.jsonl").read_text().splitlines()]
    return [line for line in lines if line["stage"] == stage]


def main() -> None:
    """Write curves.png beside the logs."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    for name, color in (("moe", "tab:blue"), ("dense", "tab:orange"), ("dense-total", "tab:green")):
        joint = entries(name, "joint")
        steps = [e["step"] for e in joint]
        left.plot(steps, [e["losses"][1] for e in joint], color=color, marker=".", label=name)
        for task, style in (("chart", "-"), ("document", "--")):
            shares = [100 * e["exact"][task] for e in joint]
            right.plot(steps, shares, style, color=color, marker=".", label=f"{name}, {task}s")
    left.set(title="Answers' loss", xlabel="joint step (256 pictures)", ylabel="cross entropy", yscale="log")
    right.set(title="Held-out answers, every token right", xlabel="joint step (256 pictures)", ylabel="%")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(HERE / "curves.png", dpi=110)


if __name__ == "__main__":
    main()
