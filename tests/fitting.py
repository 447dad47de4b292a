"""How the tests train: a tiny model, letters to repeat, the Hugging Face engine, a few optimizer steps."""

from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from lightning_grpo import GRPOModule, PromptDataModule
from lightning_grpo.objective import ObjectiveConfig, RolloutCorrection
from lightning_grpo.rewards import PrefixMatch
from lightning_grpo.rollout import Completion, HFRollout, Rollout, RolloutCallback
from lightning_grpo.training.experience import Experience


class Record(Callback):
    """Keeps what each optimizer step logged."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step > len(self.steps) + self.first:
            self.steps.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.first = trainer.global_step

    def __getitem__(self, name: str) -> list[float]:
        return [step[name] for step in self.steps]


def checksum(completion_ids: list[list[int]]) -> list[float]:
    """A reward with spread in nearly every group."""
    return [sum(ids) % 7 / 6 for ids in completion_ids]


AHEAD = {
    "rollout_ahead": 1,
    "objective": ObjectiveConfig(rollout_correction=RolloutCorrection()),
    "rewards": [checksum],
}


def module(model: str, kind: type[GRPOModule] = GRPOModule, **changes: Any) -> GRPOModule:
    """Eight prompts × four completions of at most six tokens."""
    settings: dict[str, Any] = {
        "rewards": [PrefixMatch()],
        "num_generations": 4,
        "micro_batch_size": 8,
        "max_prompt_length": 8,
        "max_completion_length": 6,
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0),
    }
    return kind(model, **settings | changes)


def data(**changes: Any) -> PromptDataModule:
    return PromptDataModule("letters", **{"size": 26, "prompts_per_rollout": 8, "seed": 1} | changes)


def fit(
    root: Path,
    policy: GRPOModule,
    prompts: PromptDataModule | None = None,
    *,
    steps: int = 3,
    accumulate: int = 4,
    ckpt_path: str | None = None,
    callbacks: list[Callback] | None = None,
    rollout: RolloutCallback | None = None,
    **trainer: Any,
) -> Record:
    """Train ``policy`` and return what was logged."""
    record = Record()
    settings: dict[str, Any] = {
        "max_steps": steps,
        "max_epochs": -1,
        "accumulate_grad_batches": accumulate,
        "limit_val_batches": 0,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "devices": 1,
        "default_root_dir": root,
    }
    Trainer(**settings | trainer, callbacks=[rollout or HFRollout(), record, *(callbacks or [])]).fit(
        policy, datamodule=prompts or data(), ckpt_path=ckpt_path
    )
    return record


def done(*ids):
    return Completion(token_ids=list(ids), logprobs=[-1.0] * len(ids), finish_reason="stop", versions=[0] * len(ids))


def experience(lengths, advantages, G):
    """Prompt i has i + 1 tokens of id i + 10; a completion of n tokens has n ids of 5."""
    prompts = [[i + 10] * (i + 1) for i in range(len(lengths) // G)]
    groups = [[done(*[5] * n) for n in lengths[i * G : (i + 1) * G]] for i in range(len(prompts))]
    rollout = Rollout.collate(prompts, groups, pad_id=0)
    return Experience(
        **vars(rollout), number=0, rewards=torch.zeros(len(lengths), 1), advantages=torch.tensor(advantages)
    )


def parameters(policy: GRPOModule) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in policy.policy.named_parameters()}


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)
