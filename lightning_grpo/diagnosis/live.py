"""What the callback reads from a running training: options, facts and samples."""

from collections.abc import Sequence
from typing import Any

from lightning import Trainer

from lightning_grpo.diagnosis.history import Row
from lightning_grpo.module import GRPOModule
from lightning_grpo.objective import total_rewards
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


def info_of(trainer: Trainer, module: GRPOModule) -> dict[str, Any]:
    """Facts about the run that are no options."""
    size = module.micro_batch_size * trainer.accumulate_grad_batches * module.data_ranks
    return {"reward_names": module.reward_names, "completions_per_step": size}


def rows_of(experience: Experience, places: Sequence[int], step: int, trainer: Trainer) -> list[Row]:
    """The completions at ``places`` of this rank's experience, as `Row`."""
    module: Any = trainer.lightning_module
    groups = {"num_replicas": 1, "rank": 0} | (trainer.distributed_sampler_kwargs or {})
    totals = total_rewards(experience.rewards, module.reward_weights).tolist()
    rows = []
    for place in places:
        group, index = divmod(place, module.num_generations)
        mask, advantages = experience.completion_mask[place], experience.advantages[place]
        logprobs = {"engine": experience.rollout_logprobs, "trainer": experience.old_logprobs}
        rows.append(
            {
                "step": step,
                "rollout": experience.number,
                "group": group * groups["num_replicas"] + groups["rank"],
                "index": index,
                "completion_ids": experience.completion_ids[place][mask].tolist(),
                "truncated": bool(experience.truncated[place]),
                "reward": totals[place],
                "advantage": float(advantages[mask].mean() if advantages.dim() else advantages),
                **{f"{name}_logprobs": x[place][mask].tolist() for name, x in logprobs.items() if x is not None},
            }
        )
    return rows
