"""Time and memory of a whole GRPO step, compared with TRL's GRPOTrainer on the same work.

Each contender is a separate process that loads the same checkpoint and trains on the same prompts: as many
completions of exactly the same length (the checkpoint's copy has an end-of-sequence token that is never sampled), the
same micro-batches, a reward that differs within every group, advantages without scaling, DAPO's loss, AdamW,
gradients clipped at 1, no gradient checkpointing. After warm-up steps it reports the median seconds per step, in
total and in parts (sampling; sending the weights to the engine; rewards, scoring, loss, gradients and optimizer), and
its peak resident memory (VmHWM, including weights and libraries). It also reports the trained tokens, the mean absolute
advantage and the norm of the first gradient, which are about equal on both sides, since only the samples differ.

Contenders: `hf` is TRL with transformers' generate, its default, against ours with `HFRollout`; `vllm` is TRL with vLLM
in its process (colocate, without its importance sampling correction, which is off by default here too) against ours
with `VLLMRollout`. If TRL can't run vLLM on this machine, the output says why, and ours is compared with TRL and
transformers' generate instead. TRL is measured with the interpreter named by `--peers`, which has trl==1.16.0 (and
vLLM); if a contender fails, its row reports that, and `--check` fails.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PRECISIONS = {
    "bf16-mixed": "bfloat16 autocast over float32 weights",
    "fp32": "all in float32, which is faster on a processor without bfloat16 instructions",
    "bf16": "weights, gradients and optimizer in bfloat16",
}
GOALS = {"bf16-mixed": 5.0, "fp32": 3.5, "bf16": 5.0}
"""TRL's seconds per step relative to ours."""
GOAL_MEMORY = 2.0
"""TRL's peak memory relative to ours."""
SIDES = ["TRL", "ours"]
LEARNING_RATE = 1e-6


# --- the work ---------------------------------------------------------------------------------------------------------


def questions(count: int, stories: int = 1) -> list[str]:
    """Word problems in the model's chat format, of about 110 tokens for one of ``stories``, ending with the opening of
    the answer."""
    rng = random.Random(0)
    names, things = ["Ada", "Bert", "Cleo", "Dan", "Edda", "Finn"], ["apples", "books", "coins", "stamps", "tickets"]
    found = []
    for _ in range(count):
        told = []
        for _ in range(stories):
            (a, b), thing, (x, y, z) = rng.sample(names, 2), rng.choice(things), (rng.randint(11, 99) for _ in range(3))
            told.append(
                f"{a} has {x} {thing} in a box at home. On Monday {a} buys {y} more {thing} at the market and puts "
                f"them into the same box. On Tuesday {b} comes to visit, who has {z} {thing}, and gives every second "
                f"one of them to {a}. How many {thing} does {a} have in the box on Tuesday evening, and how many are "
                f"left to {b}? "
            )
        task = "".join(told) + "Think step by step, and write the two numbers on the last line."
        found.append(f"<|im_start|>user\n{task}<|im_end|>\n<|im_start|>assistant\n")
    return found


def variety(completions, **columns) -> list[float]:
    """Fraction of distinct characters, which almost never is equal for two completions of a group."""
    return [len(set(text)) / max(len(text), 1) for text in completions]


def endless_checkpoint(model: Path, folder: Path) -> Path:
    """A copy of the checkpoint with the last, rare token of the vocabulary as end-of-sequence token."""
    shutil.copytree(model, folder)
    tokens = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokens["model"]["vocab"] | {token["content"]: token["id"] for token in tokens["added_tokens"]}
    last, index = max(vocabulary.items(), key=lambda item: item[1])
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        settings = json.loads((folder / name).read_text())
        settings |= {"eos_token": last} if name.startswith("tokenizer") else {"eos_token_id": index}
        (folder / name).write_text(json.dumps(settings))
    return folder


# --- one contender, in its own process --------------------------------------------------------------------------------


