"""What a run records: exactly the samples that it was trained on, whatever happens to it."""

import json
import logging
import multiprocessing
import os
import signal
import threading

import pyarrow as pa
import pytest
import torch
from engines import CopyRollout
from fitting import AHEAD, checksum, data, fit, module
from lightning import Callback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from lightning_grpo import GRPOModule
from lightning_grpo.errors import UserError
from lightning_grpo.monitor.checkpoint import Checkpoint
from lightning_grpo.record import Record, read_run, show
from lightning_grpo.record.background import CAPACITY, Background
from lightning_grpo.record.files import SampleFiles
from lightning_grpo.record.schema import COLUMNS
from lightning_grpo.rollout.seeds import rollout_seeds

WHAT = ["step", "rollout", "group", "index", "prompt", "completion", "reward", "advantage", "version_min", "seed"]


def recorded(root, model, *, steps=4, options=None, record=None, **further):
    """Train with two optimizer steps of 16 completions per rollout, and read the record."""
    settings = {"rewards": [checksum], "micro_batch_size": 8} | (options or {})
    callbacks = [record or Record(print_every=0), *further.pop("callbacks", [])]
    policy = further.pop("policy", None) or module(model, **settings)
    logged = fit(root, policy, steps=steps, accumulate=2, callbacks=callbacks, **further)
    return read_run(policy.trainer.log_dir or root), logged, policy


def rows(run):
    return run.samples(WHAT).to_pylist()


# ── Which samples ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_each_step_has_its_samples_and_metrics(tmp_path, tiny_model_path):
    run, logged, policy = recorded(tmp_path, tiny_model_path, record=Record(print_every=0, logprobs=True))
    table = run.samples()
    assert run.warnings == []
    assert table["step"].to_pylist() == [step for step in (1, 2, 3, 4) for _ in range(16)]
    assert table["rollout"].to_pylist() == [0] * 32 + [1] * 32
    assert table["group"].to_pylist() == [group for group in range(8) for _ in range(4)] * 2
    assert table["index"].to_pylist() == [0, 1, 2, 3] * 16
    assert table["version_max"].to_pylist() == [0] * 32 + [2] * 32
    prompts = {prompt.index: prompt.messages for prompt in policy.trainer.datamodule.train}
    of_seed = {rollout_seeds(policy.seed, n, i, g): prompts[i] for n in (0, 1) for i in prompts for g in range(4)}
    tokenizer = policy.tokenizer
    for row in table.to_pylist():
        assert tokenizer.decode(row["prompt_ids"]) == row["prompt"] == of_seed[row["seed"]]
        written = [token for token in row["completion_ids"] if token not in (tokenizer.eos_token_id, 0)]
        assert tokenizer.decode(written) == row["completion"]
        assert row["reward"] == row["rewards/checksum"] == pytest.approx(checksum([row["completion_ids"]])[0])
        assert row["finish_reason"] == ("length" if row["truncated"] else "stop")
        assert row["truncated"] == (row["completion_ids"][-1] != tokenizer.eos_token_id)
        assert len(row["engine_logprobs"]) == len(row["completion_ids"])
        assert len(row["trainer_logprobs"]) == len(row["completion_ids"])
    means = table.group_by("step").aggregate([("reward", "mean")]).sort_by("step")["reward_mean"].to_pylist()
    assert [line["reward"] for line in run.metrics] == pytest.approx(means)
    for name in ("loss", "grad_norm", "entropy", "time/rollout"):
        assert [line[name] for line in run.metrics] == logged[name]
    assert run.info["model"] == tiny_model_path
    assert run.info["reward_names"] == ["checksum"]
    assert run.info["resumed_from"] is None


def test_log_probs_of_the_trainer_are_those_of_its_update(tmp_path, tiny_model_path):
    record = Record(print_every=0, logprobs=True)
    run, _, _ = recorded(tmp_path, tiny_model_path, steps=2, record=record, options={"micro_batch_size": 16})
    samples = run.samples().to_pylist()
    assert len(samples) == 64
    for row in samples:
        if row["trainer_logprobs"] is None:
            assert row["advantage"] == 0
        else:
            assert row["trainer_logprobs"] == pytest.approx(row["engine_logprobs"], abs=1e-4)
    assert sum(row["trainer_logprobs"] is not None for row in samples) > 32


def constant(completion_ids):
    """A reward without spread in some groups, which are resampled or skipped."""
    return [float(sum(ids) % 7 > 4) for ids in completion_ids]


