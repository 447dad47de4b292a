"""What recording costs: processor time per step with and without it, and how long the training thread waits for it.

Claim: `Record` adds less than 20 ms of processor time to a step of 416 short completions, most of it in another thread,
and its hooks block for less than 5 ms. Processor time depends less than wall time on other work on the machine. Two
measurements:

- steps of the smoke run, which are short and have 416 completions, alternately recorded and not. A recorded step is
  written during the next one, whose time is compared with that of the next step after one that was not recorded.
- one large step of random tokens through the same hooks: the time they block, the processor time of the background
  thread, and the size on the disk.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from lightning import Trainer
from transformers import AutoTokenizer

from lightning_grpo import GRPOModule, PromptDataModule
from lightning_grpo.record import Record
from lightning_grpo.record.files import SampleFiles
from lightning_grpo.record.rows import SampleTables
from lightning_grpo.rewards import PrefixMatch
from lightning_grpo.rollout import HFRollout
from lightning_grpo.training.experience import Experience

ROOT = Path(__file__).parent.parent
GOAL_ADDED, GOAL_BLOCKED = 0.02, 0.005


class Alternately(Record):
    """Records every second step, and measures how long its hooks block."""

    def __init__(self) -> None:
        super().__init__(print_every=0)
        self.blocked: list[float] = []
        self.seconds: dict[bool, list[float]] = {True: [], False: []}
        self.ended = time.process_time()

    def on_before_optimizer_step(self, *args: object) -> None:
        start = time.perf_counter()
        super().on_before_optimizer_step(*args)
        self.blocked.append(time.perf_counter() - start)

    def on_train_batch_end(self, trainer: Trainer, pl_module: GRPOModule, *args: object) -> None:
        step = trainer.global_step
        if step == self._recorded:
            return
        start, now = time.perf_counter(), time.process_time()
        self.seconds[step % 2 == 0].append(now - self.ended)
        self.ended = now
        if step % 2:
            super().on_train_batch_end(trainer, pl_module, *args)
            self.blocked[-1] += time.perf_counter() - start
        self._recorded = step


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    parser.add_argument("--check", action="store_true", help="fail if the claim is wrong")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--tokenizer", default=str(ROOT / "models" / "SmolLM2-135M-Instruct"))
    return parser.parse_args()


def main() -> None:
    args = parse()
    figures = short_steps(30 if args.quick else 120)
    figures |= large_step(args.tokenizer, *((128, 512) if args.quick else (512, 1024)))
    for name, value in figures.items():
        print(f"{name:45}{value:12.5g}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))
    ratio, added, blocked = (figures[f"short steps: {name}"] for name in ("recorded / not", "added CPU-s", "s blocked"))
    print(
        f"record: steps take {ratio:.3f}x the processor time, {1e3 * added:.1f} ms more; {1e3 * blocked:.1f} ms block"
    )
    if args.check and (added > GOAL_ADDED or blocked > GOAL_BLOCKED):
        sys.exit(1)


def short_steps(steps: int) -> dict[str, float]:
    """The smoke run's steps, recorded alternately; the first four are left out."""
    module = GRPOModule(
        str(ROOT / "configs" / "tiny"), [PrefixMatch()], from_scratch=True, num_generations=16, micro_batch_size=208,
        max_prompt_length=8, max_completion_length=6, seed=0,
    )  # fmt: skip
    record = Alternately()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_steps=steps + 4, max_epochs=-1, accumulate_grad_batches=2, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", devices=1, limit_val_batches=0,
            default_root_dir=folder, callbacks=[HFRollout(), record],
        )  # fmt: skip
        trainer.fit(module, datamodule=PromptDataModule("letters", size=26, prompts_per_rollout=26))
    after, others = (statistics.median(record.seconds[is_after][2:]) for is_after in (True, False))
    return {
        "short steps: CPU-s, not recorded": others,
        "short steps: CPU-s, recorded": after,
        "short steps: recorded / not": after / others,
        "short steps: added CPU-s": after - others,
        "short steps: s blocked": statistics.median(record.blocked[4::2]),
    }


def large_step(name: str, completions: int, tokens: int) -> dict[str, float]:
    """What the background thread does for one step."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    generator = torch.Generator().manual_seed(0)
    # as frequent as in a text: Zipf's law
    ranks = torch.arange(1, len(tokenizer) + 1, dtype=torch.float64)
    ids = torch.multinomial(1 / ranks, completions * tokens, replacement=True, generator=generator)
    rewards = torch.rand(completions, 1, generator=generator).round()
    experience = Experience(
        prompt_ids=ids[: completions // 8 * 200].view(-1, 200).repeat_interleave(8, 0),
        prompt_mask=torch.ones(completions, 200, dtype=torch.bool),
        completion_ids=ids.view(completions, tokens),
        completion_mask=torch.ones(completions, tokens, dtype=torch.bool),
        rollout_logprobs=-torch.rand(completions, tokens, generator=generator),
        truncated=torch.zeros(completions, dtype=torch.bool),
        versions=torch.zeros(completions, tokens, dtype=torch.long),
        number=0, rewards=rewards, advantages=rewards[:, 0] - 0.5,
    )  # fmt: skip
    figures = {}
    for logprobs in (False, True):
        tables = SampleTables(
            tokenizer=tokenizer, end_ids=[0], reward_names=["r"], num_generations=8,
            max_completion_length=tokens, rank=0, shard=(1, 0), logprobs=logprobs,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            files = SampleFiles(Path(folder), rank=0, max_bytes=2**40)
            tables.table(experience, slice(0, 8), 1)  # the first call takes longer
            start = time.process_time()
            files.append(tables.table(experience, slice(0, completions), 1))
            converted = time.process_time() - start
            files.write()
            written = time.process_time() - start - converted
            size = sum(path.stat().st_size for path in files.folder.iterdir())
        what = f"{completions} × {tokens} tokens" + (" and log-probs" if logprobs else "")
        figures |= {
            f"{what}: CPU-s to convert": converted,
            f"{what}: CPU-s to write": written,
            f"{what}: KiB per completion": size / completions / 1024,
        }
    return figures


if __name__ == "__main__":
    main()
