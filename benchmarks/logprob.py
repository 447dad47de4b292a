"""Time and memory from hidden states to GRPO's gradients, compared with other implementations.

Each measurement is a separate process that computes token log-probs and entropies (to be logged) from hidden states
[N, H] and a head [V, H], GRPO's loss from them (on-policy, clipped ratio, no KL term) and the gradients of both. Liger
returns no entropy. On a CPU it reports CPU-seconds, wall seconds and the growth of the peak resident memory; on a GPU
(`--device cuda`) ms, GB, TFLOP/s and the share of `--peak-tflops` that the matrix products reach. It also reports the
errors of a few tokens against float64 on the same inputs: |Δlogp|, their mean, and that of ∂loss/∂hidden, relative.

TRL 1.16 and Liger 0.8.5 are measured from the environment named by `--peers-python` (install `trl==1.16.0` and
`liger-kernel==0.8.5` in a separate environment), or from this one if it has them. If a peer is missing, its row
reports that, and `--check` fails.
"""

import argparse
import importlib
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# (H, V, sequences of 256 tokens): SmolLM2-135M, Qwen2.5-0.5B, Qwen2.5-1.5B
SHAPES = {"H576 V49k": (576, 49_152, 12), "H896 V152k": (896, 151_936, 8), "H1536 V152k": (1536, 151_936, 4)}
LENGTH = 256
OURS = ["ours", "ours, any loss", "ours, nothing kept"]
PEERS = ["naive", "compiled naive", "TRL selective", "TRL selective, fp32 softmax", "TRL chunked", "Liger"]
FROZEN = ["ours, frozen head", "naive, frozen head"]


# --- one measurement, in its own process ------------------------------------------------------------------------------


def grpo_loss(logprobs, advantages, mask):
    ratio = (logprobs - logprobs.detach()).exp()
    a = advantages[:, None]
    return -(((ratio * a).minimum(ratio.clamp(0.8, 1.2) * a)) * mask).sum() / mask.numel()


def path_function(name: str):
    """A function (hidden [B, T, H], weight, targets [B, T], mask, advantages [B]) -> (loss, entropy, logprobs).

    Liger's gives metrics in the place of the last two.
    """
    import torch
    from torch.nn.functional import linear

    if name.startswith("ours"):
        from lightning_grpo.kernels import blocks, linear_logprob

        if name == "ours, nothing kept":
            budget = blocks.budget
            blocks.budget = lambda **device: budget(**device)._replace(kept=0)

        def ours(hidden, weight, targets, mask, advantages):
            # On-policy the ratio is 1, whatever the log-probs: the loss's gradient is known ahead.
            known = -(advantages[:, None] / mask.numel()).expand(mask.shape)[mask] if name == "ours" else None
            active, entropy = linear_logprob(hidden[mask], weight, targets[mask], coefficient=known)
            logprobs = active.new_zeros(mask.shape).masked_scatter(mask, active)
            return grpo_loss(logprobs, advantages, mask), entropy, logprobs

        return ours

    if name in ("naive", "naive, frozen head", "compiled naive"):

        def naive(hidden, weight, targets, mask, advantages):
            logp = linear(hidden, weight).float().log_softmax(-1)
            entropy = -(logp.detach().exp() * logp.detach()).sum(-1)
            logprobs = logp.gather(2, targets[..., None]).squeeze(2)
            return grpo_loss(logprobs, advantages, mask), entropy, logprobs

        return torch.compile(naive) if name.startswith("compiled") else naive

    if name.startswith("TRL selective"):
        both = importlib.import_module("trl.trainer.utils").selective_log_softmax_and_entropy

        def selective(hidden, weight, targets, mask, advantages):
            logits = linear(hidden, weight)
            # In its trainer the softmax is in the head's precision, and rounds log-probs to it; ours never does.
            logits = logits.float() if name.endswith("fp32 softmax") else logits
            logprobs, entropy = both(logits, targets, entropy_requires_grad=False, row_mask=mask)
            return grpo_loss(logprobs.float(), advantages, mask), entropy, logprobs

        return selective

    if name == "TRL chunked":
        utils = importlib.import_module("trl.trainer.utils")

        def chunked(hidden, weight, targets, mask, advantages):
            # On a CPU its trainer scores every position, on a GPU those of the mask.
            keep = mask if hidden.is_cuda else torch.ones_like(mask)
            chunk = utils._CHUNKED_LOGPROB_CHUNK_SIZE
            found, entropy, *_ = utils._ChunkedLogProbFunction.apply(
                hidden[keep], weight, None, targets[keep], 1.0, chunk, None, 1.0, ("entropy",)
            )
            logprobs = found.new_zeros(mask.shape).masked_scatter(keep, found)
            return grpo_loss(logprobs, advantages, mask), entropy.detach(), logprobs

        return chunked

    fused = importlib.import_module("liger_kernel.chunked_loss.grpo_loss").LigerFusedLinearGRPOLoss
    options = {"beta": 0.0, "use_ref_model": False, "loss_type": "dr_grpo", "max_completion_length": LENGTH}
    return lambda hidden, weight, targets, mask, advantages: fused(**options)(
        hidden, weight, targets, mask.long(), advantages
    )