@pytest.mark.parametrize(
    "options",
    [{"num_iterations": 2}, {"rewards": [constant]}, {"rewards": [constant], "resampling_rounds": 2}, AHEAD],
    ids=["two passes", "skipped rows", "resampled groups", "rollout ahead"],
)
def test_each_trained_completion_is_recorded_once(tmp_path, tiny_model_path, options):
    trained = []

    class Spy(GRPOModule):
        def compute_advantages(self, rewards, rollout):
            trained.append((rollout.written_ids(), rewards[:, 0].tolist()))
            return super().compute_advantages(rewards, rollout)

    policy = module(tiny_model_path, Spy, **{"rewards": [checksum]} | options)
    rollout = CopyRollout() if options is AHEAD else None
    run, _, _ = recorded(tmp_path, tiny_model_path, steps=8, policy=policy, rollout=rollout)
    table = run.samples()
    steps = 4 if "num_iterations" in options else 8
    assert table.num_rows == 16 * steps
    assert table["completion_ids"].to_pylist() == [ids for written, _ in trained for ids in written]
    assert table["reward"].to_pylist() == pytest.approx([reward for _, rewards in trained for reward in rewards])
    steps_of_samples = [1, 2, 5, 6] if "num_iterations" in options else range(1, 9)
    assert sorted(set(table["step"].to_pylist())) == [*steps_of_samples]
    prompts = {prompt.index: prompt.messages for prompt in policy.trainer.datamodule.train}
    of_seed = {rollout_seeds(policy.seed, n, i, g): prompts[i] for n in range(4) for i in prompts for g in range(4)}
    assert table["prompt"].to_pylist() == [of_seed[seed] for seed in table["seed"].to_pylist()]
    age = [
        step - 1 - version
        for step, version in zip(*(table[c].to_pylist() for c in ("step", "version_min")), strict=True)
    ]
    assert max(age) == (3 if options is AHEAD else 1)


# ── Runs that end early ───────────────────────────────────────────────────────────────────────────────────────────


class Dies(Callback):
    """Ends the process, or the run, in a micro-batch."""

    def __init__(self, batch, kill):
        self.batch, self.kill = batch, kill

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == self.batch:
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyError("ended by the test")


def resumable(root, model, *, same_folder, dies=None, steps=6):
    """Train, with a checkpoint after every second step, or resume from the last one."""
    checkpoint = Checkpoint(str(root / "checkpoints"), every_n_train_steps=2)
    starts = len(list(root.glob("logs/*")))
    return fit(
        root, module(model, rewards=[checksum]), steps=steps, accumulate=2,
        callbacks=[checkpoint, Record(print_every=0), *([dies] if dies else [])], enable_checkpointing=True,
        ckpt_path="last" if (root / "checkpoints").exists() else None,
        logger=False if same_folder else CSVLogger(root, "logs", version=starts),
    )  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_model_path):
    root = tmp_path_factory.mktemp("whole")
    resumable(root, tiny_model_path, same_folder=True)
    return read_run(root)


@pytest.mark.parametrize("same_folder", [True, False], ids=["same folder", "next folder"])
def test_a_resumed_run_has_no_double_and_no_missing_row(tmp_path, tiny_model_path, uninterrupted, same_folder):
    # an error after step 3, whose samples are written though the run goes on from step 2; then again after step 5
    for batch in (5, 9):
        with pytest.raises(KeyError):
            resumable(tmp_path, tiny_model_path, same_folder=same_folder, dies=Dies(batch, kill=False))
    if not same_folder:
        assert read_run(tmp_path / "logs/version_0").samples(["step"])["step"].to_pylist()[-1] == 3
    resumable(tmp_path, tiny_model_path, same_folder=same_folder)
    run = read_run(tmp_path)
    assert rows(run) == rows(uninterrupted)
    assert [line["step"] for line in run.metrics] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in run.metrics] == [line["loss"] for line in uninterrupted.metrics]
    assert run.warnings == []
    parent = None if same_folder else {"folder": "../version_1", "step": 4}
    assert run.info["resumed_from"] == parent


@pytest.mark.slow
def test_a_killed_run_has_no_double_and_no_missing_row(tmp_path, tiny_model_path, uninterrupted):
    context = multiprocessing.get_context("spawn")
    options = {"same_folder": False, "dies": Dies(9, kill=True)}
    child = context.Process(target=resumable, args=(tmp_path, tiny_model_path), kwargs=options)
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL
    # a line that the kill cut off, and a file that it left
    folder = tmp_path / "logs/version_0"
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "rew')
    (folder / "samples/.rank0-000009.parquet.part").write_bytes(b"PAR1")
    resumable(tmp_path, tiny_model_path, same_folder=False)
    assert rows(read_run(tmp_path)) == rows(uninterrupted)


