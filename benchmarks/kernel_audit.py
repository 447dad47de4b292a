"""Compile every variant of the Triton row kernels ahead of time, without a GPU, and inspect the result.

It reports registers, spills, shared memory, and the number of 128-bit loads and stores of a row, for NVIDIA sm_80,
sm_90, sm_100 and AMD gfx942, and then the table of `kernel_launches.py`. `--check` fails unless nothing spills, every
row access is 128 bits wide, and the launches meet their goals.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import kernel_launches
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightning_grpo.kernels import triton_rows
from lightning_grpo.kernels.softmax import FLOOR

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# (logits, what is written): fp32 logits from a head that the kernel multiplies itself, else a model's own logits.
DTYPES = [("fp32", "fp32"), ("fp32", "bf16"), ("fp32", "fp16"), ("bf16", "bf16"), ("fp16", "fp16")]
FLAGS = ("weights", "squares", "entropy")
LAUNCHED = [
    ("accumulate", {"weights": False, "squares": False}),
    ("accumulate", {"weights": True, "squares": False}),
    ("accumulate", {"weights": False, "squares": True}),
    ("gradient", {"entropy": False}),
    ("gradient", {"entropy": True}),
    ("join", {}),
]
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def variants(quick: bool) -> list[dict]:
    """Every (kernel, dtypes, flags) that the package can launch; quick: in bf16, all off or the cap and one on."""
    every = [
        {"kernel": kernel, "logits": logits, "out": out, "capped": capped, **flags}
        for (kernel, flags), (logits, out), capped in itertools.product(LAUNCHED, DTYPES, (False, True))
    ]
    # It reads and writes gradients only.
    every = [v for v in every if v["kernel"] != "join" or (v["logits"] == v["out"] and not v["capped"])]
    if not quick:
        return every
    return [v for v in every if v["out"] == "bf16" and v["capped"] == any(v.get(flag) for flag in FLAGS)]


def compile_variant(variant: dict, target: GPUTarget):
    function = getattr(triton_rows, f"_{variant['kernel']}_kernel")
    names = function.arg_names
    written = dict.fromkeys(("w_ptr", "out_ptr", "g_ptr"), variant["out"])
    pointers = {"a_ptr": variant["logits"], "targets_ptr": "i64"} | written
    signature = {
        name: "constexpr" if name.isupper() else f"*{pointers.get(name, 'fp32')}" if name.endswith("_ptr") else "i32"
        for name in names
    }
    constants = {"FLOOR": FLOOR, "SLACK": triton_rows.SLACK, "CAPPED": variant["capped"]}
    constants |= {"TILE": 8 * triton_rows.WARPS * target.warp_size}
    constants |= {k.upper(): v for k, v in variant.items() if k in FLAGS}
    constants = {name: value for name, value in constants.items() if name in names}
    # What the package allocates: rows at multiples of 64 columns, blocks that begin at one; the width is any.
    even = [
        i for i, name in enumerate(names) if name.endswith(("_ptr", "_stride")) or name in ("first", "room", "block")
    ]
    attributes = {(i,): [["tt.divisibility", 16]] for i in even}
    return triton.compile(
        ASTSource(function, signature, constants, attributes), target, {"num_warps": triton_rows.WARPS}
    )


def whole(variant: dict) -> tuple[int, int]:
    """Number of 128-bit loads and stores that move the eight columns of a lane, in all loops together."""
    accesses = lambda dtype: 8 * BYTES[dtype] // 16
    if variant["kernel"] == "accumulate":
        loops = 1 + variant["weights"]
        return loops * accesses(variant["logits"]), 2 * variant["weights"] * accesses(variant["out"])
    return accesses(variant["logits"]), accesses(variant["out"])


def audit(job: tuple[str, dict]) -> dict:
    arch, variant = job
    kernel = compile_variant(variant, TARGETS[arch])
    found = read_amd(kernel.asm["amdgcn"]) if arch.startswith("gfx") else read_nvidia(kernel.asm["cubin"])
    counts = [found.pop(op)[128] for op in ("loads", "stores")]
    split = sum(max(expected - n, 0) for n, expected in zip(counts, whole(variant), strict=True))
    wide = {"loads_128": counts[0], "stores_128": counts[1], "split": split}
    return {"arch": arch, **variant, **found, "shared": kernel.metadata.shared, **wide}


def read_nvidia(cubin: bytes) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = lambda tool, *args: (
            subprocess.run([TOOLS / tool, *args, file.name], capture_output=True, text=True, check=True).stdout
        )
        usage, sass = run("cuobjdump", "-res-usage"), run("nvdisasm", "-c")
    number = lambda name: int(re.search(rf"{name}:(\d+)", usage)[1])
    widths = lambda op: Counter(
        next((int(part) for part in name.split(".") if part in ("64", "128")), 32)
        for name in re.findall(rf"\b({op}\.[\w.]+)", sass)
    )
    spills = number("STACK") + number("LOCAL") + len(re.findall(r"\b(?:LDL|STL)\b", sass))
    return {"registers": number("REG"), "spills": spills, "loads": widths("LDG"), "stores": widths("STG")}


def read_amd(assembly: str) -> dict:
    number = lambda name: int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])
    bits = {"dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}
    widths = lambda op: Counter(bits.get(name, 16) for name in re.findall(rf"(?:global|buffer)_{op}_(\w+)", assembly))
    spills = number("vgpr_spill_count") + number("sgpr_spill_count")
    return {"registers": number("vgpr_count"), "spills": spills, "loads": widths("load"), "stores": widths("store")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="only bfloat16 outputs, flags all off or all on, one model"
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 if a goal is missed")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is 1, which compiles nothing; unset it")
    jobs = list(itertools.product(TARGETS, variants(args.quick)))
    results = []
    columns = f"{'regs':>5}{'spills':>7}{'shared':>7} 128-bit split"
    print(f"{'arch':7}{'kernel':11}{'logits':7}{'out':5}{'flags':17}{columns}")
    for job in jobs:
        row = audit(job)
        results.append(row)
        flags = " ".join(name for name in ("capped", "weights", "squares", "entropy") if row.get(name))
        print(
            f"{row['arch']:7}{row['kernel']:11}{row['logits']:7}{row['out']:5}{flags:17}{row['registers']:5}"
            f"{row['spills']:7}{row['shared']:7}{row['loads_128']:5} + {row['stores_128']:<2}{row['split']:3}",
            flush=True,
        )
    launches, missed = kernel_launches.table(args.quick)
    if args.json:
        args.json.write_text(json.dumps({"kernels": results, "launches": launches}, indent=1))
    for line in missed:
        print("goal missed:", line)
    bad = [row for row in results if row["spills"] or row["split"]]
    most = {arch: max(row["registers"] for row in results if row["arch"] == arch) for arch in TARGETS}
    registers = ", ".join(f"{n} on {arch}" for arch, n in most.items())
    print(
        f"{len(results)} kernels compiled, {len(bad)} with a spill or a split row access; most registers: {registers}; "
        f"{len(missed)} goals of launches missed"
    )
    return int(bool(bad or missed) and args.check)


if __name__ == "__main__":
    sys.exit(main())
