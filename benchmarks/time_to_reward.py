"""Held-out accuracy over time and over samples, compared with TRL's GRPOTrainer on the quickstart's task.

Each run is a separate process that trains the same checkpoint on the same sums with the hyperparameters of
configs/quickstart.yaml: 8 prompts and 8 completions of each per step, the loss of Dr. GRPO, advantages without scaling,
AdamW at 1e-5, gradients clipped at 1, the precision that is fast on this processor. Both sides score completions with
the same function. Every few steps both are stopped while one and the same function measures the greedy accuracy on
held-out sums; this time does not count. The clock starts when training is called, so that it includes the start of an
engine. TRL samples with transformers' generate, its default, and lightning_grpo with the engine that `fit` chooses. A
run ends when its accuracy was at or above the mark in two evaluations in succession, or after `--steps` steps.

The seeds are run one after another, and the sides take turns at being the first. TRL is measured with the interpreter
named by `--peers`, which has trl==1.16.0.

The file of `--json` is written after each evaluation. The same command continues a benchmark that was ended: finished
runs in the file are kept, and an unfinished one begins anew. `--steps 0 --json FILE --png PLOT` only draws the plot.
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
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SIDES = ["TRL", "ours"]
PROMPTS, GENERATIONS, MICRO_BATCH, LENGTH, LEARNING_RATE = 8, 8, 32, 20, 1e-5
HELD_OUT = 64
GOAL = 3.0
"""TRL's seconds to the mark relative to ours."""
T_QUANTILES = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}
"""Of Student's distribution, for intervals at 95 % over as many seeds."""


# ── The work ──────────────────────────────────────────────────────────────────────────────────────────────────────────


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


