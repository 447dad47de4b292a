"""Small runs of GRPO that really learn, each with an optional fault; `diagnosis.py` applies the diagnosis to them.

The task: the prompt ``cb`` asks for the six letters from ``c`` on in strides of two (``a`` to ``d`` are strides of one
to four). A transformer of 90,000 weights is first trained on noisy answers, so that it answers between a tenth and nine
tenths of the prompts right, as the models that GRPO starts from do.
"""

import json
import logging
import random
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import ascii_lowercase
from typing import Any
from unittest.mock import patch

import torch
from lightning import Callback, LightningModule, Trainer
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_grpo import GRPOModule, PromptDataModule
from lightning_grpo.diagnosis import Diagnosis
from lightning_grpo.errors import ReportedError
from lightning_grpo.policy import load_tokenizer
from lightning_grpo.record import Record
from lightning_grpo.rollout import HFRollout
from lightning_grpo.rollout.hf.engine import HFEngine

TINY = Path(__file__).parent.parent / "configs" / "tiny"
HELD_OUT = 24
READ = "read.json"
"""File with the options and facts that the diagnosis of a run reads."""


# ── Task and models ───────────────────────────────────────────────────────────────────────────────────────────────────


def rows() -> list[dict[str, str]]:
    """All prompts with their answers, in a fixed random order."""
    found = []
    for start, stride in ((s, t) for s in range(26) for t in range(4)):
        answer = "".join(ascii_lowercase[(start + i * (stride + 1)) % 26] for i in range(6))
        found.append({"prompt": ascii_lowercase[start] + ascii_lowercase[stride], "answer": answer})
    random.Random(0).shuffle(found)
    return found


