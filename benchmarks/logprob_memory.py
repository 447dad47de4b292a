"""Peak memory of the step from hidden states to gradients against the vocabulary and the number of tokens, with a plot.

It measures the kernel, and log_softmax over whole logits while those are smaller than `--naive-limit`. Each point is a
separate process (see logprob.py). Beyond the gradients themselves, [V, H] and [N, H], the kernel's memory must not grow
with N·V: `--check` fails if the rest exceeds the bytes allowed for a block and the kept logits by more than a tenth.
"""

import argparse
import json
import sys
from pathlib import Path

from logprob import LENGTH, measure

from lightning_grpo.kernels.blocks import budget

H = 576
VOCABULARIES = [8192, 16384, 32768, 65536, 131072, 262144]
TOKENS = [1024, 2048, 4096, 8192, 16384]
FIXED_TOKENS, FIXED_VOCABULARY = 2048, 32768


def point(path: str, V: int, N: int) -> dict:
    job = {"path": path, "shape": (H, V, N // LENGTH), "dtype": "bfloat16", "active": 1.0}
    found = measure({**job, "threads": 1, "device": "cpu", "repeats": 1}, sys.executable)
    if "peak_gb" not in found:
        raise RuntimeError(f"{path} at V {V}, N {N}: {found}")
    # The gradients, and fp32 sums and scaled copies of [N, H], are the answer's own size.
    gradients = 2 * V * H + 12 * N * H
    return {"path": path, "V": V, "N": N, "peak_gb": found["peak_gb"], "beyond_gb": found["peak_gb"] - gradients / 1e9}


def plot(curves: dict[str, list[dict]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, both = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    titles = {"V": f"vocabulary V, at N = {FIXED_TOKENS:,} tokens", "N": f"tokens N, at V = {FIXED_VOCABULARY:,}"}
    plain = lambda value, _: f"{value // 1024:.0f}k" if value >= 1024 else f"{value:g}"
    for axis, (variable, title) in zip(both, titles.items(), strict=True):
        ours, naive = (curves[f"{path} over {variable}"] for path in ("ours", "naive"))
        x = [p[variable] for p in ours]
        axis.plot([p[variable] for p in naive], [p["peak_gb"] for p in naive], "s-", color="tab:gray", label="naive")
        axis.plot(x, [p["peak_gb"] for p in ours], "o-", color="tab:blue", linewidth=2, label="ours")
        answer = [p["peak_gb"] - p["beyond_gb"] for p in ours]
        axis.plot(x, answer, "--", color="tab:blue", label="of these, gradients [V, H] and [N, H]")
        axis.set(xscale="log", yscale="log", xlabel=title, xticks=x)
        axis.set_yticks([0.01, 0.03, 0.1, 0.3, 1, 3])
        axis.minorticks_off()
        for which in (axis.xaxis, axis.yaxis):
            which.set_major_formatter(plain)
        axis.grid(alpha=0.3)
    both[0].set_ylabel("peak memory beyond the inputs, GB")
    both[0].legend()
    figure.suptitle(f"Log-probs, loss and both gradients: bfloat16, H = {H}, CPU")
    figure.savefig(file, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--png", type=Path, default=Path("logprob_memory.png"), help="file of the plot")
    parser.add_argument(
        "--naive-limit", type=float, default=2.0, help="size of the largest fp32 logits to compute, in GB"
    )
    parser.add_argument("--quick", action="store_true", help="three points per curve")
    parser.add_argument("--check", action="store_true", help="exit with 1 if the kernel's memory is not flat")
    parser.add_argument("--json", type=Path, help="write all points to this file")
    args = parser.parse_args()
    every = 2 if args.quick else 1
    grid = {
        "V": [(V, FIXED_TOKENS) for V in VOCABULARIES[::-1][::every][::-1]],
        "N": [(FIXED_VOCABULARY, N) for N in TOKENS[::-1][::every][::-1]],
    }
    curves = {}
    for path in ("ours", "naive"):
        for variable, points in grid.items():
            curve = curves[f"{path} over {variable}"] = []
            for V, N in points:
                if path == "naive" and args.naive_limit < 4e-9 * V * N:
                    continue
                found = point(path, V, N)
                curve.append(found)
                print(f"{path:6} V {V:7,} N {N:6,} {found['peak_gb']:7.3f} GB", flush=True)
    plot(curves, args.png)
    if args.json:
        args.json.write_text(json.dumps(curves, indent=1))
    # On a CPU: a chunk; logits, products and what the allocator holds on to, six blocks.
    sizes = budget(itemsize=2)
    allowed = 1.1 * (sizes.chunk + 6 * sizes.block) / 1e9
    ours = curves["ours over V"] + curves["ours over N"]
    most = max(ours, key=lambda p: p["beyond_gb"])
    logits = 4 * most["V"] * most["N"] / 1e9
    flat = most["beyond_gb"] <= allowed
    print(
        f"beyond the gradients ours takes at most {most['beyond_gb']:.3f} GB, {allowed:.3f} allowed (V {most['V']:,}, "
        f"N {most['N']:,}, fp32 logits {logits:.1f} GB): {'flat' if flat else 'NOT flat'}; plotted to {args.png}"
    )
    return int(args.check and not flat)


if __name__ == "__main__":
    sys.exit(main())
