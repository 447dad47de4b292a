"""What a checkpoint holds of the progress within a rollout, and how a run continues from it.

A run continues with the very micro-batch that was next. The number of ranks, micro_batch_size and
trainer.accumulate_grad_batches may have changed, if whole optimizer steps remain.
"""

import logging
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from lightning import Trainer
from torch import Tensor, distributed

from lightning_grpo.errors import RunError, UserError
from lightning_grpo.rollout import Rollout
from lightning_grpo.training.experience import Experience, redistribute
from lightning_grpo.training.pending import PendingRollout
from lightning_grpo.training.position import Position
from lightning_grpo.training.progress import Progress

log = logging.getLogger(__name__)

FIXED_WITHIN_A_ROLLOUT = ("data.prompts_per_rollout", "num_generations", "num_iterations")
"""The parts of a layout that must not change while a rollout is trained on."""


def save(checkpoint: dict[str, Any], progress: Progress, pending: PendingRollout | None, trainer: Trainer) -> None:
    """Write the rest of the rollout, on every rank, and the position of the data into ``checkpoint``.

    Within an optimizer step, whose accumulated gradients no checkpoint holds, the position is the start of that step.
    Call it on every rank.

    Raises:
        RunError: the optimizer is changing the weights.
    """
    if progress.mid_step:
        raise RunError("a checkpoint can't be saved while the optimizer changes the weights; save it after the step")
    batches = trainer.fit_loop.epoch_loop.batch_progress
    # Lightning counts an optimizer step, and moves its schedule, only some lines after the step was taken
    is_uncounted = batches.total.processed < batches.total.ready == progress.batches_at_commit
    if is_uncounted:
        unfinished = 0
    elif progress.micro_step != progress.committed:
        unfinished = (batches.current.ready - 1) % trainer.accumulate_grad_batches + 1
    else:
        unfinished = batches.total.ready - batches.total.processed
    steps = progress.steps_at_commit if is_uncounted else trainer.global_step
    position = Position.of(trainer, unfinished=unfinished, steps=steps)
    experience, data = progress.experience, trainer.datamodule
    checkpoint[type(data).__qualname__] = data.state_dict(unfinished, draw_again=experience is None)
    following = (experience.number if experience else progress.last_finished) + 1
    pending = pending if pending and pending.number == following else None
    own: dict[str, Any] = {"ahead": pending and pending.state_dict(wait=not trainer.interrupted)}
    if experience is not None:
        own |= {"experience": vars(experience), "micro_batches": progress.micro_batches}
    ranks: list[Any] = [own]
    if trainer.world_size > 1:
        ranks = [None] * trainer.world_size
        distributed.all_gather_object(ranks, own)
    checkpoint["global_step"], checkpoint["epoch"] = position.steps, position.epoch
    checkpoint["grpo"] = {
        "ranks": ranks,
        "layout": progress.layout(trainer),
        "position": position.state_dict(),
        "micro_step": progress.committed,
        "schedule_due": is_uncounted,
        "num_tokens": progress.num_tokens,
        "completion_tokens": progress.completion_tokens,
    }


def load(
    checkpoint: dict[str, Any],
    progress: Progress,
    trainer: Trainer,
    *,
    rollout_ahead: bool,
    rollout_class: type[Rollout],
    experience_class: type[Experience],
    contributions: Callable[[Tensor], Tensor],
) -> PendingRollout | None:
    """Restore what `save` wrote into a ``progress`` that was reset, and return the rollout that was sampled ahead.

    ``contributions`` computes this field of an `Experience`, which checkpoints of earlier versions lack.

    Raises:
        UserError: the checkpoint was saved within a rollout that the current options cannot continue.
    """
    state, layout = checkpoint["grpo"], progress.layout(trainer)
    progress.num_tokens = state["num_tokens"]
    progress.completion_tokens = state["completion_tokens"]
    progress.schedule_is_behind = state["schedule_due"]
    position = Position.from_state_dict(state["position"])
    if state["layout"] != layout:
        factor = _micro_batches_per_prompt(layout) / _micro_batches_per_prompt(state["layout"])
        position = position.scaled(factor, multiple=trainer.accumulate_grad_batches)
    position.write(checkpoint, trainer)
    if "experience" in state["ranks"][0]:
        for share in (rank["experience"] for rank in state["ranks"]):
            share.setdefault("contributions", contributions(share["rewards"]))
        shares = [experience_class(**share["experience"]) for share in state["ranks"]]
        _load_rollout(state, progress, shares, layout, trainer.global_rank)
    sampled = [rank["ahead"] for rank in state["ranks"]]
    fits = all(state["layout"][name] == layout[name] for name in ("ranks", *FIXED_WITHIN_A_ROLLOUT[:2]))
    if rollout_ahead and all(sampled) and fits:
        pending = PendingRollout.from_state_dict(sampled[trainer.global_rank], rollout_class)
        progress.last_finished = pending.number - 1
        return pending
    if any(sampled):
        log.warning("The rollout that was sampled ahead does not match this run's options and is sampled again")
    return None


def _load_rollout(
    state: Mapping[str, Any], progress: Progress, shares: list[Experience], layout: dict[str, int], rank: int
) -> None:
    """Continue within a rollout, in other micro-batches or on another number of ranks if these have changed."""
    saved = state["layout"]
    changed = [
        f"{name} {saved[name]} → {layout[name]}" for name in FIXED_WITHIN_A_ROLLOUT if saved[name] != layout[name]
    ]
    if changed:
        raise UserError(
            f"the checkpoint was saved in the middle of a rollout and {', '.join(changed)} since: the rest of the "
            "rollout can't be trained on. Resume with the earlier values, or from a checkpoint between two rollouts"
        )
    if saved == layout:
        progress.experience, progress.micro_batches = shares[rank], state["ranks"][rank]["micro_batches"]
        progress.micro_step = progress.committed = state["micro_step"]
        return
    trained = state["micro_step"] * saved["micro_batch_size"] * saved["ranks"]
    per_step = layout["micro_batch_size"] * layout["ranks"] * layout["trainer.accumulate_grad_batches"]
    if trained % per_step:
        raise UserError(
            f"the checkpoint was saved in the middle of a rollout, after optimizer steps on {trained} of its "
            f"completions; {trained} can't be divided into steps of micro_batch_size {layout['micro_batch_size']} × "
            f"trainer.accumulate_grad_batches {layout['trainer.accumulate_grad_batches']} × {layout['ranks']} ranks = "
            f"{per_step} completions. Set them so that a step takes as many as before, "
            f"{saved['micro_batch_size'] * saved['ranks'] * saved['trainer.accumulate_grad_batches']}, or resume from "
            "a checkpoint between two rollouts"
        )
    # the micro-batches are cut again when training starts and the weights to score with are loaded
    progress.experience = redistribute(shares, layout["ranks"], progress.num_generations)[rank]
    progress.micro_step = progress.committed = trained // (layout["micro_batch_size"] * layout["ranks"])


def _micro_batches_per_prompt(layout: dict[str, int]) -> Fraction:
    """Micro-batches of one rank per prompt of a rollout."""
    completions = layout["num_generations"] * layout["num_iterations"]
    return Fraction(completions, layout["micro_batch_size"] * layout["ranks"])
