"""Held-out accuracy over time and over samples, compared with TRL's GRPOTrainer on the quickstart's task.

Each run is a separate process that trains the same checkpoint on the same sums with the hyperparameters of
configs/quickstart.yaml: 8 prompts and 8 completions of each per step, the loss of Dr. GRPO, advantages without scaling,
AdamW at 1e-5, gradients clipped at 1, the precision that is fast on this processor. Both sides score completions with
the same function. Every few steps both are stopped while one and the same function measures the greedy accuracy on
held-out sums; this time does not count. The clock starts when training is called, so that it includes the start of an
engine. TRL samples with transformers' generate, its default, and lightning_grpo with the engine that `fit` chooses.

The seeds are run one after another, and the sides take turns at being the first. TRL is measured with the interpreter
named by `--peers`, which has trl==1.16.0.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SIDES = ["TRL", "ours"]
PROMPTS, GENERATIONS, MICRO_BATCH, LENGTH, LEARNING_RATE = 8, 8, 32, 20, 1e-5
HELD_OUT = 64
GOAL = 3.0
"""TRL's seconds to the mark relative to ours."""


# --- the work ---------------------------------------------------------------------------------------------------------


def write_sums(folder: Path) -> None:
    """Different sums of two digits for training and evaluation, as chat messages with the answer."""
    import reasoning_gym

    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    rows = reasoning_gym.create_dataset("chain_sum", seed=0, size=3000, **options)
    answers = {row["question"]: row["answer"] for row in rows}
    lines = [
        json.dumps({"prompt": [{"role": "user", "content": question}], "answer": answer})
        for question, answer in answers.items()
    ]
    (folder / "held_out.jsonl").write_text("\n".join(lines[:HELD_OUT]) + "\n")
    (folder / "train.jsonl").write_text("\n".join(lines[HELD_OUT:]) + "\n")


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


class Evaluation:
    """The curve of one run: accuracy after some steps, with the seconds of training until then."""

    def __init__(self, job: dict, tokenizer) -> None:
        from lightning_grpo.rewards import ExactMatch

        self.job, self.tokenizer = job, tokenizer
        self.rows = read(Path(job["folder"]) / "held_out.jsonl")
        self.reward = ExactMatch(extract="last_number")
        self.curve: list[dict] = []
        self.started, self.paused = time.perf_counter(), 0.0

    def after(self, step: int, model) -> None:
        """Measure if it is due after ``step`` optimizer steps."""
        if step % self.job["every"]:
            return
        now = time.perf_counter()
        accuracy = self.accuracy(model)
        seconds = now - self.started - self.paused
        self.curve.append({"step": step, "samples": step * PROMPTS * GENERATIONS, "seconds": seconds} | accuracy)
        self.paused += time.perf_counter() - now
        print(self.curve[-1], flush=True)

    def accuracy(self, model) -> dict[str, float]:
        """The share of right greedy answers."""
        import torch

        tokenizer, training = self.tokenizer, model.training
        model.eval()
        texts = [
            tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
            for row in self.rows
        ]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
        mixed = self.job["precision"] == "bf16-mixed"
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            ids = model.generate(**batch, max_new_tokens=LENGTH, do_sample=False)
        model.train(training)
        written = tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        right = self.reward(completions=written, answer=[row["answer"] for row in self.rows])
        return {"accuracy": statistics.mean(right)}


# --- one run, in its own process --------------------------------------------------------------------------------------


