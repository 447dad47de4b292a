"""Start-up with many prompts: reading, rendering and encoding them, and reading the prompts that were stored.

Both sides read the same file of chat messages and use the same tokenizer: `PromptDataModule`, and ``datasets`` with
``map`` on all cores, which renders and encodes. Each is timed twice in new processes: without stored prompts, and with
those of the first time. Seconds are those of reading alone, without the imports. Needs models/SmolLM2-135M-Instruct
(`make quickstart`), or --model.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
MIN_RATIO, MAX_SECONDS_PER_MILLION = 1.0, 10.0
QUESTION = "{name} sold clips to {i} friends in April, and half as many in May. How many clips were sold altogether?"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--quick", action="store_true", help="100,000 rows instead of --rows")
    parser.add_argument(
        "--check",
        action="store_true",
        help=f"fail if datasets is faster, or if stored prompts take over {MAX_SECONDS_PER_MILLION:.0f} s per million",
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--model", default=str(ROOT / "models" / "SmolLM2-135M-Instruct"))
    parser.add_argument("--one", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--file", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(SIDES[args.one](args.file, args.model)))
        return
    rows = 100_000 if args.quick else args.rows
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prompts.jsonl"
        write_rows(file, rows)
        for side in SIDES:
            for turn in ("first", "second"):
                figures.append({"side": side, "turn": turn, "rows": rows} | measure(side, file, args.model, folder))
                print("{side:16} {turn:6} time: {seconds:7.1f} s, peak {gib:5.2f} GiB".format(**figures[-1]))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))
    ours_first, ours_second, theirs_first, theirs_second = (row["seconds"] for row in figures)
    print(
        f"data: {rows:,} prompts; datasets / ours {theirs_first / ours_first:.2f} the first time, "
        f"{theirs_second / ours_second:.2f} the second time ({ours_second:.1f} s)"
    )
    slow = ours_second > MAX_SECONDS_PER_MILLION * max(rows / 1e6, 0.1)
    if args.check and (theirs_first / ours_first < MIN_RATIO or slow):
        sys.exit(1)


def write_rows(file: Path, rows: int) -> None:
    with file.open("w") as out:
        for i in range(rows):
            question = QUESTION.format(name=("Natalia", "Weng", "Betty", "Julie")[i % 4], i=i)
            messages = [{"role": "system", "content": "Answer with a number."}, {"role": "user", "content": question}]
            out.write(json.dumps({"prompt": messages, "answer": str(3 * i // 2), "level": i % 5}) + "\n")


def measure(side: str, file: Path, model: str, cache: str) -> dict[str, float]:
    """Run one side in a new process."""
    environment = os.environ | {"LIGHTNING_GRPO_PROMPTS": f"{cache}/ours", "HF_DATASETS_CACHE": f"{cache}/datasets"}
    command = [sys.executable, __file__, "--one", side, "--file", str(file), "--model", model]
    done = subprocess.run(command, env=environment, cwd=ROOT, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def lightning_grpo(file: str, model: str) -> dict[str, float]:
    """What `fit` does with prompts before it trains: read them, check the rows, and take the prompts of a rollout."""
    from lightning_grpo import PromptDataModule
    from lightning_grpo.policy.load import load_tokenizer
    from lightning_grpo.rewards import ExactMatch
    from lightning_grpo.rewards.check import check_rows

    tokenizer = load_tokenizer(model)
    start = time.perf_counter()
    data = PromptDataModule(file, tokenizer=tokenizer, validation_size=500, max_prompt_length=512)
    data.setup("fit")
    check_rows([ExactMatch()], data.prompts_to_check)
    check_rows([ExactMatch()], data.validation)
    rollout = [data.train[i].ids for i in range(0, len(data.train), len(data.train) // 64)]
    assert all(rollout)
    return {"seconds": time.perf_counter() - start, "gib": peak()}


def datasets(file: str, model: str) -> dict[str, float]:
    """As TRL's users do: load the file, and map a function that renders and encodes over it."""
    from datasets import load_dataset

    from lightning_grpo.policy.load import load_tokenizer

    tokenizer = load_tokenizer(model)
    start = time.perf_counter()
    rows = load_dataset("json", data_files=file, split="train")
    encoded = rows.map(
        encode, fn_kwargs={"tokenizer": tokenizer}, batched=True, num_proc=os.cpu_count(), load_from_cache_file=True
    )
    split = encoded.train_test_split(test_size=500, seed=0)
    rollout = [split["train"][i]["ids"] for i in range(0, len(split["train"]), len(split["train"]) // 64)]
    assert all(rollout)
    return {"seconds": time.perf_counter() - start, "gib": peak()}


def encode(batch: dict[str, list], tokenizer: object) -> dict[str, list]:
    texts = tokenizer.apply_chat_template(batch["prompt"], tokenize=False, add_generation_prompt=True)
    return {"ids": tokenizer(texts, add_special_tokens=False)["input_ids"]}


SIDES = {"lightning_grpo": lightning_grpo, "datasets": datasets}


def peak() -> float:
    """Largest resident memory of this process, in GiB; processes that it started are not included."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
