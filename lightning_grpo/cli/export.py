"""``lightning-grpo export``: the policy of a checkpoint as a Hugging Face folder or a PEFT adapter."""

import argparse
from collections.abc import Sequence


def parser() -> argparse.ArgumentParser:
    """The options."""
    out = argparse.ArgumentParser(
        prog="lightning-grpo export",
        description="Write the policy of a checkpoint as a folder that transformers, PEFT and vLLM load: weights in "
        "safetensors files, config, generation config, tokenizer, chat template and a model card. Needs no GPU.",
        epilog="Example: lightning-grpo export runs/quickstart my_model && vllm serve my_model",
    )
    add = out.add_argument
    add(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a .ckpt file, or the folder of a sharded checkpoint; the folder of a run (trainer.default_root_dir) or "
        "last (the default folder, runs) for the newest checkpoint there",
    )
    add("out", metavar="OUT", help="folder to write; it appears once it is complete")
    kind = out.add_mutually_exclusive_group()
    kind.add_argument(
        "--merge",
        action="store_true",
        help="for LoRA: write whole weights, the adapter merged into the base model",
    )
    kind.add_argument("--adapter", action="store_true", help="for LoRA: write the adapter alone (the default)")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="round the weights to this type (default: the type of the trained parameters, without rounding. Engines "
        "compute in bfloat16, which is half the size of float32)",
    )
    add(
        "--model",
        metavar="PATH",
        help="folder or hub name of the base model (default: the one that the checkpoint records)",
    )
    add("--revision", metavar="REVISION", help="branch, tag or commit of --model on the hub")
    add("--trust_remote_code", action="store_true", help="run Python code that comes with the base model")
    add("--overwrite", action="store_true", help="replace a model that OUT holds already")
    add(
        "--push_to_hub",
        metavar="REPO",
        help="also upload the folder to this repository of the Hugging Face hub (OWNER/NAME); a private one is created "
        "if there is none. The token is read from HF_TOKEN",
    )
    return out


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    arguments = parser().parse_args(argv)
    # after the options are read: torch and transformers take seconds to import
    from lightning_grpo.errors import UserError
    from lightning_grpo.export.folder import export
    from lightning_grpo.export.hub import hub_token, push
    from lightning_grpo.policy.pretrained import Pretrained

    model, trust = None, arguments.trust_remote_code
    if arguments.model is not None:
        model = Pretrained(name=arguments.model, revision=arguments.revision, trust_remote_code=trust)
    elif arguments.revision is not None:
        raise UserError("--revision is set, but not --model, whose revision it would be; set both")
    token = hub_token() if arguments.push_to_hub else None
    exported = export(
        arguments.checkpoint,
        arguments.out,
        merge=arguments.merge or (False if arguments.adapter else None),
        dtype=arguments.dtype,
        model=model,
        trust_remote_code=trust,
        overwrite=arguments.overwrite,
    )
    print(f"{'adapter' if exported.is_adapter else 'model'}: {exported.folder}\nuse it: {exported.next_command()}")
    if token:
        print(f"uploaded: {push(exported.folder, arguments.push_to_hub, token)}")