def run_trl(job: dict) -> list[dict]:
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from lightning_grpo.rewards import ExactMatch

    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    exact = ExactMatch(extract="last_number")

    def reward(completions, answer, **columns):
        return exact(completions=completions, answer=answer)

    class Steps(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            evaluation.after(state.global_step, model)

    config = GRPOConfig(
        output_dir=job["folder"] + "/trl",
        model_init_kwargs={"dtype": "float32"},
        bf16=job["precision"] == "bf16-mixed",
        use_cpu=True,
        seed=job["seed"],
        per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=PROMPTS * GENERATIONS // MICRO_BATCH,
        num_generations=GENERATIONS,
        max_completion_length=LENGTH,
        max_steps=job["steps"],
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        beta=0.0,
        loss_type="dr_grpo",
        scale_rewards="none",
        gradient_checkpointing=False,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=job["model"],
        args=config,
        reward_funcs=reward,
        train_dataset=Dataset.from_list(read(Path(job["folder"]) / "train.jsonl")),
        processing_class=tokenizer,
        callbacks=[Steps()],
    )
    evaluation = Evaluation(job, tokenizer)
    evaluation.after(0, trainer.model)
    trainer.train()
    return evaluation.curve


def run_ours(job: dict) -> list[dict]:
    import lightning
    import torch

    from lightning_grpo import GRPOModule, PromptDataModule
    from lightning_grpo.rewards import ExactMatch

    class Steps(lightning.Callback):
        def on_train_start(self, trainer, module):
            evaluation.after(0, module.policy)

        def on_train_batch_end(self, trainer, module, *args):
            if trainer.global_step > self.step:
                self.step = trainer.global_step
                evaluation.after(self.step, module.policy)

        step = 0

    lightning.seed_everything(job["seed"])
    module = GRPOModule(
        job["model"],
        [ExactMatch(extract="last_number")],
        num_generations=GENERATIONS,
        micro_batch_size=MICRO_BATCH,
        max_prompt_length=64,
        max_completion_length=LENGTH,
        optimizer=lambda p: torch.optim.AdamW(p, lr=LEARNING_RATE, weight_decay=0.0, fused=True),
    )
    trainer = lightning.Trainer(
        accelerator="cpu",
        precision=job["precision"],
        max_steps=job["steps"],
        max_epochs=-1,
        accumulate_grad_batches=PROMPTS * GENERATIONS // MICRO_BATCH,
        gradient_clip_val=1.0,
        default_root_dir=job["folder"],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Steps()],
    )
    data = PromptDataModule(str(Path(job["folder"]) / "train.jsonl"), prompts_per_rollout=PROMPTS)
    evaluation = Evaluation(job, module.tokenizer)
    trainer.fit(module, data)
    return evaluation.curve


