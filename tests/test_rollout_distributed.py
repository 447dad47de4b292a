"""Two ranks, one engine each, under Lightning's DDP: vLLM's process groups live beside the trainer's."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

RANK_PROGRAM = """
import sys
import torch
sys.path.insert(0, {tests!r})
from test_rollout_callback import Sampler, loader, trainer_with
from lightning_grpo.rollout import HFRollout, VLLMRollout


class Ranked(Sampler):
    def on_train_batch_start(self, batch, batch_idx):
        assert torch.distributed.get_world_size() == 2
        super().on_train_batch_start(batch, batch_idx)

    def on_train_end(self):
        gathered = self.all_gather(torch.tensor(float(self.trainer.global_rank)))
        assert gathered.tolist() == [0.0, 1.0], "the trainer's own group must have survived the engine's"

    def training_step(self, batch, batch_idx):
        ids = torch.tensor([[4, 60, 16, 5 + self.trainer.global_rank]])
        return self.policy(input_ids=ids, labels=ids).loss


module = Ranked({path!r})
callback = VLLMRollout(max_num_seqs=8, dtype="float32", kv_cache_memory_bytes=64 << 20)
trainer = trainer_with(callback, {root!r}, devices=2, strategy="ddp")
trainer.fit(module, loader())
for report, groups in module.rounds:
    print("ROUND", trainer.global_rank, report.version, groups[0][0].token_ids, flush=True)
"""


def test_two_ranks_with_an_engine_each_train_as_one(tiny_model_path, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(RANK_PROGRAM.format(tests=str(Path(__file__).parent), path=tiny_model_path, root=str(tmp_path)))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, str(program)],
            env=os.environ | {"NODE_RANK": "0", "LOCAL_RANK": str(r), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for r in range(2)
    ]
    outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    for rank, output in zip(ranks, outputs, strict=True):
        assert rank.returncode == 0, output[-3000:]
    rounds = [
        [line.split(maxsplit=3) for line in output.splitlines() if line.startswith("ROUND")] for output in outputs
    ]
    assert [len(lines) for lines in rounds] == [3, 3]
    for zero, one in zip(*rounds, strict=True):
        assert zero[1] == "0" and one[1] == "1"
        # Same averaged gradients, same weights, same seeds: the ranks draw the same samples.
        assert zero[2] == one[2]
        assert zero[3] == one[3]
