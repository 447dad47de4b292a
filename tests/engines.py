"""Shared by the tests of engines: policies to sample from, an engine that copies the weights, a module that samples."""

import copy
import threading

import lightning as L
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_grpo.policy import Pretrained
from lightning_grpo.rollout import (
    HFEngine,
    RolloutCallback,
    SampleRequest,
    Sampling,
    Turn,
    eos_token_ids,
    policy_weights,
    rollout_seeds,
)

EOS = 1
PROMPTS = [[4, 60, 16, 5], [4, 60, 16, 5, 8, 9, 10], [7]]
SEEDS = [[rollout_seeds(1, 0, i, g) for g in range(4)] for i in range(len(PROMPTS))]
SETTINGS = {
    "dtype": "float32",
    "enforce_eager": True,
    "block_size": 32,
    "kv_cache_memory_bytes": 64 << 20,
    "max_num_seqs": 64,
    "max_model_len": 128,
}


def sample_request(max_tokens, sampling=Sampling()):
    return SampleRequest(prompts=PROMPTS, seeds=SEEDS, max_tokens=max_tokens, sampling=sampling)


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def perturb(policy, scale=0.02):
    generator = torch.Generator().manual_seed(0)
    for parameter in policy.parameters():
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)


def adapted(path, **settings):
    """A LoRA policy whose adapter does something; alpha / r is 3."""
    settings = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear"} | settings
    policy = get_peft_model(load(path), LoraConfig(**settings))
    move(policy, seed=0)
    return policy


def move(policy, seed):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in policy.named_parameters():
        if "lora_" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)


def converse(engine, prompts, num_turns=3, max_tokens=8, sampling=Sampling()):
    """Sample a conversation with each of ``prompts``, with observations of 0 to 5 tokens between the turns.

    Returns [(turn, completion)] in the order in which the turns ended, and how many tokens before them were computed.
    """
    sampled, numbers = [], dict.fromkeys(range(len(prompts)), 0)

    def next_turn(key, token_ids):
        return Turn(key=key, token_ids=token_ids, seed=100 * key + numbers[key], max_tokens=max_tokens + key % 3)

    with engine.turns(sampling) as turns:
        running = {key: next_turn(key, prompt) for key, prompt in enumerate(prompts)}
        for turn in running.values():
            turns.submit(turn)
        while running:
            assert turns.running == len(running)
            for key, completion in turns.step():
                turn = running.pop(key)
                sampled.append((turn, completion))
                numbers[key] += 1
                if numbers[key] == num_turns:
                    turns.end(key)
                    continue
                observation = [10 + key + i for i in range((key + numbers[key]) % 6)]
                running[key] = next_turn(key, [*turn.token_ids, *completion.token_ids, *observation])
                turns.submit(running[key])
        assert turns.running == 0 and turns.step() == []
        return sampled, turns.computed_tokens


def assert_turns_are_completions(engine, sampled, sampling=Sampling()):
    """Each turn is the completion that `generate` samples of all tokens before it."""
    for turn, found in sampled:
        ((expected,),) = engine.generate(
            SampleRequest(prompts=[turn.token_ids], seeds=[[turn.seed]], max_tokens=turn.max_tokens, sampling=sampling)
        )
        assert (found.token_ids, found.finish_reason) == (expected.token_ids, expected.finish_reason)
        assert found.versions == expected.versions
        torch.testing.assert_close(torch.tensor(found.logprobs), torch.tensor(expected.logprobs), atol=1e-4, rtol=0)


class CopyEngine(HFEngine):
    """Samples from weights of its own, in whatever thread asks; notes when."""

    runs_in_background = updates_in_flight = True

    def __init__(self, policy, **settings):
        super().__init__(copy.deepcopy(policy), **settings)
        self.stored, self.calls, self.gate = [], [], threading.Event()
        self.gate.set()

    def update_weights(self, weights, version, in_flight=False):
        own = dict(self.policy.named_parameters())
        with torch.no_grad():
            for name, tensor in weights:
                own[name].copy_(tensor)
        self.version = version
        self.calls.append(("update", version, in_flight))

    def generate(self, request, on_group=None):
        name = threading.current_thread().name.rsplit("_")[0]
        self.gate.wait(10)
        self.calls.append(("generate", self.version, name))
        return super().generate(request, on_group)


class CopyRollout(RolloutCallback):
    """An engine apart from the trainer, without the cost of starting one."""

    engine_class = CopyEngine

    def build_engine(self, trainer, pl_module):
        self.engine = CopyEngine(
            pl_module.policy, eos_token_ids=eos_token_ids(pl_module.policy, pl_module.tokenizer), pad_id=0
        )
        return self.engine


class Sampler(L.LightningModule):
    """The least module that an engine needs: it samples before each step and then moves its policy."""

    prompts = ([4, 60, 16, 5], [7, 8])
    max_prompt_length, max_completion_length, num_generations = 16, 24, 2

    def __init__(self, path, lr=0.05, fail_at=None):
        super().__init__()
        self.pretrained, self.quantization = Pretrained(name=path), None
        self.model_path, self.lr, self.fail_at = path, lr, fail_at
        self.sampling, self.seed = Sampling(), 0
        self.policy = self.engine = None
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.rounds = []

    def configure_model(self):
        if self.policy is None:
            self.policy = load(self.model_path)

    @property
    def policy_version(self):
        return self.trainer.global_step

    def policy_weights(self):
        return policy_weights(self.policy)

    @torch.no_grad()
    def score_tokens(self, sequences):
        return HFEngine(self.policy, eos_token_ids=[1], pad_id=0).logprobs(sequences)

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == self.fail_at:
            raise RuntimeError("a fault in training")
        seeds = [[rollout_seeds(self.seed, batch_idx, i, g) for g in range(2)] for i in range(len(self.prompts))]
        groups = self.engine.generate(
            SampleRequest(prompts=list(self.prompts), seeds=seeds, max_tokens=24, sampling=self.sampling)
        )
        self.rounds.append((self.engine.last_sync, groups))

    def training_step(self, batch, batch_idx):
        ids = torch.tensor([self.prompts[0]])
        return self.policy(input_ids=ids, labels=ids).loss

    def validation_step(self, batch, batch_idx):
        self.on_train_batch_start(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def trainer_with(callback, tmp_path, steps=3, **settings):
    return L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        default_root_dir=tmp_path,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def loader():
    return DataLoader(range(8))
