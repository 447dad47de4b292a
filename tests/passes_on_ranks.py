"""What two processes train in `test_passes`; run by torch.distributed.run."""

import os
import sys
from pathlib import Path

import torch
from fitting import checksum, data, fit, module
from lightning.pytorch.strategies import ModelParallelStrategy
from ranks import Apart, whole

from lightning_grpo.objective import ObjectiveConfig
from lightning_grpo.rollout import HFRollout


def trained(root: Path, model: str, strategy, limit: int | None, rollout) -> tuple[dict[str, torch.Tensor], list]:
    """The weights after two updates of a rollout, and the completions in each pass of each micro-batch."""
    policy = module(
        model, rewards=[checksum], micro_batch_size=8, micro_batch_tokens=limit, num_iterations=2,
        objective=ObjectiveConfig(beta=0.1), optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
    )  # fmt: skip
    counts = []
    passes = policy.scorer.passes

    def counted(model, rows, sequences, *args, **options):
        counts.append([len(part) for sequence in sequences for part in sequence])
        return passes(model, rows, sequences, *args, **options)

    policy.scorer.passes = counted
    fit(root, policy, data(), steps=2, accumulate=2, strategy=strategy, devices=2, rollout=rollout)
    return whole(policy), counts


def main(root: Path, model: str) -> None:
    ends = {}
    for name, strategy, rollout in (
        ("ddp", lambda: "ddp", HFRollout),
        ("fsdp", lambda: ModelParallelStrategy(2, 1, save_distributed_checkpoint=False), Apart),
    ):
        for limit in (None, 45 if os.environ["RANK"] == "0" else 22):
            ends[name, limit is None], counts = trained(root, model, strategy(), limit, rollout())
            gathered = [None, None]
            torch.distributed.all_gather_object(gathered, counts)
            one, other = gathered
            if limit is not None:
                assert all(len(passes) > 1 for passes in one + other), (name, gathered)
                if name == "fsdp":
                    assert list(map(len, one)) == list(map(len, other)), gathered
                    assert any(0 in passes for passes in one), gathered
    start = dict(module(model).load_policy().named_parameters())
    first = ends["ddp", True]
    moved = max(float((p - start[name.removeprefix("policy.")].detach()).abs().max()) for name, p in first.items())
    assert moved > 1e-5
    for key, end in ends.items():
        difference = max(float((p - end[name]).abs().max()) for name, p in first.items())
        assert difference < 1e-4 * moved, (key, difference, moved)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