def test_a_run_that_was_moved_finds_what_it_continues(tmp_path, tiny_model_path):
    first, second = tmp_path / "first", tmp_path / "second"
    resumable(first, tiny_model_path, same_folder=False, steps=2)
    first.rename(second)
    resumable(second, tiny_model_path, same_folder=False, steps=4)
    run = read_run(second)
    assert [line["step"] for line in run.metrics] == [1, 2, 3, 4]
    assert run.info["resumed_from"] == {"folder": "../version_0", "step": 2}


def test_a_new_run_in_the_same_folder_keeps_the_earlier_record(tmp_path, tiny_model_path):
    earlier, _, _ = recorded(tmp_path, tiny_model_path, steps=2)
    samples = rows(earlier)
    later, _, _ = recorded(tmp_path, tiny_model_path, steps=1)
    assert [line["step"] for line in later.metrics] == [1]
    assert rows(later) == samples[:16]
    assert rows(read_run(tmp_path / "earlier-1")) == samples
    assert later.info["id"] != earlier.info["id"]


# ── What can go wrong ─────────────────────────────────────────────────────────────────────────────────────────────


def test_training_goes_on_if_nothing_can_be_written(tmp_path, tiny_model_path, caplog):
    class Obstructs(Callback):
        def on_train_start(self, trainer, pl_module):
            (tmp_path / "samples").write_text("a file where the folder should be")

        def on_train_batch_end(self, trainer, pl_module, *args):
            record = next(c for c in trainer.callbacks if isinstance(c, Record))
            record._background.flush(30)

    _, logged, _ = recorded(tmp_path, tiny_model_path, callbacks=[Obstructs()])
    assert len(logged.steps) == 4
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "written" in r.getMessage()]
    assert warnings == ["Samples and metrics of the run are no longer written: File exists. The run goes on"]


@pytest.mark.usefixtures("files_of_one_megabyte")
def test_a_full_disk_leaves_whole_files(tmp_path):
    files = SampleFiles(tmp_path, rank=0, max_bytes=2**30)
    files.append(samples(1, ["short"]))
    files.write()
    noise = [os.urandom(2**19).hex() for _ in range(8)]
    files.append(samples(2, noise))
    with pytest.raises(OSError, match="too large"):
        files.write()
    (tmp_path / "metrics.jsonl").touch()
    run = read_run(tmp_path)
    assert run.samples(["completion"])["completion"].to_pylist() == ["short"]
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["rank0-000000.parquet"]


def samples(step, completions, **columns):
    table = pa.Table.from_pylist([{"step": step, "completion": text} for text in completions], schema=COLUMNS)
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values))
    return table


