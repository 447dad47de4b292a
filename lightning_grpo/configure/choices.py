"""Every option of a run, with its reason, before memory is considered."""

import importlib.util
from typing import Literal

from lightning_grpo.configure import recommendations
from lightning_grpo.configure.prompts import PromptStatistics
from lightning_grpo.configure.recommendations import BASELINES, FIXED, TASKS, Choice
from lightning_grpo.configure.shape import ModelShape
from lightning_grpo.devices import GB, Hardware
from lightning_grpo.errors import UserError
from lightning_grpo.processor import GAIN

FORMER_PRESETS: dict[str, Literal["recommended", "baseline"]] = {"classic": "baseline", "evidence": "recommended"}
"""Former names of ``--preset``, accepted until 0.3."""


def choose(
    task: str,
    preset: str,
    shape: ModelShape,
    hardware: Hardware,
    ranks: int,
    lora: bool,
    statistics: PromptStatistics | None,
) -> dict[str, Choice]:
    """Return the choice for each option."""
    usual = TASKS[task]
    length = Choice(usual.max_prompt_length, "usual for the task; longer prompts are dropped")
    if statistics:
        method = "counted" if statistics.counted else "estimated from characters"
        longest = -(-statistics.longest // 16) * 16
        length = Choice(
            longest, f"the longest of {statistics.count} prompts ({method}), rounded up to a multiple of 16"
        )
    precision = _precision(hardware, lora)
    choices = {
        "num_generations": usual.num_generations,
        "prompts_per_rollout": _prompts_per_rollout(hardware, ranks, statistics),
        "max_prompt_length": length,
        "max_completion_length": usual.max_completion_length,
        "beta": usual.beta,
        "learning_rate": recommendations.learning_rate(shape, lora),
        "gradient_clip_val": recommendations.gradient_clip_val(lora),
        **FIXED,
        **precision,
        "optimizer": Choice("adamw", "Adam with decoupled weight decay"),
        "engine": _engine(hardware, precision["precision"].value),
        "gradient_checkpointing": Choice(False, "not needed, since the activations fit"),
        "seed": Choice(0, "any seed; it determines the samples"),
    }
    if lora:
        choices["lora_rank"] = recommendations.lora_rank()
    if preset == "baseline":
        choices |= _baseline(task, hardware, ranks)
    elif preset != "recommended":
        raise UserError(f"--preset {preset}: unknown preset; set recommended or baseline")
    return choices


def _prompts_per_rollout(hardware: Hardware, ranks: int, statistics: PromptStatistics | None) -> Choice:
    usual = recommendations.prompts_per_rollout(hardware.is_cpu, ranks)
    if statistics is None or statistics.count >= usual.value:
        return usual
    largest = statistics.count // ranks * ranks
    if not largest:
        raise UserError(f"--prompts has {statistics.count} rows, fewer than the {ranks} ranks; each rank needs one")
    return Choice(largest, f"the largest number that {ranks} ranks can share evenly of {statistics.count} prompts")


def _baseline(task: str, hardware: Hardware, ranks: int) -> dict[str, Choice]:
    if task not in BASELINES:
        raise UserError(
            f"--preset baseline has no values for {task}, only for {', '.join(BASELINES)}; leave --preset out"
        )
    baseline = BASELINES[task]
    choices = {name: Choice(value, "baseline preset") for name, value in baseline.items()}
    group, prompts = baseline["num_generations"], 8
    why = "baseline preset: one group per micro-batch"
    if hardware.memory < 23.5 * GB:
        group, prompts = group // 2, prompts * 2
        why = "baseline preset below 24 GB: num_generations halved, accumulation doubled"
    choices["num_generations"] = Choice(group, why)
    choices["micro_batch_size"] = Choice(group, why)
    # one group per rank and micro-batch: more ranks replace accumulation
    accumulate = -(-prompts // ranks)
    if ranks > 1:
        why = f"{why}; divided over {ranks} ranks"
    choices["prompts_per_rollout"] = Choice(accumulate * ranks, why)
    choices["accumulate_grad_batches"] = Choice(accumulate, why)
    return choices


def _precision(hardware: Hardware, lora: bool) -> dict[str, Choice]:
    if not hardware.bf16:
        precision = Choice("16-mixed", "this card does not support bfloat16", "", "needs a loss scale")
    elif hardware.is_cpu and hardware.flops < GAIN * hardware.flops_fp32:
        precision = Choice("32-true", "bfloat16 is not faster on this processor")
    else:
        precision = Choice("bf16-mixed", "matrix products in bfloat16, everything else in float32")
    if lora:
        dtypes = {"16-mixed": "float16", "32-true": "float32", "bf16-mixed": "bfloat16"}
        dtype = Choice(dtypes[precision.value], "the weights are frozen; the adapters are float32")
    else:
        dtype = Choice(
            "float32",
            "in bfloat16, steps with learning rates of 1e-6 to 1e-5 are mostly lost to rounding (neighboring values "
            "around 0.05 are 2e-4 apart)",
            "",
            "16 bytes per parameter in total, compared to 8",
        )
    return {"precision": precision, "dtype": dtype}


def _engine(hardware: Hardware, precision: str) -> Choice:
    if hardware.is_cpu and precision == "32-true":
        return Choice("hf", "in float32 on a CPU, the policy samples as fast as vLLM and needs no copy of the weights")
    if not hardware.is_cpu or importlib.util.find_spec("vllm"):
        return Choice("vllm", "generation takes most of the time, and vLLM is the fastest engine")
    return Choice("hf", "vLLM is not installed here, so the policy itself samples", "", "slower than vLLM")
