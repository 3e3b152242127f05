"""From trained weights to an ordinary model folder: `python -m calibration.shipped.assemble KIND PARTS OUT`."""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from calibration.shipped.architecture import KINDS, build_model, save_processor
from expertflow_quant.models.processor import load_processor


def assemble(kind: str, parts: Path, processor_folder: Path, out: Path) -> int:
    """Write the bfloat16 model that the KIND-*.safetensors of `parts` hold; returns its parameters' number."""
    processor = load_processor(processor_folder)
    model = build_model(kind, processor).to(torch.bfloat16)
    weights = {}
    for file in sorted(parts.glob(f"{kind}-[0-9].safetensors")):
        weights |= load_file(file)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = {"lm_head.weight"}
    if set(missing) - tied or unexpected:
        raise ValueError(f"{parts}: not the weights of a {kind}: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    model.save_pretrained(out)
    save_processor(processor, out)
    for file in out.glob("*.json"):
        file.write_text(json.dumps(json.loads(file.read_text()), indent=2, ensure_ascii=False) + "\n")
    return sum(p.numel() for p in model.parameters())


def main() -> None:
    """Assemble one model."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("parts", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--processor", type=Path, required=True)
    args = parser.parse_args()
    count = assemble(args.kind, args.parts, args.processor, args.out)
    print(f"{args.out}: {count / 1e6:.2f} M parameters")


if __name__ == "__main__":
    main()
