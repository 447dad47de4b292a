"""Every number of a run that decides its memory and its time."""

from dataclasses import dataclass
from typing import Literal

from lightning_grpo.configure.shape import ModelShape

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
    learning_rate: float = 1e-6
    """Kept when a change of the optimizer is advised."""
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
    engine_bytes: int = 2
    """Bytes of one of the engine's parameters, and of one element of its cache."""
    engine_process: bool = False
    """The engine is a server in a process of its own, which never sleeps."""
    rollout_class: str = "VLLMRollout"
    """Name of the run's rollout callback."""
    ranks_per_node: int = 1
    """Ranks on one machine."""
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
    def engine_row(self) -> float:
        """Bytes that one sequence at full length takes of a rank's cache; blocks of 32 tokens round it up."""
        tokens = self.prompt_length + self.completion_length + 32
        shards = 1 if self.shape.latent_width else min(self.engine_shards, self.shape.kv_heads)
        return tokens * self.shape.cache_bytes * self.engine_bytes / 2 / shards

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
