"""A LightningModule with a policy: it loads the model, saves what is trained of it, and gives engines its weights."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from lightning import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_grpo.errors import UserError
from lightning_grpo.export.checkpoint import describe_policy
from lightning_grpo.export.load import load_module
from lightning_grpo.monitor.checkpoint_files import require_same_weights
from lightning_grpo.policy import (
    LoRA,
    Policy,
    Pretrained,
    adapters,
    full_precision_buffers,
    load_config,
    load_policy,
    load_tokenizer,
    source_of,
)
from lightning_grpo.policy.weights import policy_weights
from lightning_grpo.training.scorer import sequence_logprobs


class TrainablePolicy(LightningModule):
    """A module whose ``policy`` is a causal language model, without an algorithm that trains it.

    The arguments are those of `GRPOModule`.
    """

    def __init__(
        self,
        model: str | Pretrained | PreTrainedModel,
        *,
        lora: LoRA | None,
        dtype: Literal["float32", "bfloat16", "float16"],
        gradient_checkpointing: bool,
        attn_implementation: str,
        head_in_float32: bool,
        from_scratch: bool,
        quantization: Literal["nf4"] | None,
        seed: int,
    ) -> None:
        super().__init__()
        self.pretrained, self.lora = source_of(model, lora)
        self.dtype_name = dtype
        self.gradient_checkpointing = gradient_checkpointing
        self.attn_implementation = attn_implementation
        self.head_in_float32 = head_in_float32
        self.from_scratch = from_scratch
        self.quantization = quantization
        self.seed = seed
        if self.lora is not None:
            # checkpoints contain the adapter alone; `adapters.check` requires all of it
            self.strict_loading = False
        self.policy: Policy | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._loaded_steps: int | None = None

    @property
    def trained_steps(self) -> int:
        """Number of optimizer steps that the policy has taken: in this run, or before the checkpoint was saved that was
        loaded to evaluate it."""
        if self._loaded_steps is not None:
            return self._loaded_steps
        return 0 if self._trainer is None else self.trainer.global_step

    def on_fit_start(self) -> None:
        """Forget what was evaluated before."""
        self._loaded_steps = None

    # ── The model ─────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def model_path(self) -> str:
        """Folder of the policy's checkpoint, or its name on the hub."""
        return self.pretrained.name

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer, loaded once."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.pretrained)
        return self._tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of rows of the checkpoint's embedding."""
        return load_config(self.pretrained).get_text_config().vocab_size

    def load_policy(self) -> Policy:
        """The policy before training."""
        return load_policy(
            self.pretrained,
            dtype=self.dtype_name,
            lora=self.lora,
            gradient_checkpointing=self.gradient_checkpointing,
            attn_implementation=self.attn_implementation,
            head_in_float32=self.head_in_float32,
            from_scratch=self.from_scratch,
            quantization=self.quantization,
            seed=self.seed,
        )

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As in torch, except for buffers: see `full_precision_buffers`. Lightning calls it with bf16-true."""
        with full_precision_buffers(self):
            return super().to(*args, **kwargs)

    # ── For the engine ────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def policy_version(self) -> int:
        """Number of optimizer steps taken, in which the age of samples is counted."""
        return self.trainer.global_step

    def policy_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The policy's weights under Hugging Face names, with adapters merged, for the engine."""
        return policy_weights(self.policy)

    def score_tokens(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """Log-probs of whole sequences, with which a weight sync is verified; see `sequence_logprobs`."""
        return sequence_logprobs(self.policy, sequences, self.trainer)

    # ── Checkpoints ───────────────────────────────────────────────────────────────────────────────────────────────

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> dict[str, Any]:
        """With LoRA the adapter alone: the base model is the checkpoint that it was loaded from."""
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        if self.lora is not None:
            kept = {prefix + name for name in self._trainable}
            for name in [name for name in state if name.startswith(prefix) and name not in kept]:
                del state[name]
        return state

    @property
    def _trainable(self) -> set[str]:
        return {name for name, p in self.named_parameters() if p.requires_grad}

    def optimizer_zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Keep the gradients. Lightning would clear them between ``training_step`` and its backward, and so those that
        earlier passes of the first micro-batch have added."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Describe the policy in the checkpoint, so that `read_checkpoint` can rebuild it."""
        checkpoint["policy"] = {
            "lora": adapters.describe(self.lora, self._trainable, self.quantization),
            **describe_policy(
                model=self.pretrained,
                dtype=self.dtype_name,
                from_scratch=self.from_scratch,
                seed=self.seed,
                chat_template=getattr(self.trainer.datamodule, "chat_template", None),
            ),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint's weights are those of this policy."""
        if "policy" not in checkpoint:
            raise UserError("the checkpoint was saved by another program, or by an earlier version of this one")
        adapters.check(checkpoint["policy"]["lora"], self.lora, self._trainable, self.quantization)
        if self.lora is None and self.device_mesh is None:
            require_same_weights(self.state_dict(), checkpoint["state_dict"])
        if self._trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:
            self._loaded_steps = checkpoint["global_step"]

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, map_location: Any = None, **kwargs: Any) -> Self:
        """Load the policy of a checkpoint, to generate without a Trainer; see `load_module`."""
        return load_module(cls, checkpoint_path, map_location, **kwargs)