def pretrain(folder: Path, *, noise: float, rambles: float = 0.0, steps: int = 300) -> None:
    """Train on answers of which a share of the letters, up to twice ``noise``, is wrong, and save the model.

    A share ``rambles`` of the answers goes on with up to ten further letters.
    """
    tokenizer = load_tokenizer(str(TINY))
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(TINY)
    config.update({"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4})
    config.update({"num_key_value_heads": 4, "head_dim": 16})
    model = AutoModelForCausalLM.from_config(config).float()
    end = torch.tensor(tokenizer.eos_token_id)
    answers = torch.tensor([tokenizer.encode(row["prompt"] + row["answer"]) for row in rows()])
    letters = torch.tensor(tokenizer.encode(ascii_lowercase))
    share = torch.linspace(0, 2 * noise, len(answers))[:, None]
    further = torch.arange(11)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        wrong = torch.rand(answers.shape) < share
        wrong[:, :2] = False
        noisy = torch.where(wrong, letters[torch.randint(26, answers.shape)], answers)
        count = torch.randint(1, 11, (len(answers), 1)) * (torch.rand(len(answers), 1) < rambles)
        rest = letters[torch.randint(26, (len(answers), 11))].where(further < count, end)
        ids = torch.cat([noisy, rest], 1)
        targets = ids.masked_fill(torch.cat([torch.ones_like(noisy), further <= count], 1) == 0, -100)[:, 2:]
        logits = model(input_ids=ids[:, :-1]).logits[:, 1:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


MODELS: dict[str, dict[str, Any]] = {
    "base": {"noise": 0.12},
    "rambling": {"noise": 0.12, "rambles": 0.3},
    "weak": {"noise": 0.35},
    "strong": {"noise": 0.03},
}


def write_prompts(folder: Path) -> None:
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))


def prepare(folder: Path) -> None:
    """Write the prompts and the models, unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    write_prompts(folder)
    for name, options in MODELS.items():
        if not (folder / name).exists():
            pretrain(folder / name, **options)


# ── Rewards ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def correct(completions: list[str], answer: list[str]) -> list[float]:
    """0 or 1. The answer ``*`` accepts any text."""
    return [float(right in (text, "*")) for text, right in zip(completions, answer, strict=True)]


def similar(completions: list[str], answer: list[str]) -> list[float]:
    """The share of letters that are right, at their places."""
    return [sum(map(str.__eq__, text, right)) / len(right) for text, right in zip(completions, answer, strict=True)]


def right_length(completions: list[str], answer: list[str]) -> list[float]:
    """Whether the completion has as many letters as the answer: a reward for the format."""
    return [float(len(text) == len(right)) for text, right in zip(completions, answer, strict=True)]


# ── An engine with weights of its own ─────────────────────────────────────────────────────────────────────────────────


class SeparateEngine(HFEngine):
    """Samples from its own copy of the policy, as vLLM does, so that faults between trainer and engine are possible.

    ``after_update`` is called with the copy after each sync. ``receives`` False leaves the copy as it is: with
    ``honest`` the completions have the version that sampled them, else that of the policy.
    """

    runs_in_background = True

    def __init__(self, *args: Any, dtype: torch.dtype = torch.float32, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.source = self.policy
        self.policy = deepcopy(self.policy).to(dtype)
        self.dtype = dtype
        self.receives, self.honest = True, False
        self.after_update: Callable[[torch.nn.Module], None] | None = None
        self.temperature: float | None = None

    def update_weights(self, weights: Any, version: int, *, in_flight: bool = False) -> None:
        if self.receives:
            with torch.no_grad():
                for own, new in zip(self.policy.parameters(), self.source.parameters(), strict=True):
                    own.copy_(new)
                if self.after_update is not None:
                    self.after_update(self.policy)
        if self.receives or not self.honest:
            self.version = version

    def generate(self, request: Any, on_group: Any = None) -> Any:
        if self.temperature is not None:
            request = replace(request, sampling=replace(request.sampling, temperature=self.temperature))
        return super().generate(request, on_group)


class SeparateRollout(HFRollout):
    """Builds a `SeparateEngine`. ``verified`` False accepts any difference after a sync."""

    engine_class = SeparateEngine

    def __init__(self, *, dtype: torch.dtype = torch.float32, verified: bool = True) -> None:
        super().__init__(tolerance=None if verified else (1e9, 1e9))
        self.dtype = dtype

    def build_engine(self, trainer: Trainer, pl_module: Any) -> SeparateEngine:
        shared = super().build_engine(trainer, pl_module)
        return SeparateEngine(
            shared.policy, eos_token_ids=sorted(shared.eos_token_ids), pad_id=shared.pad_id, dtype=self.dtype
        )


# ── Runs ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


Inject = Callable[[GRPOModule, int], None]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run, and the fault in it if there is one.

    ``inject(module, n)`` is called before each optimizer step from number ``at`` on, with n = 0, 1, 2, …
    """

    name: str
    seed: int = 0
    steps: int = 70
    model: str = "base"
    rewards: tuple[Callable, ...] = (correct,)
    lr: float = 3e-4
    prompts: int = 8
    accumulate: int = 2
    options: dict[str, Any] = field(default_factory=dict)
    rollout: Callable[[], HFRollout] = HFRollout
    unchecked: bool = False
    """Accept samples of any age, which a run otherwise refuses."""
    inject: Inject | None = None
    at: int = 31
    names: frozenset[str] = frozenset()


class Injection(Callback):
    """Calls the run's fault before each optimizer step from its first one on."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        begins_step = pl_module.progress.micro_step % trainer.accumulate_grad_batches == 0
        if begins_step and trainer.global_step + 1 >= self.run.at:
            self.run.inject(pl_module, trainer.global_step + 1 - self.run.at)


def execute(run: Run, models: Path, folder: Path) -> str | None:
    """Train with the callbacks that record and diagnose a run; return the error that ended it early, if one did."""
    folder.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {
        "num_generations": 8,
        "max_prompt_length": 4,
        "max_completion_length": 12,
        "gradient_checkpointing": False,
    } | run.options
    options.setdefault("micro_batch_size", run.prompts * options["num_generations"] // run.accumulate)
    module = GRPOModule(
        str(models / run.model),
        list(run.rewards),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=run.lr, weight_decay=0.0, fused=True),
        seed=run.seed,
        **options,
    )
    data = PromptDataModule(
        str(models / "prompts.jsonl"), validation_size=HELD_OUT, prompts_per_rollout=run.prompts, seed=run.seed
    )
    settings: dict[str, Any] = {
        "max_steps": run.steps,
        "max_epochs": -1,
        "accumulate_grad_batches": run.accumulate,
        "gradient_clip_val": 1.0,
        "val_check_interval": 5 * run.accumulate,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "devices": 1,
        "default_root_dir": folder,
    }
    diagnosis = Diagnosis()
    callbacks: list[Callback] = [run.rollout(), Record(print_every=0), diagnosis]
    if run.inject is not None:
        callbacks.append(Injection(run))
    trainer = Trainer(**settings, callbacks=callbacks)
    with patch("lightning_grpo.module.require_recent") if run.unchecked else nullcontext():
        try:
            trainer.fit(module, datamodule=data)
        except ReportedError as error:
            return f"{type(error).__name__}: {error}"
        finally:
            read = {"options": diagnosis.history.options, "info": diagnosis.history.info}
            (folder / READ).write_text(json.dumps(read, default=str))
    return None


def quietly() -> None:
    """Use one thread, and silence Lightning's notes on each fit."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("lightning", "lightning.pytorch", "lightning_grpo"):
        logging.getLogger(name).setLevel(logging.ERROR)
