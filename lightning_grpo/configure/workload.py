"""The numbers of a run that determine its memory and its time."""

from dataclasses import dataclass
from typing import Literal, cast

import torch

from lightning_grpo.configure.shape import ModelShape
from lightning_grpo.policy.load import compute_dtype_of
from lightning_grpo.policy.lora import LoRA
from lightning_grpo.training.batching import steps_per_rollout

Precision = Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true"]
Optimizer = Literal["adamw", "adamw_8bit", "sgd"]
Dtype = Literal["float32", "bfloat16", "float16"]
EngineKind = Literal["hf", "vllm", "remote"]

STATE_BYTES = {"adamw": 8.0, "adamw_8bit": 2.06, "sgd": 0.0}
"""Bytes of optimizer state per trained parameter of 4 bytes."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One GRPO run. Lengths are in tokens, memory in bytes."""

    shape: ModelShape
    prompts_per_rollout: int
    """Prompts per rollout, over all ranks."""
    num_generations: int
    """Completions per prompt."""
    micro_batch_size: int
    """Completions per forward and backward on one rank."""
    micro_batch_tokens: int | None = None
    """The most tokens of one forward and backward pass; None: those of a micro-batch."""
    accumulate_grad_batches: int = 1
    """Micro-batches per optimizer step."""
    num_iterations: int = 1
    """Passes over a rollout (μ)."""
    prompt_length: int
    """Length of the longest prompt."""
    completion_length: int
    """Length of the longest completion."""
    mean_fill: float = 0.6
    """Mean completion length as a share of the longest."""
    precision: Precision = "bf16-mixed"
    """Lightning's precision."""
    dtype: Dtype = "float32"
    """Dtype of the policy's parameters. Adapters are float32, unless the precision is bf16-true or 16-true."""
    lora_rank: int = 0
    """Rank of the adapters; 0 trains all weights."""
    lora_targets: str | tuple[str, ...] = "all-linear"
    adapter_params: int | None = None
    """Number of trained parameters with adapters; None derives it from their rank and targets."""
    quantization: Literal["nf4"] | None = None
    """Of the frozen weights under adapters."""
    gradient_checkpointing: bool = False
    beta: float = 0.0
    """Weight of the KL penalty. Above 0, a reference scores every completion."""
    scores_before_advantages: bool = False
    """Whether the policy scores every completion before the advantages are computed, which depend on the scores."""
    optimizer: Optimizer = "adamw"
    learning_rate: float = 1e-6
    """Learning rate to keep if another optimizer is suggested."""
    ranks: int = 1
    """Processes with one device each."""
    shards: int = 1
    """Ranks over which FSDP splits weights, gradients and optimizer state; 1 is DDP."""
    engine: EngineKind = "hf"
    """hf samples from the policy itself, vllm from a copy on the same device, remote from a copy on another device."""
    rollout_ahead: bool = False
    """Whether the next rollout is sampled on another device while the policy trains on this one."""
    engine_cache: float = 0.0
    """Bytes reserved for vLLM's key-value cache."""
    engine_sequences: int = 128
    """Completions sampled at once."""
    engine_shards: int = 1
    """Ranks that share one engine (tensor parallelism)."""
    engine_bytes: int = 2
    """Bytes per parameter of the engine, and per element of its cache."""
    engine_process: bool = False
    """Whether the engine is a server in its own process, which never sleeps."""
    rollout_class: str = "VLLMRollout"
    """Name of the run's rollout callback."""
    ranks_per_node: int = 1
    engine_sleep: bool = True
    """Whether vLLM frees weights and cache while the policy trains (GPU only)."""
    reward_models: float = 0.0
    """Bytes of reward models on the policy's device."""
    share_prompt: bool = True
    """Whether the trainer computes a prompt once for all its completions in a micro-batch. On GPUs it has no effect
    with gradient checkpointing or FSDP."""

    def __post_init__(self) -> None:
        if self.precision in ("bf16-true", "16-true"):
            object.__setattr__(self, "dtype", "bfloat16" if self.precision == "bf16-true" else "float16")

    @property
    def max_length(self) -> int:
        """Tokens of the longest prompt and completion."""
        return self.prompt_length + self.completion_length

    @property
    def rows_per_pass(self) -> int:
        """Completions per forward and backward pass, at full length."""
        if self.micro_batch_tokens is None:
            return self.micro_batch_size
        if not self.shares_prompt:
            rows = self.micro_batch_tokens // self.max_length
        else:
            group = self.prompt_length + self.num_generations * self.completion_length
            rows = self.micro_batch_tokens // group * self.num_generations
            # a part of a group
            rows = rows or (self.micro_batch_tokens - self.prompt_length) // self.completion_length
        return min(max(1, rows), self.micro_batch_size)

    @property
    def mean_length(self) -> float:
        """Mean tokens per completion."""
        return self.mean_fill * self.completion_length

    @property
    def engine_row(self) -> float:
        """Bytes of a rank's cache per sequence at full length, rounded up to blocks of 32 tokens."""
        shards = 1 if self.shape.latent_width else min(self.engine_shards, self.shape.kv_heads)
        return (self.max_length + 32) * self.shape.cache_bytes * self.engine_bytes / 2 / shards

    @property
    def samples(self) -> int:
        """N, completions per rollout, over all ranks."""
        return self.prompts_per_rollout * self.num_generations

    @property
    def local_samples(self) -> int:
        """Completions per rollout on one rank."""
        return self.samples // self.ranks

    @property
    def steps_per_rollout(self) -> int:
        """Micro-batches that one rank trains on per rollout."""
        return steps_per_rollout(
            samples=self.samples,
            micro_batch_size=self.micro_batch_size,
            num_iterations=self.num_iterations,
            ranks=self.ranks,
        )

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps per rollout."""
        return self.steps_per_rollout // self.accumulate_grad_batches

    @property
    def samples_per_update(self) -> int:
        """Completions per optimizer step, over all ranks."""
        return self.micro_batch_size * self.accumulate_grad_batches * self.ranks

    @property
    def compute_dtype(self) -> Dtype:
        """Name of the dtype of matrix products."""
        dtype = compute_dtype_of(self.precision, getattr(torch, self.dtype))
        return cast(Dtype, str(dtype).removeprefix("torch."))

    @property
    def is_mixed(self) -> bool:
        """Whether the precision is one with autocast."""
        return self.precision.endswith("mixed")

    @property
    def weight_bytes(self) -> int:
        """Bytes per parameter of the policy."""
        return 2 if self.dtype != "float32" else 4

    @property
    def compute_bytes(self) -> int:
        """Bytes per activation in matrix products."""
        return 2 if self.compute_dtype != "float32" else 4

    @property
    def lora(self) -> LoRA | None:
        """The adapters, or None if all weights are trained."""
        targets = self.lora_targets if isinstance(self.lora_targets, str) else list(self.lora_targets)
        return LoRA(rank=self.lora_rank, target_modules=targets) if self.lora_rank else None

    @property
    def trained(self) -> int:
        """Number of trained parameters."""
        if self.lora_rank and self.adapter_params is not None:
            return self.adapter_params
        return self.shape.lora_params(self.lora_rank, self.lora_targets) if self.lora_rank else self.shape.params

    @property
    def trained_bytes(self) -> int:
        """Bytes per trained parameter."""
        return 4 if self.lora_rank and not self.precision.endswith("16-true") else self.weight_bytes

    @property
    def needs_old_logprobs(self) -> bool:
        """Whether the policy changes between a rollout and its last update."""
        return self.updates_per_rollout > 1

    @property
    def needs_reference(self) -> bool:
        return self.beta > 0

    @property
    def scoring_passes(self) -> int:
        """Forward passes over a rollout besides its updates.

        The scores from before the advantages are rarely used for the updates too, whose micro-batches leave out the
        groups without a signal.
        """
        return self.scores_before_advantages + self.needs_old_logprobs + self.needs_reference

    @property
    def shares_prompt(self) -> bool:
        """Whether prompts are shared on a GPU, given the other options."""
        return self.share_prompt and not self.gradient_checkpointing and self.shards == 1