class Results:
    """The file with the curves of all runs."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.found = json.loads(file.read_text()) if file.exists() else {"setup": {}, "runs": []}

    @property
    def runs(self) -> list[dict]:
        """The finished ones."""
        return [run for run in self.found["runs"] if run["finished"]]

    def curves(self, side: str) -> list[list[dict]]:
        return [run["curve"] for run in self.runs if run["side"] == side]

    def begin(self, setup: dict) -> None:
        """Continue with the runs in the file, which must have the same ``setup``."""
        before = self.found["setup"] or setup
        changed = [f"{name} {before[name]} → {value}" for name, value in setup.items() if before[name] != value]
        if changed:
            raise SystemExit(f"{self.file} has runs of another setup ({', '.join(changed)}); name another file")
        self.found["setup"] = setup
        self.write()

    def put(self, job: dict, curve: list[dict], *, finished: bool) -> None:
        """Store the curve of a run, which replaces an earlier one of the same side and seed."""
        side, seed = job["side"], job["seed"]
        others = [run for run in self.found["runs"] if (run["side"], run["seed"]) != (side, seed)]
        self.found["runs"] = [*others, {"side": side, "seed": seed, "finished": finished, "curve": curve}]
        self.write()

    def write(self) -> None:
        new = self.file.with_suffix(".new")
        new.write_text(json.dumps(self.found, indent=1) + "\n")
        new.replace(self.file)


class Evaluation:
    """The curve of one run: accuracy after some steps, with the seconds of training until then."""

    def __init__(self, job: dict, tokenizer) -> None:
        from lightning_grpo.rewards import ExactMatch

        self.job, self.tokenizer, self.results = job, tokenizer, Results(Path(job["json"]))
        self.rows = read(Path(job["folder"]) / "held_out.jsonl")
        self.reward = ExactMatch(extract="last_number")
        self.curve: list[dict] = []
        self.started, self.paused = time.perf_counter(), 0.0

    def after(self, step: int, model) -> bool:
        """Measure if it is due after ``step`` optimizer steps.

        Returns:
            Whether the run ends, because the mark was reached in this evaluation and the one before.
        """
        if step % self.job["every"] and step < self.job["steps"]:
            return False
        now = time.perf_counter()
        accuracy = self.accuracy(model)
        seconds = now - self.started - self.paused
        self.curve.append({"step": step, "samples": step * PROMPTS * GENERATIONS, "seconds": seconds} | accuracy)
        self.paused += time.perf_counter() - now
        reached = [point["accuracy"] >= self.job["mark"] for point in self.curve[-2:]] == [True, True]
        self.results.put(self.job, self.curve, finished=reached or step >= self.job["steps"])
        return reached

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


# ── One run, in its own process ───────────────────────────────────────────────────────────────────────────────────────


def run_trl(job: dict) -> None:
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
            control.should_training_stop |= evaluation.after(state.global_step, model)

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


def run_ours(job: dict) -> None:
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
                trainer.should_stop |= evaluation.after(self.step, module.policy)

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


def measure(job: dict, python: str, threads: int) -> None:
    env = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run([python, __file__, "--worker", json.dumps(job)], capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError(f"{job['side']}, seed {job['seed']}: {done.stderr.strip()[-2000:]}")


# ── All of them ───────────────────────────────────────────────────────────────────────────────────────────────────────


def seconds_to(curve: list[dict], mark: float) -> float:
    """Seconds until the accuracy reached ``mark`` and stayed at or above it; infinite if it did not."""
    reached = math.inf
    for point in reversed(curve):
        if point["accuracy"] < mark:
            break
        reached = point["seconds"]
    return reached


def interval(accuracies: Sequence[float]) -> tuple[float, float, float]:
    """Mean of the accuracies of all seeds and its interval at 95 %: Student's over seeds, or for a single one Wilson's
    over the held-out sums."""
    p, n = statistics.mean(accuracies), len(accuracies)
    if n > 1:
        half = T_QUANTILES.get(n, 1.96) * statistics.stdev(accuracies) / math.sqrt(n)
        return p, max(0.0, p - half), min(1.0, p + half)
    z, n = 1.96, HELD_OUT
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return p, centre - half, centre + half


def common_points(curves: list[list[dict]]) -> list[tuple[dict, ...]]:
    """The points of all ``curves`` at the steps that each of them reached."""
    steps = set.intersection(*({point["step"] for point in curve} for curve in curves))
    return list(zip(*([point for point in curve if point["step"] in steps] for curve in curves), strict=True))


def plot(results: Results, mark: float, file: Path) -> None:
    """Draw the accuracy over minutes and over samples: each seed thin, means over seeds thick with their intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "font.size": 11}
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True, constrained_layout=True)
    colors = {"TRL": "#767676", "ours": "#1f77b4"}
    labels = {"TRL": "TRL 1.16", "ours": "lightning_grpo"}
    for axis, x, title, unit in (axes[0], "seconds", "minutes of training", 60), (axes[1], "samples", "samples", 1):
        for side in SIDES:
            curves, color = results.curves(side), colors[side]
            for curve in curves:
                axis.plot([p[x] / unit for p in curve], [p["accuracy"] for p in curve], color=color, alpha=0.3, lw=1)
            points = common_points(curves)
            places = [statistics.mean(p[x] for p in point) / unit for point in points]
            mean, low, high = zip(*(interval([p["accuracy"] for p in point]) for point in points), strict=True)
            axis.plot(places, mean, color=color, lw=2.5, label=labels[side])
            axis.fill_between(places, low, high, color=color, alpha=0.12, lw=0)
        axis.axhline(mark, color="black", lw=0.8, ls=":")
        axis.set(xlabel=title, xlim=(0, None), ylim=(0, 1))
    axes[0].set_ylabel("share of held-out sums solved")
    axes[0].legend(loc="lower right", frameon=False)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def summarize(results: Results, mark: float) -> list[str]:
    """Print the figures of both sides, and return the goals that were missed."""
    curves = {side: results.curves(side) for side in SIDES}
    if not all(curves.values()):
        return ["there is no finished run of each side"]
    print(f"{'samples':>8}" + "".join(f"{side:>26}" for side in SIDES))
    for point in common_points([curve for side in SIDES for curve in curves[side]]):
        theirs, ours = point[: len(curves["TRL"])], point[len(curves["TRL"]) :]
        found = [interval([p["accuracy"] for p in side]) for side in (theirs, ours)]
        text = "".join(f"{f'{p:.3f} ({low:.3f} to {high:.3f})':>26}" for p, low, high in found)
        print(f"{point[0]['samples']:8}{text}")
    times = {side: sorted(seconds_to(curve, mark) for curve in curves[side]) for side in SIDES}
    for side in SIDES:
        print(f"{side}: seconds to {mark:g} by seed: {', '.join(f'{x:.0f}' for x in times[side])}")
    ratio = statistics.median(times["TRL"]) / statistics.median(times["ours"])
    (_, low, high), (_, our_low, our_high) = found
    bad = [] if ratio >= GOAL else [f"TRL takes {ratio:.2f} times our seconds to {mark:g}, goal {GOAL:g}"]
    if low > our_high or our_low > high:
        bad.append("the intervals of the accuracy at the last common number of samples don't overlap")
    print(f"medians over seeds: TRL takes {ratio:.2f} times our seconds to {mark:g}")
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models/SmolLM2-135M-Instruct", help="its folder")
    parser.add_argument("--peers", default=sys.executable, help="interpreter of the environment with TRL")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40, help="most optimizer steps of a run")
    parser.add_argument("--every", type=int, default=4, help="optimizer steps between two evaluations")
    parser.add_argument("--mark", type=float, default=0.7, help="accuracy to be reached")
    parser.add_argument("--precision", choices=["auto", "bf16-mixed", "32-true"], default="auto")
    parser.add_argument("--threads", type=int, help="threads; by default one per core")
    parser.add_argument("--png", type=Path, help="file of the plot")
    parser.add_argument("--quick", action="store_true", help="one seed, at most 15 steps, to an accuracy of 0.5")
    parser.add_argument("--check", action="store_true", help="exit with 1 unless ours takes a third of TRL's time")
    parser.add_argument("--json", type=Path, help="file of all curves; its finished runs are kept")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        job = json.loads(args.worker)
        {"TRL": run_trl, "ours": run_ours}[job["side"]](job)
        return 0
    if args.quick:
        args.seeds, args.steps, args.every, args.mark = 1, 15, 3, 0.5
    with tempfile.TemporaryDirectory() as folder:
        results = Results(args.json or Path(folder) / "curves.json")
        if args.steps:
            train(args, results, folder)
        else:
            args.mark = results.found["setup"].get("mark", args.mark)
        bad = summarize(results, args.mark)
        if args.png and results.runs:
            plot(results, args.mark, args.png)
    for line in bad:
        print("goal missed:", line)
    print(f"{len(results.runs)} runs; {len(bad)} goals missed")
    return int(bool(bad) and args.check)


