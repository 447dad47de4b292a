"""What two processes train in `test_resume_ranks`; run by torch.distributed.run, once for all of its tests."""

import sys
from pathlib import Path

import torch
from engines import CopyEngine
from fitting import Record, checksum, data, fit, module, parameters
from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_grpo import GRPOModule
from lightning_grpo.export import Export
from lightning_grpo.monitor.checkpoint import Checkpoint
from lightning_grpo.objective import ObjectiveConfig
from lightning_grpo.policy.load import LoRA, load_policy
from lightning_grpo.rollout import RolloutCallback
from lightning_grpo.rollout.callback import eos_token_ids

STEPS = 5
LOGGED = ("loss", "reward", "grad_norm", "kl", "num_tokens", "learning_rate")


def run(
    folder: Path, model: str, *, micro_batch_size: int, accumulate: int, resume: Path | None = None, **options
) -> tuple[Record, GRPOModule]:
    """Rollouts of two optimizer steps of 16 completions; a checkpoint after each step in ``folder``."""
    changes = {k: options.pop(k) for k in ("lora",) if k in options}
    policy = module(
        model, rewards=[checksum], micro_batch_size=micro_batch_size, objective=ObjectiveConfig(beta=0.05),
        lr_schedule="linear", **changes,
    )  # fmt: skip
    checkpoint = Checkpoint(str(folder), every_n_train_steps=1, save_top_k=-1)
    record = fit(
        folder.parent, policy, data(), steps=STEPS, accumulate=accumulate, ckpt_path=resume and str(resume),
        callbacks=[checkpoint, Export()], enable_checkpointing=True, **options,
    )  # fmt: skip
    return record, policy


def saved(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}.ckpt"


def whole(policy: GRPOModule) -> dict[str, torch.Tensor]:
    """All of the parameters, gathered from the ranks."""
    held = parameters(policy)
    return {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in held.items()}


class Apart(RolloutCallback):
    """An engine with a whole model of its own, as a sharded policy needs it."""

    def build_engine(self, trainer, pl_module):
        eos = eos_token_ids(pl_module.policy, pl_module.tokenizer)
        return CopyEngine(load_policy(pl_module.model_path), eos_token_ids=eos, pad_id=0)


def sharded(root: Path, model: str) -> None:
    """Under FSDP2, adapters and whole weights, as shards and as one file: resumed exactly at every step."""
    for lora, shards in ((LoRA(rank=4), True), (LoRA(rank=4), False), (None, True), (None, False)):
        folder = root / f"{'adapters' if lora else 'whole'}-{'shards' if shards else 'file'}"

        def train(name: str, resume: Path | None = None, folder=folder, lora=lora, shards=shards):
            strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=shards)
            return run(
                folder / name, model, micro_batch_size=8, accumulate=1, resume=resume, lora=lora, strategy=strategy,
                devices=2, rollout=Apart(),
            )  # fmt: skip

        record, policy = train("all")
        ended = whole(policy)
        for step in (1, 2) if lora else (1,):
            resumed, other = train(f"from-{step}", saved(folder / "all", step))
            for name in LOGGED:
                assert resumed[name] == record[name][step:], (folder.name, step, name, resumed[name], record[name])
            assert all(torch.equal(p, ended[name]) for name, p in whole(other).items()), (folder.name, step)


def replicated(root: Path, model: str) -> None:
    """With DDP, from the start and from each checkpoint of one rank."""
    ddp = {"micro_batch_size": 4, "accumulate": 2, "strategy": "ddp", "devices": 2}
    run(root / "two", model, **ddp)
    results = {}
    for step in range(1, STEPS):
        record, policy = run(root / f"two-from-{step}", model, resume=saved(root / "one", step), **ddp)
        results[step] = {"logged": {name: record[name] for name in LOGGED}, "parameters": parameters(policy)}
    if policy.trainer.global_rank == 0:
        torch.save(results, root / "two-from-one.pt")


if __name__ == "__main__":
    root, model = sys.argv[1:]
    replicated(Path(root), model)
    sharded(Path(root), model)