def peak_bytes(reset: bool = False) -> int:
    """Peak resident memory, optionally after resetting it to the current value (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def worker(job: dict) -> dict:
    import torch

    torch.set_num_threads(job["threads"])
    device, dtype = torch.device(job["device"]), getattr(torch, job["dtype"])
    g = torch.Generator().manual_seed(0)
    H, V, B = job["shape"]
    hidden = torch.randn(B, LENGTH, H, generator=g).to(device, dtype).requires_grad_()
    weight = (torch.randn(V, H, generator=g) * 2 / H**0.5).to(device, dtype)
    weight.requires_grad_("frozen" not in job["path"])
    targets = torch.randint(0, V, (B, LENGTH), generator=g).to(device)
    mask = (torch.arange(LENGTH).expand(B, -1) < round(LENGTH * job["active"])).to(device)
    advantages = torch.randn(B, generator=g).to(device)
    function = path_function(job["path"])

    def step(rows: int = B):
        hidden.grad = weight.grad = None
        loss, _, *logprobs = function(hidden[:rows], weight, targets[:rows], mask[:rows], advantages[:rows])
        loss.backward()
        return logprobs[0].detach() if logprobs else None

    def results(logprobs) -> dict:
        return norms(hidden, weight) | errors(logprobs, hidden, weight, targets, -advantages[0] / mask.numel())

    # Code that compiles itself needs the shapes that it will meet; the others only load their libraries.
    step(B if job["path"] in ("compiled naive", "Liger") else 1)
    hidden.grad = weight.grad = None
    if device.type == "cuda":
        return measure_gpu(step, torch) | results(step())
    import ctypes

    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = peak_bytes(reset=True)
    best = {}
    for repeat in range(job["repeats"]):
        wall, cpu = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
        logprobs = step()
        end = resource.getrusage(resource.RUSAGE_SELF)
        spent = (end.ru_utime - cpu.ru_utime) + (end.ru_stime - cpu.ru_stime)
        wall = time.perf_counter() - wall
        best = {"cpu_s": min(spent, best.get("cpu_s", spent)), "wall_s": min(wall, best.get("wall_s", wall))}
        if repeat == 0:
            memory = {"peak_gb": (peak_bytes() - before) / 1e9}
    return best | memory | results(logprobs)


def measure_gpu(step, torch) -> dict:
    for _ in range(3):
        step()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(10):
        step()
    end.record()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    return {"cpu_s": float("nan"), "wall_s": start.elapsed_time(end) / 1e4, "peak_gb": peak / 1e9}


def norms(hidden, weight) -> dict:
    """Norms of the gradients, which must be equal for all paths."""
    return {"norms": [float(x.grad.float().norm()) if x.grad is not None else None for x in (hidden, weight)]}


def errors(logprobs, hidden, weight, targets, coefficient, tokens: int = 32) -> dict:
    """Errors of the first ``tokens`` tokens against float64: mean |Δlogprob|, relative error of the gradient."""
    h, W, y = hidden.detach()[0, :tokens].double(), weight.detach().double(), targets[0, :tokens]
    logp = (h @ W.T).log_softmax(1)
    exact = coefficient * (W[y] - logp.exp() @ W)
    grad = hidden.grad[0, :tokens].double()
    found = {"grad_error": float((grad - exact).norm() / exact.norm())}
    if logprobs is not None:
        found["logprob_error"] = float((logprobs[0, :tokens] - logp.gather(1, y[:, None])[:, 0]).abs().mean())
    return found


# --- all of them ------------------------------------------------------------------------------------------------------


def measure(job: dict, python: str) -> dict:
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(job["threads"])}
    command = [python, __file__, "--worker", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        missing = "ModuleNotFoundError" in done.stderr and job["path"] in PEERS
        return {"missing" if missing else "failed": done.stderr.strip().splitlines()[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def describe(found: dict, job: dict, naive: dict | None, peak_tflops: float) -> str:
    if "wall_s" not in found:
        return f"{'missing' if 'missing' in found else 'failed'}: {next(iter(found.values()))[:70]}"
    H, V, B = job["shape"]
    tflops = (4 if "frozen" in job["path"] else 6) * B * LENGTH * job["active"] * H * V / found["wall_s"] / 1e12
    text = f"{found['wall_s']:9.3f} s wall {found['peak_gb']:7.3f} GB {tflops:8.3f} TFLOP/s"
    logprob_error = f"{found['logprob_error']:7.1e}" if "logprob_error" in found else "      -"
    text += f"   errors: logp {logprob_error}, grad {found['grad_error']:7.1e}"
    if job["device"] == "cuda":
        return text + f" {tflops / peak_tflops:6.0%} of {peak_tflops:g}"
    text = f"{found['cpu_s']:9.2f} CPU-s" + text
    if naive and "cpu_s" in naive:
        time_ratio, memory_ratio = (naive[key] / found[key] for key in ("cpu_s", "peak_gb"))
        text += f"   naive / this: time {time_ratio:5.2f}, memory {memory_ratio:5.1f}"
    return text


def shortfalls(label: str, rows: dict[str, dict], job: dict) -> list[str]:
    """The goals: as fast as the fastest, twice as fast as TRL and Liger in bfloat16, in no more memory than any.

    CPU-seconds count for one thread, wall seconds for more. A loss that is not known ahead must be as fast as any, too.
    """
    key = "cpu_s" if job["threads"] == 1 and job["device"] == "cpu" else "wall_s"
    ours, any_loss, bad = rows["ours"], rows.get("ours, any loss", {}), []
    if key not in ours:
        return [f"{label}: ours was not measured"]
    for name in peers(job["dtype"]):
        other = rows.get(name, {})
        if key not in other:
            bad.append(f"{label}: {name} was not measured")
            continue
        wanted = 2 if job["dtype"] != "float32" and "naive" not in name else 1
        # Two runs of the same thing differ by a few hundredths on a shared machine.
        if other[key] / ours[key] < wanted * 0.95:
            bad.append(f"{label}: {name}'s time is {other[key] / ours[key]:.2f} of ours, wanted {wanted}")
        if key in any_loss and other[key] / any_loss[key] < 0.95:
            bad.append(f"{label}: {name}'s time is {other[key] / any_loss[key]:.2f} of ours with any loss, wanted 1")
        if ours["peak_gb"] > other["peak_gb"] * 1.05:
            bad.append(f"{label}: {name} takes {other['peak_gb']:.2f} GB, ours {ours['peak_gb']:.2f}")
        for x, y in zip(ours["norms"], other["norms"], strict=True):
            if abs(x - y) > 0.03 * abs(y):
                bad.append(f"{label}: {name} has a gradient of norm {y:.4g}, ours {x:.4g}")
    return bad


def peers(dtype: str) -> list[str]:
    """Peers to measure. In fp32, TRL's softmax is in fp32 anyway, so the row for that is omitted."""
    return [name for name in PEERS if dtype != "float32" or not name.endswith("fp32 softmax")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--peers-python", default=sys.executable, help="interpreter of the environment with TRL and Liger"
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument(
        "--dtypes", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32", "float16"]
    )
    parser.add_argument(
        "--active", nargs="+", type=float, default=[1.0, 0.4, 0.2], help="fractions of tokens in the loss"
    )
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="CPU threads")
    parser.add_argument("--paths", nargs="+", default=OURS + PEERS + FROZEN, choices=OURS + PEERS + FROZEN)
    parser.add_argument("--repeats", type=int, default=2, help="number of repeats, of which the fastest counts")
    parser.add_argument("--peak-tflops", type=float, default=800.0, help="peak TFLOP/s of the GPU's matrix products")
    parser.add_argument(
        "--quick", action="store_true", help="the smallest shape, one thread, all and a fifth active, once"
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 if a goal is missed")
    parser.add_argument("--json", type=Path, help="write all measurements to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(json.loads(args.worker))))
        return 0
    if args.quick:
        args.shapes, args.active, args.threads = args.shapes[:1], [1.0, 0.2], [1]
        args.repeats = 1
    results, bad, speedups = [], [], []
    for shape in args.shapes:
        for dtype in args.dtypes:
            for active in args.active:
                for threads in args.threads if args.device == "cpu" else [1]:
                    label = f"{shape} N{SHAPES[shape][2] * LENGTH} {dtype} {active:.0%} active, threads: {threads}"
                    print(label, flush=True)
                    rows = {}
                    for path in args.paths:
                        if path in PEERS and path not in peers(dtype):
                            continue
                        job = {
                            "path": path,
                            "shape": SHAPES[shape],
                            "dtype": dtype,
                            "active": active,
                            "threads": threads,
                            "device": args.device,
                            "repeats": args.repeats,
                        }
                        peer = path.startswith(("TRL", "Liger"))
                        rows[path] = measure(job, args.peers_python if peer else sys.executable)
                        naive = rows.get("naive, frozen head" if "frozen" in path else "naive")
                        print(f"  {path:28}{describe(rows[path], job, naive, args.peak_tflops)}", flush=True)
                        results.append({**job, **rows[path]})
                        if args.json:
                            args.json.write_text(json.dumps(results, indent=1))
                    if "ours" in rows:
                        bad += shortfalls(label, rows, job)
                        others = [r["wall_s"] for p, r in rows.items() if p in PEERS and "wall_s" in r]
                        speedups += (
                            [min(others) / rows["ours"]["wall_s"]] if others and "wall_s" in rows["ours"] else []
                        )
    for line in bad:
        print("goal missed:", line)
    fastest = (
        f"the fastest other path takes {min(speedups):.2f} to {max(speedups):.2f} times ours" if speedups else "alone"
    )
    print(f"{len(results)} measurements; {fastest}; {len(bad)} goals missed")
    return int(bool(bad) and args.check)


if __name__ == "__main__":
    sys.exit(main())
