"""Answer questions with nothing but transformers: plain_answers.py MODEL QUESTIONS [--declare-operators]

QUESTIONS is a JSON list of {"image": path, "prompt": text, "max_new_tokens": n}; prints one JSON object.
Run as a program of its own by test_shipped_models.py, so that none of this repository's code is loaded.
"""

import json
import sys

import torch

if "--declare-operators" in sys.argv:
    # A CUDA build of torchvision cannot load its operators beside a CPU torch and won't import without them.
    # The processor needs only its image transforms, which are Python.
    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.processing_utils import ProcessorMixin

model_path, questions_path = sys.argv[1:3]
with open(questions_path, encoding="utf-8") as file:
    questions = json.load(file)

processor = AutoProcessor.from_pretrained(model_path)
assert isinstance(processor, ProcessorMixin), f"only a {type(processor).__name__}: it would ignore the images"
model, report = AutoModelForImageTextToText.from_pretrained(model_path, dtype=torch.float32, output_loading_info=True)
for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
    assert not report[kind], (kind, report[kind])

answers = []
for question in questions:
    content = [
        {"type": "image", "image": Image.open(question["image"]).convert("RGB")},
        {"type": "text", "text": question["prompt"]},
    ]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.inference_mode():
        tokens = model.generate(**inputs, max_new_tokens=question["max_new_tokens"], do_sample=False)
    answers.append(processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

ours = sorted(name for name in sys.modules if name.split(".")[0] in ("expertflow_quant", "calibration", "eval"))
assert not ours, ours
print(json.dumps({"class": type(model).__name__, "answers": answers}))
