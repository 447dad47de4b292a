"""Tokens per second of conversations of several turns and of single completions, on the same engine in one run.

Claim: conversations reach at least 0.9 of the throughput of single completions, with the same prompts and the same
number of sampled tokens, since a turn computes only the tokens that are new and joins the turns that are running. Turns
have different lengths, so that they end at different times; between them come observations of 8 tokens. The tokens
before a turn and those of them that were computed are printed too. Without --model, a random model of SmolLM2-135M's
shape is used.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rollout import random_model
from transformers import AutoModelForCausalLM

from lightning_grpo.rollout import Engine, HFEngine, SampleRequest, Sampling, Turn, VLLMEngine, rollout_seeds

GOAL = 0.9
PROMPT, OBSERVATION = 90, 8
TURN_LENGTHS = (64, 48, 80)
"""Tokens of the turns of a conversation, which begins at another of these lengths than its neighbours."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer conversations and rounds")
    parser.add_argument("--check", action="store_true", help=f"fail below {GOAL} of the throughput of completions")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--model", help="a checkpoint's folder; empty makes a random one")
    parser.add_argument("--engines", nargs="+", choices=("vllm", "hf"), default=["vllm", "hf"])
    return parser.parse_args()


def main() -> None:
    args = parse()
    num_prompts, num_generations, num_turns, rounds = (2, 8, 3, 3) if args.quick else (4, 8, 6, 5)
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = args.model or random_model(f"{folder}/model")
        for name in args.engines:
            with ENGINES[name](path, num_prompts * num_generations) as (engine, forget):
                figures[name] = measure(engine, forget, num_prompts, num_generations, num_turns, rounds)
    for name, values in figures.items():
        for figure, value in values.items():
            print(f"{name:6} {figure:42} {value:10.3f}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))
    ratios = {name: values["ratio"] for name, values in figures.items()}
    print(f"turns: {', '.join(f'{name} {ratio:.3f}' for name, ratio in ratios.items())} of completions (goal {GOAL})")
    if args.check and min(ratios.values()) < GOAL:
        sys.exit(1)


@contextmanager
def vllm_engine(path: str, sequences: int) -> Iterator[tuple[Engine, Callable[[], object]]]:
    engine = VLLMEngine(
        path,
        eos_token_ids=[],
        log_file=Path(path).parent / "vllm.log",
        engine_args={
            "enforce_eager": not torch.cuda.is_available(),
            "block_size": 32,
            "max_model_len": 640,
            "max_num_seqs": sequences,
            "kv_cache_memory_bytes": 2 << 30,
        },
    )
    yield engine, engine.llm.llm_engine.reset_prefix_cache
    engine.close()


@contextmanager
def hf_engine(path: str, sequences: int) -> Iterator[tuple[Engine, Callable[[], object]]]:
    policy = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    yield HFEngine(policy, eos_token_ids=[], pad_id=0, max_num_seqs=sequences), lambda: None


ENGINES = {"vllm": vllm_engine, "hf": hf_engine}


def measure(
    engine: Engine,
    forget: Callable[[], object],
    num_prompts: int,
    num_generations: int,
    num_turns: int,
    rounds: int,
) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(1000, 40000, (rounds + 1, num_prompts, PROMPT), generator=generator).tolist()
    tokens_each = num_turns // len(TURN_LENGTHS) * sum(TURN_LENGTHS)
    tokens = num_prompts * num_generations * tokens_each
    before, computed = 0, 0

    def completions(number: int) -> None:
        seeds = [[rollout_seeds(0, number, i, g) for g in range(num_generations)] for i in range(num_prompts)]
        groups = engine.generate(SampleRequest(prompts=prompts[number], seeds=seeds, max_tokens=tokens_each))
        assert sum(len(c.token_ids) for group in groups for c in group) == tokens

    def conversations(number: int) -> None:
        nonlocal before, computed
        sampled, begun = 0, [0] * (num_prompts * num_generations)

        def next_turn(key: int, token_ids: list[int]) -> Turn:
            length = TURN_LENGTHS[(key + begun[key]) % len(TURN_LENGTHS)]
            begun[key] += 1
            return Turn(key=key, token_ids=token_ids, seed=rollout_seeds(1, number, key, begun[key]), max_tokens=length)

        with engine.turns(Sampling()) as turns:
            running = {key: next_turn(key, prompts[number][key // num_generations]) for key in range(len(begun))}
            for turn in running.values():
                turns.submit(turn)
            while running:
                for key, completion in turns.step():
                    turn = running.pop(key)
                    sampled += len(completion.token_ids)
                    before += len(turn.token_ids)
                    if begun[key] == num_turns:
                        turns.end(key)
                        continue
                    observation = [100 + key] * OBSERVATION
                    running[key] = next_turn(key, [*turn.token_ids, *completion.token_ids, *observation])
                    turns.submit(running[key])
            assert turns.computed_tokens is not None
            computed += turns.computed_tokens
        assert sampled == tokens

    runs = {"completions": completions, "conversations": conversations}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    # Round 0 warms up. The order alternates.
    for number in range(rounds + 1):
        for name in list(runs)[:: 1 if number % 2 else -1]:
            forget()
            start = time.perf_counter()
            runs[name](number)
            seconds[name].append(time.perf_counter() - start)
    seconds = {name: times[1:] for name, times in seconds.items()}
    num_turns_in_all = (rounds + 1) * num_prompts * num_generations * num_turns
    pairs = zip(seconds["completions"], seconds["conversations"], strict=True)
    return {
        **{f"{name}, tok/s": tokens / statistics.median(times) for name, times in seconds.items()},
        # Median over the rounds; other load on the machine then affects both sides alike.
        "ratio": statistics.median(single / turns for single, turns in pairs),
        "tokens before a turn": before / num_turns_in_all,
        "tokens before a turn that were computed": computed / num_turns_in_all,
    }


if __name__ == "__main__":
    main()
