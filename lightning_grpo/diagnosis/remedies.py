"""Config patches: values of options computed from the run's own. Empty if the present value is not known."""

import math
from typing import Any

from lightning_grpo.diagnosis.history import History


def rounded(value: float) -> float:
    """The value with two significant digits."""
    return float(f"{value:.2g}")


def learning_rate(history: History, factor: float) -> dict[str, Any]:
    """The learning rate times ``factor``."""
    rate = history.option("model.optimizer.lr")
    if rate is None and (logged := history.series("learning_rate")):
        rate = float(logged.values.max())
    return {"model.optimizer.lr": rounded(rate * factor)} if rate else {}


def larger_groups(history: History) -> dict[str, Any]:
    """Twice as many completions per prompt, in micro-batches of the same size."""
    size = history.option("model.num_generations")
    accumulate = history.option("trainer.accumulate_grad_batches")
    if not size:
        return {}
    change = {"model.num_generations": 2 * size}
    return change | ({"trainer.accumulate_grad_batches": 2 * accumulate} if accumulate else {})


def larger_batch(history: History, factor: float) -> dict[str, Any]:
    """More prompts per optimizer step, by a power of two of at least ``factor`` and at most 8."""
    prompts = history.option("data.prompts_per_rollout")
    accumulate = history.option("trainer.accumulate_grad_batches")
    times = 2 ** min(3, max(1, math.ceil(math.log2(max(factor, 2)))))
    if not prompts or not accumulate:
        return {}
    return {"data.prompts_per_rollout": prompts * times, "trainer.accumulate_grad_batches": accumulate * times}


def longer_completions(history: History) -> dict[str, Any]:
    """Twice the limit of the completion's length."""
    limit = history.option("model.max_completion_length")
    return {"model.max_completion_length": 2 * limit} if limit else {}


def raised_beta(history: History) -> dict[str, Any]:
    """A KL penalty of at least 0.01, or three times the present one."""
    beta = history.option("model.objective.beta")
    if beta is None and history.option("model.objective.loss_type", "grpo") == "grpo":
        return {}  # the default of that loss_type is not 0
    return {"model.objective.beta": rounded(max(0.01, 3 * (beta or 0.0)))}


def epsilon_high(history: History) -> dict[str, Any]:
    """DAPO's upper clip range, if clipping has an effect and the range is lower."""
    present = history.option("model.objective.epsilon_high", history.option("model.objective.epsilon"))
    has_effect = history.last("clip_ratio/region_mean", 10).median > 0
    return {"model.objective.epsilon_high": 0.28} if has_effect and present is not None and present < 0.28 else {}
