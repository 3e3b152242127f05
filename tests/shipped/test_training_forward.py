"""The training forward computes what the transformers classes compute."""

import pytest
import torch

from calibration.shipped import feed, forward
from calibration.shipped.architecture import build_model, build_processor
from expertflow_quant.samples import make_sheet
from expertflow_quant.samples.item import SUFFIX


@pytest.fixture(scope="module")
def processor():
    return build_processor(sheets=40)


@pytest.mark.parametrize("kind", ["moe", "dense", "dense-total"])
def test_hidden_logits_equal_the_ordinary_model(kind, processor):
    torch.manual_seed(0)
    model = build_model(kind, processor).eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.data.normal_(0, 0.05)
    layout = feed.Layout(2)
    out = layout.arrays(bytearray(layout.nbytes))
    feed.fill(feed.Encoder(processor.tokenizer), "train", "equal", out)
    c = forward.constants(model, processor, "cpu")
    params = {k: v.detach() for k, v in model.named_parameters()}
    with torch.no_grad():
        _, cells, deep = forward.tower(params, torch.from_numpy(out["image"]), c, forward.vision_block)
        tokens = torch.from_numpy(out["tokens"]).long()
        hidden, _ = forward.decoder(params, tokens, cells, deep, c, forward.attention, forward.experts_dense)
        logits = hidden @ params["model.language_model.embed_tokens.weight"].T
    for row in range(2):
        sheet = make_sheet(feed.TASKS[row], "train", f"equal/{row}")
        for slot in (0, 3):
            ids = tokens[row, slot * feed.SLOT : (slot + 1) * feed.SLOT]
            ids = ids[ids != processor.tokenizer.pad_token_id]
            text = processor.tokenizer.decode(ids)
            question = text.split(SUFFIX[sheet.task])[0]
            answer = text.split("assistant\n")[1].removesuffix("<|im_end|>")
            content = [{"type": "image"}, {"type": "text", "text": question + SUFFIX[sheet.task]}]
            chat = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
            prompt = processor.apply_chat_template(chat)
            inputs = processor(text=[prompt], images=[sheet.canvas.image], return_tensors="pt")
            with torch.no_grad():
                expected = model(**inputs).logits[0]
            prefix = c["prefix"].shape[1]
            assert inputs["input_ids"][0, :prefix].tolist() == c["prefix"][0].tolist()
            assert inputs["input_ids"][0, prefix : prefix + len(ids)].tolist() == ids.tolist()
            ours = logits[row, slot * feed.SLOT : slot * feed.SLOT + len(ids)]
            torch.testing.assert_close(ours, expected[prefix : prefix + len(ids)], rtol=1e-4, atol=1e-4)


def test_labels_are_the_answers_with_their_end(processor):
    layout = feed.Layout(4)
    out = layout.arrays(bytearray(layout.nbytes))
    feed.fill(feed.Encoder(processor.tokenizer), "train", "labels", out)
    for row in range(4):
        sheet = make_sheet(feed.TASKS[row % 2], "train", f"labels/{row}")
        answers = {q.answers[0] for q in sheet.questions} | {feed.transcript(sheet)}
        used = out["label"][row] >= 0
        told = processor.tokenizer.decode(out["label"][row][used]).split("<|im_end|>")
        assert len(told) >= 5
        cut = told[:-1] if told[-1] == "" else told
        assert all(any(answer.startswith(text) for answer in answers) for text in cut)
        following = out["tokens"][row][out["label_at"][row][used] + 1]
        inside = (out["label_at"][row][used] + 1) % feed.SLOT != 0
        assert (following == out["label"][row][used])[inside].all()


def random_experts():
    """Hidden states, a router's weight, gate/up and down of 16 experts."""
    torch.manual_seed(1)
    return torch.randn(64, 32), torch.randn(16, 32), torch.randn(16, 48, 32) * 0.2, torch.randn(16, 32, 24) * 0.2


def test_dense_experts_are_those_of_a_loop():
    y, gate, gate_up, down = random_experts()
    weights, index, _ = forward.route(y, gate)
    slow = torch.zeros_like(y)
    for t in range(len(y)):
        for w, e in zip(weights[t], index[t], strict=True):
            slow[t] += w * (down[e] @ forward.gated(gate_up[e] @ y[t]))
    torch.testing.assert_close(forward.experts_dense(y, gate, gate_up, down)[0], slow, rtol=1e-4, atol=1e-4)


@pytest.mark.cuda
def test_grouped_and_dense_experts_agree():
    parts = [t.cuda().bfloat16().requires_grad_() for t in random_experts()]
    a, b = forward.experts_grouped(*parts)[0], forward.experts_dense(*parts)[0]
    torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)