def train(args: argparse.Namespace, results: Results, folder: str) -> None:
    """Train the runs that ``results`` lacks."""
    from lightning_grpo.processor import cores
    from lightning_grpo.trainer import resolved

    setup = {name: getattr(args, name) for name in ("steps", "every", "mark")} | {
        "model": args.model.name,
        "precision": resolved(args.precision, "cpu"),
        "threads": args.threads or cores(),
    }
    results.begin(setup)
    write_sums(Path(folder))
    for seed in range(args.seeds):
        for side in SIDES if seed % 2 else SIDES[::-1]:
            if any((run["side"], run["seed"]) == (side, seed) for run in results.runs):
                continue
            job = setup | {"side": side, "seed": seed, "folder": folder, "model": str(args.model.resolve())}
            job["json"] = str(results.file.resolve())
            measure(job, args.peers if side == "TRL" else sys.executable, setup["threads"])
            results.found = Results(results.file).found
            curve = results.curves(side)[-1]
            seconds = seconds_to(curve, args.mark)
            reached = f"reached after {seconds:.0f} s" if math.isfinite(seconds) else "not reached"
            print(
                f"seed {seed}  {side:5}{curve[-1]['seconds']:7.0f} s for {curve[-1]['step']} steps   accuracy "
                f"{curve[-1]['accuracy']:.2f}   {args.mark:g} {reached}",
                flush=True,
            )


if __name__ == "__main__":
    sys.exit(main())
