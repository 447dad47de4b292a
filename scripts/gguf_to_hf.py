"""Convert a GGUF file to a Hugging Face checkpoint: ``python scripts/gguf_to_hf.py FILE.gguf FOLDER``."""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def convert(source: Path, target: Path) -> None:
    """Dequantize ``source`` to bfloat16 and save model and tokenizer, chat template included, into ``target``."""
    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Convert a GGUF file to a Hugging Face checkpoint (bfloat16).")
    parser.add_argument("source", type=Path, help="the .gguf file")
    parser.add_argument("target", type=Path, help="folder to write")
    args = parser.parse_args()
    if not args.source.is_file():
        parser.error(f"{args.source} is not a file")
    convert(args.source, args.target)
    print(f"{args.target}: {', '.join(sorted(p.name for p in args.target.iterdir()))}")


if __name__ == "__main__":
    main()
