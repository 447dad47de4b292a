"""The arithmetic between prompts, completions, micro-batches and optimizer steps."""

import math

from lightning_grpo.errors import UserError


def divisors(n: int) -> list[int]:
    """Divisors of ``n``, ascending."""
    small = [i for i in range(1, math.isqrt(n) + 1) if n % i == 0]
    return sorted({*small, *(n // i for i in small)})


def _nearest(value: int, allowed: list[int], count: int = 4) -> str:
    near = sorted(sorted(allowed, key=lambda a: (abs(a - value), a))[:count])
    return " or ".join(map(str, near))


def steps_per_rollout(*, samples: int, micro_batch_size: int, num_iterations: int = 1, ranks: int = 1) -> int:
    """Micro-batches that one rank trains on per rollout: N · num_iterations / (ranks · micro_batch_size)."""
    return samples * num_iterations // (ranks * micro_batch_size)


def check_batch_arithmetic(
    *,
    prompts_per_rollout: int,
    num_generations: int,
    micro_batch_size: int,
    accumulate_grad_batches: int = 1,
    num_iterations: int = 1,
    ranks: int = 1,
) -> int:
    """Return `steps_per_rollout` if all numbers divide.

    Args:
        prompts_per_rollout: B, over all ranks.
        num_generations: G; N = B · G.
        micro_batch_size: completions per forward and backward on one rank.
        accumulate_grad_batches: micro-batches per optimizer step (Lightning's own meaning).
        num_iterations: passes over a rollout (μ).
        ranks: data-parallel processes.

    Raises:
        UserError: a number does not divide; the message names the option and the nearest values that do.
    """
    numbers = {
        "prompts_per_rollout": prompts_per_rollout,
        "num_generations": num_generations,
        "micro_batch_size": micro_batch_size,
        "accumulate_grad_batches": accumulate_grad_batches,
        "num_iterations": num_iterations,
        "ranks": ranks,
    }
    for name, value in numbers.items():
        if value < 1:
            raise UserError(f"{name} is {value}; set 1 or more")
    if prompts_per_rollout % ranks:
        below = prompts_per_rollout // ranks * ranks
        near = [b for b in (below, below + ranks) if b]
        raise UserError(
            f"prompts_per_rollout is {prompts_per_rollout}, which does not divide by {ranks} ranks; "
            f"set {' or '.join(map(str, near))}"
        )
    local = prompts_per_rollout * num_generations // ranks
    if local % micro_batch_size:
        raise UserError(
            f"micro_batch_size is {micro_batch_size}, but a rank has {local} completions per rollout "
            f"(prompts_per_rollout {prompts_per_rollout} × num_generations {num_generations} / {ranks} "
            f"rank{'s' * (ranks > 1)}), which it does not divide; set micro_batch_size to "
            f"{_nearest(micro_batch_size, divisors(local))}"
        )
    one_pass = local // micro_batch_size
    if one_pass % accumulate_grad_batches:
        raise UserError(
            f"accumulate_grad_batches is {accumulate_grad_batches}, but one pass over a rollout is {one_pass} "
            f"micro-batches per rank ({local} completions / micro_batch_size {micro_batch_size}), which it does not "
            "divide, so an optimizer step would span two passes; set accumulate_grad_batches to "
            f"{_nearest(accumulate_grad_batches, divisors(one_pass))}"
        )
    return steps_per_rollout(
        samples=prompts_per_rollout * num_generations,
        micro_batch_size=micro_batch_size,
        num_iterations=num_iterations,
        ranks=ranks,
    )
