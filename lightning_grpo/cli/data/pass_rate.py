"""``lightning-grpo data pass-rate``: how often the current model solves each prompt, and what GRPO can learn from it.

Shapes: B prompts, n completions per prompt, N = B·n completions.
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from math import comb
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback

from lightning_grpo.cli.commands import GRPOCommand
from lightning_grpo.data import PromptBatch, PromptDataModule
from lightning_grpo.errors import UserError
from lightning_grpo.monitor.observe import pass_at, powers_of_two
from lightning_grpo.monitor.terminal import run_folder
from lightning_grpo.objective import total_rewards
from lightning_grpo.record.show import escaped

ENOUGH, FEW = 0.3, 0.05
"""Shares of groups with different rewards: from ``ENOUGH`` on GRPO can learn, and below ``FEW`` hardly."""
TRUNCATED = 0.2
"""Share of truncated completions from which the length limit is named as a cause."""


class PassRateCommand(GRPOCommand):
    """Samples completions of training prompts as ``predict`` does those of held-out prompts."""

    options: ClassVar[argparse.Namespace]

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        self.pass_rates = PassRates(self.options.rows, self.options.samples)
        return super()._instantiate_trainer(config, [*callbacks, self.pass_rates])

    def before_predict(self) -> None:
        """Do nothing: no held-out prompts are needed."""

    def after_predict(self) -> None:
        """Write the prompts with their pass rates, and print what GRPO can learn from them."""
        measured = self.pass_rates.gathered()
        if self.trainer.is_global_zero:
            out = self.options.out or run_folder(self.trainer) / "pass_rates.jsonl"
            write(measured, out)
            print(f"{len(measured)} prompts with their pass rates: {out}")
            limit = "model.max_completion_length"
            if self.model.environment is not None:
                limit += ", or max_turn_tokens of the environment"
            print("\n".join(verdict(measured, self.model.num_generations, str(out), limit)))


class PassRates(Callback):
    """Samples training prompts in ``predict``, and collects what their completions scored.

    Args:
        rows: number of training prompts.
        samples: completions per prompt (n).
    """

    def __init__(self, rows: int, samples: int) -> None:
        self.rows = rows
        self.samples = samples
        self.measured: list[dict[str, Any]] = []

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Serve training prompts in place of held-out ones, sampled as in training, as many at once as in training."""
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, PromptDataModule):
            raise UserError("data pass-rate samples the prompts of a PromptDataModule; remove data of another class")
        if self.samples < pl_module.num_generations:
            raise UserError(
                f"--samples is {self.samples}, fewer than model.num_generations = {pl_module.num_generations}, so the "
                f"share of groups with different rewards can't be estimated; set --samples {pl_module.num_generations}"
            )
        prompts = data.prompts_to_check
        order = np.random.default_rng(data.seed).permutation(len(prompts))
        data.validation = [prompts[i] for i in np.sort(order[: self.rows])]
        data.validation_batch_size = max(1, data.prompts_per_rollout * pl_module.num_generations // self.samples)
        pl_module.validation_sampling = replace(pl_module.sampling, cutoff=1.0)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: PromptBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect the prompts of a batch; ``outputs`` has a record of each of their completions."""
        prompts = [row for row, real in zip(batch.rows, batch.real, strict=True) if real]
        names = pl_module.reward_names
        for i, prompt in enumerate(prompts):
            records = outputs[i * self.samples : (i + 1) * self.samples]
            scores = [[float("nan") if (x := r["rewards"][name]) is None else x for name in names] for r in records]
            rewards = torch.tensor(scores, dtype=torch.float32)
            right = rewards[:, 0] >= pl_module.evaluation.pass_threshold
            self.measured.append(
                {
                    "index": prompt.index,
                    "row": {"prompt": prompt.messages, **prompt.columns},
                    "right": right.tolist(),
                    "totals": total_rewards(pl_module.contributions(rewards)).tolist(),
                    "truncated": [record["truncated"] for record in records],
                    "completion": records[0]["completion"],
                }
            )

    def gathered(self) -> list[dict[str, Any]]:
        """What all ranks measured, in the order of the prompts."""
        shares = [self.measured]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            shares = [[]] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(shares, self.measured)
        return sorted((row for share in shares for row in share), key=lambda row: row["index"])


def different_share(totals: Sequence[float], G: int) -> float:
    """The probability that G of n completions of a prompt, drawn without replacement, differ in their rewards.

    This is 1 − Σ C(n_v, G) / C(n, G) over the different rewards v, each of n_v completions: an unbiased estimate for a
    group of G completions. With rewards of 0 and 1, the sum has the terms of the c right and the n − c wrong ones.
    """
    return 1 - sum(comb(count, G) for count in Counter(map(repr, totals)).values()) / comb(len(totals), G)


def check_file(path: Path | None) -> None:
    """Raise `UserError` unless `write` can write to the file."""
    if path is None:
        return
    if path.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"--out is {path}; set a .jsonl or .parquet file")
    if not path.parent.is_dir():
        raise UserError(f"--out is {path}, but there is no folder {path.parent}; create it")


def write(measured: Sequence[dict[str, Any]], path: Path) -> None:
    """Write prompts as rows that ``data.source`` and ``configure --prompts`` read, with ``pass_rate`` and pass@k."""
    rows = []
    for prompt in measured:
        n, right, reward = len(prompt["right"]), torch.tensor([prompt["right"]]), _mean(prompt["totals"])
        figures = {
            "pass_rate": _mean(prompt["right"]),
            "samples": n,
            "mean_reward": None if reward != reward else reward,
        }
        shares = {f"pass@{k}": float(pass_at(right, k)) for k in powers_of_two(n)[1:]}
        rows.append(prompt["row"] | figures | shares)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows), "utf-8")
        return
    try:
        pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    except pa.ArrowException as error:
        raise UserError(f"--out is {path}, but a column has values of several types ({error}); set a .jsonl") from error


def verdict(
    measured: Sequence[dict[str, Any]], G: int, file: str, limit: str = "model.max_completion_length"
) -> list[str]:
    """Lines about the pass rates, the share of groups with different rewards, and what to change.

    Args:
        measured: prompts of `PassRates`.
        G: num_generations of the run.
        file: where the prompts were written.
        limit: the options that limit the length of completions.
    """
    n = len(measured[0]["right"])
    rates = np.array([np.mean(prompt["right"]) for prompt in measured])
    sizes = sorted({*powers_of_two(n)[1:], *([G] if G > 1 else [])})
    shares = {size: _mean([different_share(prompt["totals"], size) for prompt in measured]) for size in sizes}
    lines = [
        f"pass rate {rates.mean():.1%} over {n} completions per prompt; {np.mean(rates == 0):.0%} of the prompts are "
        f"never solved, {np.mean(rates == 1):.0%} always",
        "groups whose rewards are expected to differ: "
        + ", ".join(f"{share:.0%} with num_generations {size}" for size, share in shares.items()),
    ]
    share = shares.get(G, 0.0)
    if share >= ENOUGH:
        return [*lines, f"GRPO can learn from these prompts: {share:.0%} of the groups of {G} carry a gradient"]
    how = "hardly learn" if share < FEW else "learn only slowly"
    lines.append(f"GRPO can {how} from these prompts: only {share:.0%} of the groups of {G} carry a gradient")
    return [*lines, *(f"  {change}" for change in _changes(measured, rates, shares, G, file, limit))]


def _changes(
    measured: Sequence[dict[str, Any]], rates: np.ndarray, shares: dict[int, float], G: int, file: str, limit: str
) -> list[str]:
    truncated = _mean([_mean(prompt["truncated"]) for prompt in measured])
    changes = []
    if not any(shares.values()):
        example = escaped(measured[0]["completion"][-120:])
        changes.append(f"check that the reward finds the answer in a completion such as {example!r}")
    if truncated >= TRUNCATED:
        changes.append(f"raise {limit}: {truncated:.0%} of the completions are truncated")
    if (larger := next((size for size, share in shares.items() if size > G and share >= ENOUGH), None)) is not None:
        changes.append(f"set model.num_generations to {larger}, for which {shares[larger]:.0%} of the groups differ")
    if rates.mean() < 0.5:
        changes.append("use easier prompts or a stronger model, or add a reward for partial success")
    else:
        changes.append("use harder prompts: most of these are solved already")
    if np.any((rates > 0) & (rates < 1)):
        changes.append(
            f"train on the rows of {file} whose pass_rate is between 0 and 1, or set model.resampling_rounds"
        )
    return changes


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