def status(field: str) -> float:
    """Memory of this process in GB (Linux): VmRSS is resident memory, VmHWM its peak."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024 / 1e9


class Clock:
    """Seconds between optimizer steps, in total and by part."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.parts: dict[str, float] = {}
        self.last = time.perf_counter()

    def timed(self, part: str, function):
        """``function``, whose time is added to ``part``."""

        def call(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.parts[part] = self.parts.get(part, 0.0) + time.perf_counter() - start

        return call

    def step(self) -> None:
        now = time.perf_counter()
        generate, sync = self.parts.get("generate", 0.0), self.parts.get("sync", 0.0) - self.parts.get("nested", 0.0)
        total = now - self.last
        self.steps.append({"total": total, "generate": generate, "sync": sync, "update": total - generate - sync})
        self.steps[-1]["resident"] = status("VmRSS")
        self.parts, self.last = {}, now


def run_trl(job: dict, clock: Clock) -> dict:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    norms, trained = [], []

    class Steps(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            clock.step()

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "grad_norm" in logs:
                norms.append(float(logs["grad_norm"]))

    class Counting(GRPOTrainer):
        def compute_loss(self, model, inputs, **kwargs):
            trained.append((int(inputs["completion_mask"].sum()), float(inputs["advantages"].abs().mean())))
            return super().compute_loss(model, inputs, **kwargs)

    vllm = {
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_importance_sampling_correction": False,
        "vllm_max_model_length": job["max_prompt"] + job["length"],
    }
    config = GRPOConfig(
        output_dir=job["folder"] + "/trl",
        model_init_kwargs={"dtype": "bfloat16" if job["precision"] == "bf16" else "float32"},
        bf16=job["precision"] == "bf16-mixed",
        use_cpu=not torch.cuda.is_available(),
        per_device_train_batch_size=job["micro_batch"],
        gradient_accumulation_steps=job["prompts"] * job["generations"] // job["micro_batch"],
        num_generations=job["generations"],
        num_iterations=job["iterations"],
        max_completion_length=job["length"],
        max_steps=job["warm_up"] + job["steps"],
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        beta=job["beta"],
        loss_type="dapo",
        scale_rewards="none",
        gradient_checkpointing=False,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **(vllm if job["engine"] == "vllm" else {}),
    )
    rows = [{"prompt": text} for text in questions(job["prompts"], job["stories"])]
    adapter = (
        LoraConfig(r=job["lora"], lora_alpha=2 * job["lora"], target_modules="all-linear") if job["lora"] else None
    )
    trainer = Counting(
        model=job["model"],
        args=config,
        reward_funcs=variety,
        train_dataset=Dataset.from_list(rows),
        peft_config=adapter,
        callbacks=[Steps()],
    )
    if job["engine"] == "vllm":
        trainer.vllm_generation.sync_weights = clock.timed("sync", trainer.vllm_generation.sync_weights)
        trainer.vllm_generation.generate = clock.timed("generate", trainer.vllm_generation.generate)
    else:
        trainer._generate_single_turn = clock.timed("generate", trainer._generate_single_turn)
    trainer.train()
    per_step = len(trained) // len(clock.steps)
    return {
        "grad_norms": norms,
        "tokens": [sum(t for t, _ in trained[i : i + per_step]) for i in range(0, len(trained), per_step)],
        "advantages": statistics.mean(a for _, a in trained),
    }


def run_ours(job: dict, clock: Clock) -> dict:
    import lightning
    import torch

    from lightning_grpo import GRPOModule, PromptDataModule
    from lightning_grpo.objective import ObjectiveConfig
    from lightning_grpo.policy import LoRA
    from lightning_grpo.rollout import HFRollout, VLLMRollout

    norms, trained, advantages = [], [], []

    class Steps(lightning.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            if trainer.global_step > len(clock.steps):
                clock.step()
                norms.append(float(trainer.callback_metrics["grad_norm"]))
                trained.append(int(trainer.callback_metrics["completion_tokens"]) - sum(trained))

    class Timed(GRPOModule):
        def rollout(self, batch):
            return clock.timed("generate", super().rollout)(batch)

        def on_fit_start(self):
            self.engine.sync = clock.timed("sync", self.engine.sync)

        def compute_advantages(self, rewards, rollout):
            found = super().compute_advantages(rewards, rollout)
            advantages.append(float(found.abs().mean()))
            return found

    rows = Path(job["folder"]) / "prompts.jsonl"
    rows.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in questions(job["prompts"], job["stories"])))
    module = Timed(
        job["model"],
        [variety],
        dtype="bfloat16" if job["precision"] == "bf16" else "float32",
        lora=LoRA(rank=job["lora"], alpha=2 * job["lora"]) if job["lora"] else None,
        num_generations=job["generations"],
        num_iterations=job["iterations"],
        micro_batch_size=job["micro_batch"],
        max_prompt_length=job["max_prompt"],
        max_completion_length=job["length"],
        objective=ObjectiveConfig(loss_type="dapo", beta=job["beta"]),
        optimizer=lambda p: torch.optim.AdamW(p, lr=LEARNING_RATE, weight_decay=0.0, fused=True),
    )
    trainer = lightning.Trainer(
        precision="bf16-mixed" if job["precision"] == "bf16-mixed" else None,
        max_steps=job["warm_up"] + job["steps"],
        max_epochs=-1,
        accumulate_grad_batches=job["prompts"] * job["generations"] // job["micro_batch"],
        gradient_clip_val=1.0,
        default_root_dir=job["folder"],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[{"hf": HFRollout, "vllm": VLLMRollout}[job["engine"]](), Steps()],
        devices=1,
    )
    trainer.fit(module, PromptDataModule(str(rows), prompts_per_rollout=job["prompts"]))
    return {"grad_norms": norms, "tokens": trained, "advantages": statistics.mean(advantages)}


def worker(job: dict) -> dict:
    import torch

    torch.set_num_threads(job["threads"])
    clock = Clock()
    found = {"TRL": run_trl, "ours": run_ours}[job["side"]](job, clock)
    steady, passes = clock.steps[job["warm_up"] :], job["iterations"]
    # completions are sampled in every ``passes``-th step only
    rollouts = [steady[i : i + passes] for i in range(0, len(steady), passes)]
    parts = {
        part: statistics.median(statistics.mean(step[part] for step in steps) for steps in rollouts)
        for part in steady[0]
    }
    return {**parts, "peak": status("VmHWM"), "all_steps": clock.steps, **found}


# --- all of them ------------------------------------------------------------------------------------------------------


def measure(job: dict, python: str) -> dict:
    env = os.environ | {
        "OMP_NUM_THREADS": str(job["threads"]),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    env |= {"PYTHONPATH": str(ROOT)} if job["side"] == "ours" else {}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [python, __file__, "--worker", json.dumps(job | {"folder": folder}), "--json", str(result)]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        if done.returncode or not result.exists():
            lines = (done.stderr.strip() or done.stdout.strip() or "no word").splitlines()
            return {"failed": next((line for line in reversed(lines) if "Error" in line), lines[-1])}
        return json.loads(result.read_text())


def describe(found: dict) -> str:
    if "failed" in found:
        return f"failed: {found['failed'][:90]}"
    seconds = "".join(f"{part} {found[part]:6.2f}  " for part in ("total", "generate", "sync", "update"))
    return (
        f"{seconds}s   peak {found['peak']:5.2f} GB, resident {found['resident']:5.2f}   "
        f"{found['tokens'][-1]} tokens, |A| {found['advantages']:.3f}, gradient {found['grad_norms'][0]:.3f}"
    )


def compare(label: str, rows: dict[str, dict]) -> tuple[str, list[str], tuple[float, float] | None]:
    """Ratios of TRL to lightning_grpo, missed goals, and the two main ratios."""
    bad = [f"{label}: {side} did not run" for side in SIDES if "failed" in rows[side]]
    if bad:
        return "", bad, None
    theirs, ours = rows["TRL"], rows["ours"]
    if theirs["tokens"] != ours["tokens"]:
        bad.append(f"{label}: TRL trained on {theirs['tokens']} tokens per step, lightning_grpo on {ours['tokens']}")
    ratios = {part: theirs[part] / ours[part] for part in ("total", "generate", "update", "peak", "resident")}
    goals = {"total": GOALS[ours["precision"]], "peak": GOAL_MEMORY}
    bad += [
        f"{label}: TRL / ours {part} {ratios[part]:.2f}, goal {goal:g}"
        for part, goal in goals.items()
        if ratios[part] < goal
    ]
    text = "   ".join(f"{part} {ratio:.2f}" for part, ratio in ratios.items())
    return f"  TRL / ours: {text}", bad, (ratios["total"], ratios["peak"])


def add_work_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the work of a step, which are the same for all benchmarks of it."""
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--length", type=int, default=48, help="tokens per completion")
    parser.add_argument("--micro-batch", type=int, default=8, help="completions per forward and backward pass")
    parser.add_argument("--stories", type=int, default=1, help="word problems per prompt, of about 100 tokens each")
    parser.add_argument("--lora", type=int, default=0, help="rank of an adapter on all linear layers; 0: all weights")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, default=ROOT / "models/SmolLM2-135M-Instruct", help="a checkpoint's folder"
    )
    parser.add_argument("--peers", default=sys.executable, help="interpreter of the environment with TRL")
    parser.add_argument("--engines", nargs="+", default=["hf"], choices=["hf", "vllm"])
    parser.add_argument("--precisions", nargs="+", default=["bf16-mixed", "fp32"], choices=list(PRECISIONS))
    parser.add_argument(
        "--betas", nargs="+", type=float, default=[0.0, 0.04], help="coefficients of the KL to the reference"
    )
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--sides", nargs="+", default=SIDES, choices=SIDES)
    add_work_options(parser)
    parser.add_argument("--iterations", type=int, default=1, help="passes over each rollout")
    parser.add_argument("--steps", type=int, default=3, help="measured optimizer steps")
    parser.add_argument("--warm-up", type=int, default=1, help="optimizer steps before the measured ones")
    parser.add_argument("--quick", action="store_true", help="all threads, β 0, the faster precision here; one step")
    parser.add_argument(
        "--check",
        action="store_true",
        help="exit with 1 unless TRL takes 5 times (fp32: 3.5) our time, twice our memory",
    )
    parser.add_argument("--json", type=Path, help="write all measurements to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        args.json.write_text(json.dumps(worker(json.loads(args.worker))))
        return 0
    if args.quick:
        from lightning_grpo.processor import cores, fast_dtype

        args.precisions = ["bf16-mixed" if str(fast_dtype()) == "torch.bfloat16" else "fp32"]
        args.betas, args.threads, args.steps = [0.0], [cores()], 1
    results, bad, ratios = [], [], []
    names = ("prompts", "stories", "generations", "length", "micro_batch", "lora", "iterations", "steps", "warm_up")
    args.steps, args.warm_up = args.steps * args.iterations, args.warm_up * args.iterations
    with tempfile.TemporaryDirectory() as folder:
        model = endless_checkpoint(args.model, Path(folder) / "model")
        base = {name: vars(args)[name] for name in names} | {"model": str(model), "max_prompt": 64 + 128 * args.stories}
        cases = [
            {"engine": engine, "precision": precision, "beta": beta, "threads": threads}
            for engine in args.engines
            for precision in args.precisions
            for beta in args.betas
            for threads in args.threads
        ]
        for case in cases:
            label = "{engine}, {precision}, beta {beta:g}, threads {threads}".format(**case)
            print(label, flush=True)
            rows = {}
            for side in args.sides:
                job = base | case | {"side": side}
                rows[side] = job | measure(job, args.peers if side == "TRL" else sys.executable)
                if "failed" in rows[side] and side == "TRL" and job["engine"] == "vllm":
                    print(f"  TRL with vLLM {describe(rows[side])}; with transformers' generate:", flush=True)
                    job |= {"engine": "hf"}
                    rows[side] = job | measure(job, args.peers)
                print(f"  {side:5}{describe(rows[side])}", flush=True)
                results.append(rows[side])
            if len(rows) == len(SIDES):
                text, short, pair = compare(label, rows)
                bad += short
                ratios += [pair] if pair else []
                print(text, flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    for line in bad:
        print("goal missed:", line)
    took = "nothing to compare"
    if ratios:
        seconds, peaks = zip(*ratios, strict=True)
        took = f"TRL takes {min(seconds):.2f} to {max(seconds):.2f} times our seconds and "
        took += f"{min(peaks):.2f} to {max(peaks):.2f} times our peak memory"
    print(f"{len(results)} measurements; {took}; {len(bad)} goals missed")
    return int(bool(bad) and args.check)


if __name__ == "__main__":
    sys.exit(main())
