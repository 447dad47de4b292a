"""Two ranks under Lightning's DDP, an engine each or one together: vLLM's process groups live beside the trainer's."""

from pathlib import Path

import pytest
from launching import assert_two_ranks_succeed

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

RANK_PROGRAM = """
import sys
import torch
sys.path.insert(0, {tests!r})
from engines import Sampler, loader, trainer_with
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


SHARED_PROGRAM = """
import sys
import torch
sys.path.insert(0, {tests!r})
from engines import Sampler, loader, trainer_with
from lightning_grpo.rollout import HFEngine, SampleRequest, VLLMRollout, WeightSyncError, rollout_seeds
from lightning_grpo.rollout.vllm import weights as vllm_weights


class Shared(Sampler):
    def on_train_batch_start(self, batch, batch_idx):
        rank = self.trainer.global_rank
        prompts = [[4, 60, 16, 5 + rank], [7, 8, 9]][: 2 - rank]
        seeds = [[rollout_seeds(0, batch_idx, 2 * rank + i, g) for g in range(3)] for i in range(len(prompts))]
        heard = dict()
        request = SampleRequest(prompts=prompts, seeds=seeds, max_tokens=12)
        groups = self.engine.generate(request, heard.__setitem__)
        assert [heard[i] for i in range(len(prompts))] == groups
        report = self.engine.last_sync
        assert report.compared == report.tensors
        reference = HFEngine(self.policy, eos_token_ids=[1], pad_id=0)
        for prompt, group in zip(prompts, groups):
            assert len(group) == 3
            for c in group:
                scored = reference.logprobs([prompt + c.token_ids])[0][len(prompt) - 1 :]
                torch.testing.assert_close(torch.tensor(c.logprobs), scored, atol=1e-4, rtol=0)
        print("ROUND", rank, report.version, [c.token_ids for group in groups for c in group], flush=True)

    def on_train_end(self):
        rank, Place = self.trainer.global_rank, vllm_weights._Place
        block_of, write = Place.block_of, vllm_weights._write
        name = "model.layers.1.mlp.down_proj.weight"

        def transposed(place, tensor):
            block = block_of(place, tensor)
            return block.T if rank == 1 and place.name == "model.layers.1.self_attn.q_proj.weight" else block.clone()

        def another_ranks(place, tensor):
            return tensor.narrow(1, 64 - place.corner[1], 64) if place.name == name else block_of(place, tensor)

        def altered(change):
            return lambda places, weights: write(places, ((n, change(w) if n == name else w) for n, w in weights))

        faults = dict(
            transposed=(transposed, write),
            another=(another_ranks, write),
            truncated=(block_of, altered(lambda w: w[:, :64])),
            slight=(block_of, altered(lambda w: w * (1 + 1e-6 * rank))),
        )
        for fault, (Place.block_of, vllm_weights._write) in faults.items():
            self.engine.engine.weights_lost = True
            try:
                self.engine.sync()
                caught = "nothing"
            except WeightSyncError as error:
                caught = str(error)
            print("FAULT", rank, fault, "|", caught, flush=True)
            self.trainer.strategy.barrier()
        Place.block_of, vllm_weights._write = block_of, write
        self.engine.engine.weights_lost = True
        self.engine.sync()


module = Shared({path!r})
callback = VLLMRollout(max_num_seqs=8, dtype="float32", kv_cache_memory_bytes=64 << 20, tensor_parallel_size=2)
trainer_with(callback, {root!r}, devices=2, strategy="ddp").fit(module, loader())
assert not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 2
"""


def run_on_two_ranks(source, model_path, tmp_path):
    """What each rank of the program printed."""
    program = tmp_path / "program.py"
    program.write_text(source.format(tests=str(Path(__file__).parent), path=model_path, root=str(tmp_path)))
    assert_two_ranks_succeed("--log-dir", str(tmp_path / "logs"), "--tee", "3", str(program))
    return [next(tmp_path.glob(f"logs/**/{rank}/stdout.log")).read_text() for rank in range(2)]


def test_two_ranks_with_an_engine_each_train_as_one(tiny_model_path, tmp_path):
    outputs = run_on_two_ranks(RANK_PROGRAM, tiny_model_path, tmp_path)
    rounds = [
        [line.split(maxsplit=3) for line in output.splitlines() if line.startswith("ROUND")] for output in outputs
    ]
    assert [len(lines) for lines in rounds] == [3, 3]
    for zero, one in zip(*rounds, strict=True):
        assert zero[1] == "0" and one[1] == "1"
        # Same averaged gradients, same weights, same seeds: the ranks draw the same samples.
        assert zero[2] == one[2]
        assert zero[3] == one[3]


def test_two_ranks_sample_with_one_engine(tiny_model_path, tmp_path):
    """Each rank gets its own prompts' completions, with the policy's log-probs; faults of a shard are seen."""
    outputs = run_on_two_ranks(SHARED_PROGRAM, tiny_model_path, tmp_path)
    for output in outputs:
        assert [line.split()[2] for line in output.splitlines() if line.startswith("ROUND")] == ["0", "1", "2"]
        lines = [line.split(maxsplit=4) for line in output.splitlines() if line.startswith("FAULT")]
        faults = {fault: caught for _, _, fault, _, caught in lines}
        assert faults.keys() == {"transposed", "another", "truncated", "slight"}
        assert "rank 1 of the engine did not take the weights" in faults["transposed"]
        assert "differ from the policy" in faults["another"]
        assert "the shape of model.layers.1.mlp.down_proj.weight is (64, 64)" in faults["truncated"]
        assert (
            "model.layers.1.mlp.down_proj.weight (stale in model.layers.1.mlp.down_proj on rank 1)" in faults["slight"]
        )