def test_the_size_of_the_samples_is_limited(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    files = SampleFiles(tmp_path, rank=0, max_bytes=80_000)
    for step in range(1, 41):
        files.append(samples(step, [os.urandom(3000).hex()]))
        files.write()
        assert sum(path.stat().st_size for path in files.folder.iterdir()) <= 80_000
    (tmp_path / "metrics.jsonl").touch()
    kept = read_run(tmp_path).samples(["step"])["step"].to_pylist()
    assert kept == [*range(kept[0], 41)]
    assert 1 < kept[0] < 30
    assert [r.getMessage() for r in caplog.records] == [
        "The samples exceed record.max_gib; the oldest are deleted from now on, first rank0-000000.parquet"
    ]


def test_what_rewards_log_may_change_its_type(tmp_path):
    files = SampleFiles(tmp_path, rank=0, max_bytes=2**30)
    files.append(samples(1, ["a"], **{"extra/answer": [1.5]}))
    files.append(samples(2, ["b"], **{"extra/answer": ["x"]}))
    files.append(samples(3, ["c"]))
    files.write()
    (tmp_path / "metrics.jsonl").touch()
    assert read_run(tmp_path).samples(["extra/answer"])["extra/answer"].to_pylist() == ["1.5", "x", None]


def test_a_slow_disk_never_delays_the_run(caplog):
    may_go_on, done = threading.Event(), []
    background = Background(lambda: None, seconds=30, what="samples")
    background.submit(may_go_on.wait)
    for n in range(CAPACITY + 50):
        background.submit(lambda n=n: done.append(n))
    background.flush(0.01)
    may_go_on.set()
    background.close(30)
    assert done == sorted(done)
    assert CAPACITY - 1 <= len(done) < CAPACITY + 50
    assert [r.getMessage() for r in caplog.records] == [
        "samples can't be written as fast as training produces them; some are left out",
        "samples were not written within 0.01 seconds; the run goes on",
    ]


def test_nothing_is_recorded_without_training(tmp_path, tiny_model_path):
    policy = module(tiny_model_path, rewards=[checksum])
    fit(tmp_path, policy, data(validation_size=4), callbacks=[Record()], limit_val_batches=1.0, fast_dev_run=True)
    policy.trainer.validate(policy, datamodule=policy.trainer.datamodule, verbose=False)
    policy.trainer.predict(policy, datamodule=policy.trainer.datamodule)
    assert list(tmp_path.iterdir()) == []


def test_held_out_metrics_are_lines_of_their_own(tmp_path, tiny_model_path):
    run, _, _ = recorded(
        tmp_path, tiny_model_path, prompts=data(validation_size=4), limit_val_batches=1.0, num_sanity_val_steps=-1,
        val_check_interval=4, check_val_every_n_epoch=None,
    )  # fmt: skip
    assert [line["step"] for line in run.held_out] == [0, 2, 4]
    assert all(0 <= line["val/reward"] <= 1 for line in run.held_out)
    assert not any(name.startswith("val/") for line in run.metrics for name in line)


@pytest.mark.parametrize("options", [{"max_gib": 0.0}, {"print_every": -1}], ids=["max_gib", "print_every"])
def test_options_are_checked(options):
    with pytest.raises(UserError, match=rf"record\.{next(iter(options))} is"):
        Record(**options)


# ── Showing samples ───────────────────────────────────────────────────────────────────────────────────────────────


def test_texts_of_the_model_do_not_control_the_terminal():
    hostile = "\x1b[31m[red]x[/red] [/] \r\n\u202ereversed\u2028 \\ 你好"
    table = samples(1, [hostile, *"bcdef"], **{"extra/a": [hostile, *"bcdef"]})
    table = table.set_column(table.column_names.index("advantage"), "advantage", pa.array([1.0, 0, 0, 0, 0, -1.0]))
    text = show.render(show.choose(table), 1, width=200)
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert r"\x1b[31m[red]x[/red] [/] \r\n\u202ereversed\u2028 \ 你好" in text
    completions = show.choose(table)["completion"].to_pylist()
    assert completions == [hostile, "b", "e", "f"]


class Tables(Logger):
    """A logger that takes tables, as W&B's does."""

    name, version = "tables", 0

    def __init__(self):
        super().__init__()
        self.logged = []

    def log_hyperparams(self, *args, **kwargs):
        """Not needed."""

    def log_metrics(self, metrics, step=None):
        """Not needed."""

    def log_table(self, key, columns, data, step):
        self.logged.append((key, columns, data, step))


class Breaks(Tables):
    def log_table(self, key, columns, data, step):
        raise ConnectionError("no network")


def test_samples_are_printed_and_logged(tmp_path, tiny_model_path, capsys, caplog):
    tables, board = Tables(), TensorBoardLogger(tmp_path, "board", version=0)
    loggers = [board, tables, Breaks()]
    run, _, _ = recorded(tmp_path, tiny_model_path, record=Record(print_every=3), logger=loggers)
    printed = capsys.readouterr().err
    assert [f"samples of step {step}\n" in printed for step in (1, 2, 3, 4)] == [True, False, True, False]
    best = max(run.samples(["advantage", "completion"], steps=[3]).to_pylist(), key=lambda row: row["advantage"])
    assert show.escaped(best["completion"]) in printed
    assert [(key, step, len(data)) for key, _, data, step in tables.logged] == [("samples", 1, 16), ("samples", 3, 16)]
    assert tables.logged[0][1] == ["step", "prompt", "completion", "reward", "advantage"]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "board/version_0")).Reload().Tensors("samples/text_summary")
    assert [event.step for event in events] == [1, 3]
    warnings = [r.getMessage() for r in caplog.records if "can't be logged" in r.getMessage()]
    assert warnings == ["Samples can't be logged to Breaks: no network"]


def test_lines_are_valid_json(tmp_path, tiny_model_path):
    recorded(tmp_path, tiny_model_path, steps=1)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()

    def refuse(constant):
        raise AssertionError(constant)

    values = json.loads(line, parse_constant=refuse)
    assert values["step"] == 1
    assert torch.tensor([value for value in values.values() if value is not None]).isfinite().all()
