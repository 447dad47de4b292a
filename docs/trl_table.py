"""Generate docs/coming-from-trl.md: ``python docs/trl_table.py > docs/coming-from-trl.md``."""

import json
from collections.abc import Iterable

from lightning_grpo.cli.trl.options import GRPO_CONFIG, SCRIPT, TRAINING_ARGUMENTS, Row

TOP = """\
# Coming from TRL

<!-- Generated from the code by `python docs/trl_table.py`. -->

`lightning-grpo convert-trl` converts the YAML file of `trl grpo`, or the keyword arguments of a `GRPOConfig` in JSON:

```bash
lightning-grpo convert-trl grpo.yaml > my_run.yaml
lightning-grpo fit --config my_run.yaml
```

`my_run.yaml` sets every option whose default differs, with a comment above it. What has no equivalent is listed at its
top. TRL takes the model, the data set and the rewards as arguments of `GRPOTrainer`: if the file does not name them, set
`model.model`, `data.source` and `model.rewards`. For a run on several GPUs add `--devices N`.

`configs/trl.yaml` contains TRL 1.16's defaults alone. With it, the same batch gives the same loss and gradient as in TRL:

```bash
lightning-grpo fit --config configs/base.yaml --config configs/trl.yaml
```

A reward function needs no change: it gets `prompts`, `completions`, `completion_ids`, the columns of the data set,
`trainer_state`, `log_metric` and `log_extra`, and returns one number per completion, or None if it does not apply
([docs/rewards.md](rewards.md)). The functions of `tools=` and the objects of `environment_factory=` run unchanged in
`ToolEnvironment` and `TRLEnvironment` ([docs/environments.md](environments.md)).

## Traps

These differences change results without an error message. `convert-trl` and `configs/trl.yaml` take care of the first.

| topic | TRL 1.16 | lightning_grpo |
|---|---|---|
| defaults | `loss_type: dapo`, `scale_rewards: group`, linear decay, clipping at 1, rollout correction and KL weighting on | `dr_grpo`, `none`, constant, no clipping, off |
| `loss_type: dapo` | clips at 0.2 on both sides | clips at 0.2 and 0.28, as in the paper |
| `loss_type: grpo` | β is 0 | β is 0.04, which loads a reference model |
| `loss_type: cispo` | weights are capped at `epsilon`, unless `epsilon_high` is set | weights are capped at 5 |
| `generation_batch_size` | completions | `data.prompts_per_rollout` counts prompts |
| `eval_steps` | optimizer steps | `trainer.val_check_interval` counts micro-batches: multiply by `accumulate_grad_batches` |
| `per_device_eval_batch_size` | completions | `data.validation_batch_size` counts prompts |
| `num_generations_eval` | as many as in training | `model.validation_generations` is 1 |
| `max_completion_length` | 512 | 256 |
| `top_p`, `top_k`, `min_p`, `repetition_penalty` | allowed in training | refused, because the gradient would be biased; allowed in `validation_sampling` |
| `weight_decay` | not for norms and biases | for all parameters, unless `decay_norms_and_biases: false` |
| `gradient_checkpointing` | on | off; on GPUs it switches the sharing of prompts off |
| dropout | as in the checkpoint | always off |
| mixture of experts | adds a load-balancing loss | adds none |
| logged values | means over `logging_steps` steps | values of one step |
| prompts too long | earlier versions cut them | dropped, and their number is logged |
| reward models | a model's name as a reward | `{class_path: RewardModel, init_args: {model: …}}` |
| the end of a run | the model in `output_dir` | the model in `checkpoints/last`, beside checkpoints for an exact resume |

[docs/metrics.md](metrics.md) describes the logged metrics.
"""


def table(rows: Iterable[Row]) -> str:
    """The rows as a Markdown table, without options that have neither an equivalent nor a note."""
    lines = ["| TRL (default) | lightning_grpo | note |", "|---|---|---|"]
    for row in rows:
        ours = ", ".join(f"`{option}`" for option in row.ours.split(", ")) if row.ours else "–"
        if row.ours or row.note:
            lines.append(f"| `{row.name}` ({json.dumps(row.default)}) | {ours} | {row.note} |")
    return "\n".join(lines)


def page() -> str:
    """The page."""
    others = ", ".join(f"`{row.name}`" for row in TRAINING_ARGUMENTS if not row.ours and not row.note)
    return "\n".join([
        TOP,
        f"## GRPOConfig\n\nAll {len(GRPO_CONFIG)} fields. – means that there is no equivalent option.\n",
        table(GRPO_CONFIG),
        "\n## TrainingArguments\n",
        table(TRAINING_ARGUMENTS),
        f"\nThe others have no equivalent: {others}.\n",
        "## The script `trl grpo`\n",
        table(SCRIPT),
        "",
    ])  # fmt: skip


if __name__ == "__main__":
    print(page(), end="")