def measure(job: dict, python: str, threads: int) -> list[dict]:
    env = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
    }
    result = Path(job["folder"]) / f"{job['side']}-{job['seed']}.json"
    command = [python, __file__, "--worker", json.dumps(job), "--json", str(result)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError(f"{job['side']}, seed {job['seed']}: {done.stderr.strip()[-2000:]}")
    return json.loads(result.read_text())


# --- all of them ------------------------------------------------------------------------------------------------------


def seconds_to(curve: list[dict], mark: float) -> float:
    """Seconds until the accuracy first reached ``mark``; infinite if it did not."""
    return next((point["seconds"] for point in curve if point["accuracy"] >= mark), math.inf)


def interval(curves: list[list[dict]], step: int) -> tuple[float, float, float]:
    """Accuracy after ``step`` steps over all seeds and held-out sums, and its Wilson interval at 95 %."""
    found = [point["accuracy"] for curve in curves for point in curve if point["step"] == step]
    p, n, z = statistics.mean(found), len(found) * HELD_OUT, 1.96
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return p, centre - half, centre + half


def plot(curves: dict[str, list[list[dict]]], mark: float, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True, constrained_layout=True)
    colors = {"TRL": "tab:gray", "ours": "tab:blue"}
    labels = {"TRL": "TRL 1.16", "ours": "lightning_grpo"}
    for axis, (x, title) in zip(axes, {"seconds": "minutes of training", "samples": "samples"}.items(), strict=True):
        unit = 60 if x == "seconds" else 1
        for side, runs in curves.items():
            for curve in runs:
                axis.plot([p[x] / unit for p in curve], [p["accuracy"] for p in curve], color=colors[side], alpha=0.35)
            points = list(zip(*runs, strict=True))
            mean = [[statistics.mean(p[key] for p in point) for point in points] for key in (x, "accuracy")]
            axis.plot([value / unit for value in mean[0]], mean[1], color=colors[side], linewidth=2, label=labels[side])
        axis.axhline(mark, color="black", linewidth=0.8, linestyle=":")
        axis.set(xlabel=title, ylim=(0, 1))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("held-out accuracy, greedy")
    axes[0].legend(loc="lower right")
    figure.savefig(file, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models/SmolLM2-135M-Instruct", help="its folder")
    parser.add_argument("--peers", default=sys.executable, help="interpreter of the environment with TRL")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps")
    parser.add_argument("--every", type=int, default=4, help="optimizer steps between two evaluations")
    parser.add_argument("--mark", type=float, default=0.7, help="accuracy to be reached")
    parser.add_argument("--precision", choices=["auto", "bf16-mixed", "32-true"], default="auto")
    parser.add_argument("--threads", type=int, help="threads; by default one per core")
    parser.add_argument("--png", type=Path, help="file of the plot")
    parser.add_argument("--quick", action="store_true", help="one seed, 12 steps, to an accuracy of 0.55")
    parser.add_argument("--check", action="store_true", help="exit with 1 unless ours takes a third of TRL's time")
    parser.add_argument("--json", type=Path, help="write all curves to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        job = json.loads(args.worker)
        args.json.write_text(json.dumps({"TRL": run_trl, "ours": run_ours}[job["side"]](job)))
        return 0
    if args.quick:
        args.seeds, args.steps, args.every, args.mark = 1, 12, 3, 0.55
    from lightning_grpo.processor import cores
    from lightning_grpo.trainer import resolved

    precision = resolved(args.precision, "cpu")
    curves: dict[str, list[list[dict]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        write_sums(Path(folder))
        for seed in range(args.seeds):
            for side in SIDES if seed % 2 else SIDES[::-1]:
                job = {"side": side, "seed": seed, "folder": folder, "model": str(args.model), "precision": precision}
                job |= {"steps": args.steps, "every": args.every}
                python = args.peers if side == "TRL" else sys.executable
                curves[side].append(measure(job, python, args.threads or cores()))
                last = curves[side][-1][-1]
                reached = seconds_to(curves[side][-1], args.mark)
                print(
                    f"seed {seed}  {side:5}{last['seconds']:7.0f} s for {last['step']} steps   accuracy "
                    f"{last['accuracy']:.2f}   {args.mark:g} reached after {reached:.0f} s",
                    flush=True,
                )
    if args.json:
        args.json.write_text(json.dumps(curves, indent=1))
    if args.png:
        plot(curves, args.mark, args.png)
    at_end = {side: interval(runs, args.steps) for side, runs in curves.items()}
    for side, (accuracy, low, high) in at_end.items():
        print(f"{side:5} accuracy after {args.steps} steps {accuracy:.3f}, 95 % interval {low:.3f} to {high:.3f}")
    times = {side: statistics.median(seconds_to(curve, args.mark) for curve in runs) for side, runs in curves.items()}
    ratio = times["TRL"] / times["ours"] if math.isfinite(times["ours"]) else math.nan
    overlap = at_end["TRL"][1] <= at_end["ours"][2] and at_end["ours"][1] <= at_end["TRL"][2]
    bad = [] if ratio >= GOAL else [f"TRL takes {ratio:.2f} times our seconds to {args.mark:g}, goal {GOAL:g}"]
    bad += [] if overlap else ["the intervals of the accuracy at the same number of samples don't overlap"]
    for line in bad:
        print("goal missed:", line)
    print(
        f"{args.seeds} seeds per side, {precision}: an accuracy of {args.mark:g} after {times['TRL']:.0f} s with TRL "
        f"and {times['ours']:.0f} s with lightning_grpo, a ratio of {ratio:.2f}; {len(bad)} goals missed"
    )
    return int(bool(bad) and args.check)


if __name__ == "__main__":
    sys.exit(main())
