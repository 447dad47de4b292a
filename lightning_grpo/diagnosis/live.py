"""What the callback reads from a running training: options, facts and samples."""

from typing import Any

from lightning import Trainer

from lightning_grpo.diagnosis.history import Row
from lightning_grpo.diagnosis.inputs import sampled_tokens
from lightning_grpo.module import GRPOModule
from lightning_grpo.record.rows import SampleTables
from lightning_grpo.training.experience import Experience


def options_of(trainer: Trainer, module: GRPOModule) -> dict[str, Any]:
    """The options that rules read and change, by their path on the command line."""
    data, objective = trainer.datamodule, module.objective
    groups = trainer.optimizers[0].param_groups if trainer.optimizers else []
    return {
        "model.optimizer.lr": max((float(g.get("initial_lr", g["lr"])) for g in groups), default=None),
        "model.num_generations": module.num_generations,
        "model.max_completion_length": module.max_completion_length,
        "model.validation_generations": module.evaluation.num_generations,
        "model.dtype": module.dtype_name,
        "model.objective.loss_type": objective.loss_type,
        "model.objective.beta": objective.resolved.beta,
        "model.objective.epsilon": objective.epsilon,
        "model.objective.epsilon_high": objective.epsilon_high,
        "model.objective.entropy_coef": objective.entropy_coef,
        "model.objective.rollout_correction": objective.rollout_correction,
        "data.prompts_per_rollout": data.prompts_per_rollout,
        "data.validation_size": len(getattr(data, "validation", ())),
        "trainer.accumulate_grad_batches": trainer.accumulate_grad_batches,
        "trainer.gradient_clip_val": trainer.gradient_clip_val,
    }


def info_of(module: GRPOModule) -> dict[str, Any]:
    """Facts about the run that are no options."""
    return {"reward_names": module.reward_names, "completions_per_step": module.completions_per_step}


def rows_of(experience: Experience, rows: slice, step: int, trainer: Trainer) -> list[Row]:
    """The completions in ``rows`` of this rank's experience, as they are recorded with their log-probs."""
    table = SampleTables.of(trainer, logprobs=True).table(experience, rows, step)
    return [sampled_tokens(row) for row in table.to_pylist()]
