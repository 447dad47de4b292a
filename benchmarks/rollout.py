"""Tokens per second of the engines and of vLLM without this package, on the same prompts in one run, in both dtypes.

Claim: with seeds, log-probs and versions for every sample, the in-process engine reaches at least 0.95 of the
throughput of `vllm.LLM.generate` with the same log-probs. The cost of the log-probs and the throughput of the Hugging
Face engine are printed too; the latter decides which engine is the default on a CPU. On a CPU the Hugging Face engine
samples as in training, from float32 weights, in bfloat16 under autocast. Without --model, a random model of
SmolLM2-135M's shape is used.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lightning_grpo.rollout import HFEngine, SampleRequest, VLLMEngine, rollout_seeds

SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
}
GOAL = 0.95
DTYPES = ("bfloat16", "float32")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer sequences and rounds")
    parser.add_argument("--check", action="store_true", help=f"fail below {GOAL} of the bare engine")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--model", help="a checkpoint's folder; empty makes a random one")
    return parser.parse_args()


def random_model(folder: str) -> str:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).to(torch.bfloat16).save_pretrained(folder)
    return folder


def main() -> None:
    args = parse()
    num_prompts, num_generations, max_tokens, rounds = (4, 8, 32, 5) if args.quick else (8, 8, 64, 9)
    with tempfile.TemporaryDirectory() as folder:
        path = args.model or random_model(f"{folder}/model")
        figures: dict[str, float] = {"threads": torch.get_num_threads()}
        for dtype in DTYPES:
            measured = measure(path, Path(folder), dtype, num_prompts, num_generations, max_tokens, rounds)
            figures |= {f"{dtype}: {name}": value for name, value in measured.items()}
    for name, value in figures.items():
        print(f"{name:44} {value:10.3f}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))
    ratio = min(figures[f"{dtype}: ratio to bare with log-probs"] for dtype in DTYPES)
    print(f"rollout: {ratio:.3f} of the bare engine's tokens/s (goal {GOAL})")
    if args.check and ratio < GOAL:
        sys.exit(1)


def measure(
    path: str, folder: Path, dtype: str, num_prompts: int, num_generations: int, max_tokens: int, rounds: int
) -> dict[str, float]:
    start = time.perf_counter()
    engine = VLLMEngine(
        path,
        eos_token_ids=[],
        log_file=folder / "vllm.log",
        engine_args={
            "dtype": dtype,
            "enforce_eager": not torch.cuda.is_available(),
            "block_size": 32,
            "max_model_len": 256,
            "max_num_seqs": num_prompts * num_generations,
            "kv_cache_memory_bytes": 1 << 30,
        },
    )
    figures = {"start of vLLM, s": time.perf_counter() - start}
    from vllm import SamplingParams

    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(1000, 40000, (rounds + 1, num_prompts, 90), generator=generator).tolist()
    tokens = num_prompts * num_generations * max_tokens

    def ours(engine, number: int) -> None:
        seeds = [[rollout_seeds(0, number, i, g) for g in range(num_generations)] for i in range(num_prompts)]
        groups = engine.generate(SampleRequest(prompts=prompts[number], seeds=seeds, max_tokens=max_tokens))
        assert sum(len(c.token_ids) for group in groups for c in group) == tokens

    def bare(number: int, **settings) -> None:
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, detokenize=False, **settings)
        inputs = [{"prompt_token_ids": p} for p in prompts[number] for _ in range(num_generations)]
        outputs = engine.llm.generate(inputs, params, use_tqdm=False)
        assert sum(len(o.outputs[0].token_ids) for o in outputs) == tokens

    policy = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    autocast = partial(torch.autocast, "cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16")
    hf = HFEngine(policy, eos_token_ids=[], pad_id=0, context=autocast)
    runs = {
        "vLLM, ours": lambda number: ours(engine, number),
        "vLLM, bare with log-probs": lambda number: bare(number, logprobs=0, flat_logprobs=True),
        "vLLM, bare without log-probs": lambda number: bare(number),
    }
    seconds: dict[str, list[float]] = {name: [] for name in [*runs, "Hugging Face engine"]}

    def timed(name: str, run: Callable[[], None]) -> None:
        engine.llm.llm_engine.reset_prefix_cache()
        start = time.perf_counter()
        run()
        seconds[name].append(time.perf_counter() - start)

    # Round 0 warms up. The order rotates, so that each contender runs at each position.
    names = list(runs)
    for number in range(rounds + 1):
        for name in names[number % 3 :] + names[: number % 3]:
            timed(name, lambda name=name, number=number: runs[name](number))
    timed("Hugging Face engine", lambda: ours(hf, 0))
    timed("Hugging Face engine", lambda: ours(hf, 1))
    engine.close()
    seconds = {name: times[1:] for name, times in seconds.items()}

    def ratio(name: str) -> float:
        """Median ratio of tokens/s over the rounds; other load on the machine then affects both sides alike."""
        return statistics.median(b / a for a, b in zip(seconds["vLLM, ours"], seconds[name], strict=True))

    figures |= {f"{name}, tok/s": tokens / statistics.median(times) for name, times in seconds.items()}
    figures["ratio to bare with log-probs"] = ratio("vLLM, bare with log-probs")
    figures["ratio to bare without log-probs"] = ratio("vLLM, bare without log-probs")
    figures["Hugging Face to vLLM, ours"] = figures["Hugging Face engine, tok/s"] / figures["vLLM, ours, tok/s"]
    return figures


if __name__ == "__main__":
    main()
