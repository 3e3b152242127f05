"""The shipped model, quantized and served: a public client reads charts and documents through it."""

import shutil
from pathlib import Path

import pytest

import expertflow_quant
from eval.metrics import anls, relaxed_accuracy
from expertflow_quant.samples import make_items

pytest.importorskip("openai")

SHIPPED = Path(__file__).parents[2] / "calibration" / "shipped" / "moe"
ITEMS = 12


@pytest.fixture
def server(serve, tmp_path):
    if not (SHIPPED / "config.json").is_file():
        pytest.skip(f"no trained model in {SHIPPED}: train it with calibration.shipped")
    expertflow_quant.quantize_model(SHIPPED, tmp_path / "out", method="rtn", plan="int8-g32")
    yield serve(expertflow_quant.load(tmp_path / "out", expert_memory="25%"), "shipped")
    shutil.rmtree(tmp_path / "out")


@pytest.fixture
def ask(server, about, data_url):
    def send(item):
        stream = server.client.chat.completions.create(
            model="shipped",
            messages=about(item.prompt, data_url(item.image)),
            max_tokens=item.max_new_tokens,
            stream=True,
        )
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    return send


def test_charts_and_documents_are_read_through_the_server(server, ask):
    charts = make_items("chart", "test", ITEMS, seed=11)
    documents = make_items("document", "test", ITEMS, seed=11)
    right = [relaxed_accuracy(ask(item), item.answers[0]) for item in charts]
    near = [anls(ask(item), list(item.answers)) for item in documents]
    assert sum(right) >= 3 / 4 * ITEMS, right
    assert sum(near) >= 3 / 4 * ITEMS, near
    own = server.engine.generate([charts[0].messages], max_new_tokens=charts[0].max_new_tokens)[0]
    assert ask(charts[0]) == own.text
