"""Every number of a run that decides its memory and its time, and the arithmetic between batches and steps."""

from dataclasses import dataclass
from typing import Literal

from lightning_grpo.configure.shape import ModelShape, divisors
from lightning_grpo.errors import UserError

Precision = Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true"]
Optimizer = Literal["adamw", "adamw_8bit", "sgd"]
EngineKind = Literal["hf", "vllm", "remote"]

# Optimizer state of one trained parameter, in bytes, for 4-byte parameters.
STATE_BYTES = {"adamw": 8.0, "adamw_8bit": 2.06, "sgd": 0.0}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One GRPO run. Lengths are in tokens, memory in bytes."""

    shape: ModelShape
    prompts_per_rollout: int
    """Prompts of one rollout, over all ranks."""
    num_generations: int
    """Completions of each prompt."""
    micro_batch_size: int
    """Completions of one forward and backward, on one rank."""
    accumulate_grad_batches: int = 1
    """Micro-batches of one optimizer step."""
    num_iterations: int = 1
    """Passes of the update over a rollout (μ)."""
    prompt_length: int
    """Longest prompt."""
    completion_length: int
    """Longest completion."""
    mean_fill: float = 0.6
    """Mean length of a completion as a share of the longest."""
    precision: Precision = "bf16-mixed"
    """Lightning's: of the arithmetic, and with -true of the parameters too."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the policy's parameters as loaded. Adapters keep 32 bits, unless the precision is a 16-bit -true one."""
    lora_rank: int = 0
    """0 trains all weights."""
    lora_targets: str | tuple[str, ...] = "all-linear"
    gradient_checkpointing: bool = False
    beta: float = 0.0
    """Above 0, a reference scores every completion."""
    optimizer: Optimizer = "adamw"
    ranks: int = 1
    """Processes, one device each."""
    shards: int = 1
    """Ranks over which FSDP splits weights, gradients and optimizer state. 1 is DDP."""
    engine: EngineKind = "hf"
    """hf samples from the policy itself, vllm from a copy on the same device, remote from a copy elsewhere."""
    rollout_ahead: bool = False
    """The next rollout is sampled while the policy trains on this one, on a device of the engine's own."""
    engine_cache: float = 0.0
    """Bytes reserved for vLLM's key-value cache."""
    engine_sequences: int = 128
    """Completions that the engine samples at once."""
    engine_shards: int = 1
    """Ranks that share one engine (tensor parallelism)."""
    engine_sleep: bool = True
    """vLLM gives weights and cache back while the policy trains (GPU only)."""
    engine_graphs: bool = True
    """vLLM captures CUDA graphs (GPU only)."""
    share_prompt: bool = True
    """The trainer computes a prompt once for the completions of a micro-batch. Off under gradient checkpointing
    and FSDP."""

    def __post_init__(self) -> None:
        if self.precision in ("bf16-true", "16-true"):
            object.__setattr__(self, "dtype", "bfloat16" if self.precision == "bf16-true" else "float16")

    @property
    def samples(self) -> int:
        """N, completions of one rollout, over all ranks."""
        return self.prompts_per_rollout * self.num_generations

    @property
    def steps_per_rollout(self) -> int:
        """Micro-batches that one rank trains on per rollout."""
        return self.samples * self.num_iterations // (self.ranks * self.micro_batch_size)

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps per rollout."""
        return self.steps_per_rollout // self.accumulate_grad_batches

    @property
    def samples_per_update(self) -> int:
        """Completions behind one optimizer step, over all ranks."""
        return self.micro_batch_size * self.accumulate_grad_batches * self.ranks

    @property
    def weight_bytes(self) -> int:
        """Bytes of one parameter of the policy."""
        return 2 if self.dtype != "float32" else 4

    @property
    def compute_bytes(self) -> int:
        """Bytes of one activation inside the matrix products."""
        return 4 if self.precision == "32-true" else 2

    @property
    def trained(self) -> int:
        """Trained parameters."""
        return self.shape.lora_params(self.lora_rank, self.lora_targets) if self.lora_rank else self.shape.params

    @property
    def trained_bytes(self) -> int:
        """Bytes of one trained parameter."""
        return 4 if self.lora_rank and not self.precision.endswith("16-true") else self.weight_bytes

    @property
    def needs_old_logprobs(self) -> bool:
        """Whether the policy moves between a rollout and its last update."""
        return self.updates_per_rollout > 1

    @property
    def shares_prompt(self) -> bool:
        return self.share_prompt and not self.gradient_checkpointing and self.shards == 1

    @property
    def needs_reference(self) -> bool:
        return self.beta > 0

    @property
    def mean_length(self) -> float:
        """Mean tokens of a completion."""
        return self.mean_fill * self.completion_length


def _nearest(value: int, allowed: list[int], count: int = 4) -> str:
    near = sorted(sorted(allowed, key=lambda a: (abs(a - value), a))[:count])
    return " or ".join(map(str, near))


def check_batch_arithmetic(
    *,
    prompts_per_rollout: int,
    num_generations: int,
    micro_batch_size: int,
    accumulate_grad_batches: int = 1,
    num_iterations: int = 1,
    ranks: int = 1,
) -> int:
    """Micro-batches of one rank per rollout: N · num_iterations / (ranks · micro_batch_size).

    Args:
        prompts_per_rollout: B, over all ranks.
        num_generations: G; N = B · G.
        micro_batch_size: completions of one forward and backward on one rank.
        accumulate_grad_batches: micro-batches of one optimizer step (Lightning's own meaning).
        num_iterations: passes over a rollout (μ).
        ranks: data-parallel processes.

    Raises:
        ValueError: where the numbers don't divide; the message names the option and the nearest values that do.
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
    if num_generations < 2:
        raise UserError(
            "num_generations is 1: a group of one has no other completion to be compared with, every advantage is 0; "
            "set 2 or more (8 is common)"
        )
    if prompts_per_rollout % ranks:
        below = prompts_per_rollout // ranks * ranks
        near = [b for b in (below, below + ranks) if b]
        raise UserError(
            f"prompts_per_rollout is {prompts_per_rollout}, which {ranks} ranks can't share evenly; "
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
            f"micro-batches a rank ({local} completions / micro_batch_size {micro_batch_size}), which it does not "
            "divide: an optimizer step would straddle two passes; set accumulate_grad_batches to "
            f"{_nearest(accumulate_grad_batches, divisors(one_pass))}"
        )
    return one_pass * num_iterations
