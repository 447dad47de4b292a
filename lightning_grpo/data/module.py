"""`PromptDataModule`: reads rows, encodes their prompts, and serves them in batches, resumable at any step."""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, cast

import lightning
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from torch import Tensor

from lightning_grpo.data.dataset import DataSetReader, Source, check_sources, encoded
from lightning_grpo.data.encoding import Encoder
from lightning_grpo.data.prompts import Prompt, PromptBatch
from lightning_grpo.data.sampling import MixtureSampler, PassSampler, Sampler
from lightning_grpo.data.stream import Stream
from lightning_grpo.data.streaming import FIRST, StreamedPrompts
from lightning_grpo.errors import UserError
from lightning_grpo.ranges import check_ranges
from lightning_grpo.seed import seed_of_run

warn = rank_zero_only(logging.getLogger(__name__).warning)


class Loader:
    """A sized iterable that starts to iterate at the first batch, after a checkpoint has been loaded."""

    def __init__(self, length: int, batches: Callable[[], Iterator[PromptBatch]]) -> None:
        self.length = length
        self.batches = batches

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[PromptBatch]:
        return self.batches()

    def state_dict(self) -> dict[str, Any]:
        """Empty, as the data module stores the position. Its presence marks the loader as resumable for Lightning."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing; the data module stores the position."""


class PromptDataModule(lightning.LightningDataModule):
    """Serves prompts for rollouts, together with the columns that reward functions read.

    A row has a ``prompt`` (text, which is used unchanged, or a list of chat messages, to which the chat template is
    applied) and any other columns. The content of a message is text or a list of text parts. The columns ``tools``
    (JSON schemas) and ``chat_template_kwargs`` (an object) are passed to the template if present, and can be given as
    JSON text. In rows that follow verl's parquet convention, a missing ``answer`` is set to
    ``reward_model.ground_truth``. An invalid row raises an error that names the file and the line.

    The training loader yields the prompts of each rollout ``steps_per_rollout`` times in succession, once per
    micro-batch of this rank; the LightningModule defines that number. An epoch has ⌊prompts / prompts_per_rollout⌋
    rollouts, and the remaining prompts begin the next epoch. With W data-parallel ranks, rank r gets every W-th prompt
    of the rollout, starting with prompt r. With K updates per rollout, update k thus sees the prompts
    [k·B/K, (k+1)·B/K) for any W. A prompt occurs at most once in a rollout.

    Checkpoints contain the order and the position: a run that is resumed at any step continues with the same batches.
    A rollout that was interrupted before its first optimizer step is drawn again, with the same result.

    Args:
        source: A .jsonl, .json, .csv (also .jsonl.gz, …), .parquet or .arrow file, a pattern of such files
            (``data/train-*.parquet``), a folder written by datasets.save_to_disk, a hub name (owner/name),
            ``reasoning_gym:TASK`` (procedural, offline), ``verifiers:NAME`` (the data set of an environment of
            verifiers), ``arithmetic``, ``hidden_numbers`` or ``letters`` (procedural, built in). Several sources are
            given by name, each with options of its own (`Source`); the names appear in metrics.
        source_args: Further arguments of the source: the configuration of a reasoning-gym task; ``split`` (``train`` or
            ``eval``) and the arguments of an environment of verifiers; ``low``, ``high``, ``operator``, ``template`` of
            arithmetic; ``width``, ``highest``, ``template`` of hidden_numbers; ``alphabet``, ``repeats`` of letters;
            ``split`` of a folder; ``split``, ``name``, ``revision``, … of a hub data set.
        size: Number of rows to generate (procedural sources) or to read from the start. Unset: all.
        validation_source: Source of the held-out prompts, in the same form as ``source``; several have metrics by
            name. Unset: held-out prompts are taken from ``source``.
        validation_args: Further arguments of ``validation_source``.
        validation_size: Number of held-out prompts; from ``source`` they are drawn at random. 0: all rows of
            ``validation_source``, or no held-out prompts if that is unset. Training rows with the same prompt as a
            held-out row are dropped.
        columns: New column names: ``{prompt: question, answer: reward_model.ground_truth}`` uses the column
            ``question`` as the prompt and a nested value as ``answer``. Other columns keep their names.
        chat: Turn a text prompt into a user message, for models trained for chat.
        system_prompt: System message to put before every prompt that is a list of messages.
        chat_template: Jinja template to use instead of the tokenizer's, a file that contains one, or ``qwen3``: a
            template in the format of Qwen3 that keeps the thoughts of earlier turns.
        chat_template_args: Variables for the template, for example ``{enable_thinking: false}``.
        prompts_per_rollout: Prompts per rollout, over all ranks (B).
        max_prompt_length: Longest prompt, in tokens. Unset: the module's ``max_prompt_length``.
        overlong: What to do with longer prompts: ``drop`` them and log their number, or stop with an ``error``.
        shuffle: Draw a new order from (seed, pass) for every pass over the data. Ignored if ``sampler`` is set.
        sampler: Selects the next prompts, for example ``DifficultySampler``. Unset: each prompt once per pass.
        validation_batch_size: Held-out prompts per rank to generate for at once.
        streaming: Read rows while they are served, in the order of the source, instead of at start; for files and data
            sets on the hub that are too large for that. Held-out prompts need a ``validation_source``, and ``shuffle``
            has no effect.
        cache: Store the encoded prompts of a large data set in the user's cache folder (or LIGHTNING_GRPO_PROMPTS).
            Later runs with the same data, options and tokenizer read them from there.
        seed: Seed of procedural sources, of the choice of held-out prompts, and of the order. Unset: that of
            --seed_everything (`lightning.seed_everything`), or 0.
        tokenizer: A Hugging Face tokenizer. Unset: the module's ``tokenizer`` attribute, which is read in ``setup``.
    """

    def __init__(
        self,
        source: str | dict[str, Source],
        *,
        source_args: dict[str, Any] | None = None,
        size: int | None = None,
        validation_source: str | dict[str, Source] | None = None,
        validation_args: dict[str, Any] | None = None,
        validation_size: int = 0,
        columns: dict[str, str] | None = None,
        chat: bool = False,
        system_prompt: str | None = None,
        chat_template: str | None = None,
        chat_template_args: dict[str, Any] | None = None,
        prompts_per_rollout: int = 8,
        max_prompt_length: int | None = None,
        overlong: Literal["drop", "error"] = "drop",
        shuffle: bool = True,
        sampler: Sampler | None = None,
        validation_batch_size: int = 64,
        streaming: bool = False,
        cache: bool = True,
        seed: int | None = None,
        tokenizer: Any = None,
    ) -> None:
        super().__init__()
        ranges = dict.fromkeys(("validation_size", "seed"), "[0, inf)")
        counts = ("size", "prompts_per_rollout", "max_prompt_length", "validation_batch_size")
        check_ranges(locals(), ranges | dict.fromkeys(counts, "[1, inf)"), prefix="data.")
        if overlong not in ("drop", "error"):
            raise UserError(f"data.overlong is {overlong!r}; set it to drop or error")
        if validation_args and validation_source is None:
            raise UserError(
                "data.validation_args is set, but data.validation_source is not; set it too, or remove validation_args"
            )
        if isinstance(source, str):
            self.sources = {"": Source(source=source, source_args=source_args or {}, size=size)}
        else:
            if source_args or size is not None:
                raise UserError("data.source_args and data.size belong to a single source; set them in each source")
            self.sources = check_sources(source, "data.source")
            if sampler is not None and next(iter(self.sources.values())).weight is not None:
                raise UserError("data.sampler and the weights of data.source exclude each other; remove one of them")
        self.validation_sources: dict[str, Source] = {}
        if isinstance(validation_source, str):
            self.validation_sources = {"": Source(source=validation_source, source_args=validation_args or {})}
        elif validation_source is not None:
            self.validation_sources = check_sources(validation_source, "data.validation_source")
        self.source = source
        self.source_args = source_args or {}
        self.size = size
        self.validation_source = validation_source
        self.validation_args = validation_args or {}
        self.validation_size = validation_size
        self.columns = columns or {}
        self.chat = chat
        self.system_prompt = system_prompt
        self.chat_template = chat_template
        self.chat_template_args = chat_template_args or {}
        self.prompts_per_rollout = prompts_per_rollout
        self.max_prompt_length = max_prompt_length
        self.overlong = overlong
        if streaming:
            self._check_streaming(sampler)
            shuffle = False
        self.streaming = streaming
        self.shuffle = shuffle
        self.cache = cache
        self.sampler = sampler or PassSampler(shuffle=shuffle)
        self.validation_batch_size = validation_batch_size
        self.seed = seed_of_run(seed)
        self.tokenizer = tokenizer
        self.train: Sequence[Prompt] = []
        self.validation: Sequence[Prompt] = []
        self.source_names: set[str] = set()
        self._tokenizer: Any = None
        self._stream: Stream | None = None

    def _check_streaming(self, sampler: Sampler | None) -> None:
        if "" not in self.sources:
            raise UserError("data.streaming is true, which needs a single data.source; set streaming to false")
        if sampler is not None:
            raise UserError("data.streaming is true, so prompts come in the order of the source; unset data.sampler")
        if self.validation_size and not self.validation_sources:
            raise UserError(
                f"data.validation_size is {self.validation_size}, but with data.streaming no prompts can be drawn from "
                "the source; set data.validation_source"
            )

    # ── Rows ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def setup(self, stage: str | None = None) -> None:
        """Read, check, encode and split all rows, once. Errors name the file and the line."""
        tokenizer = self.tokenizer or getattr(self.trainer and self.trainer.lightning_module, "tokenizer", None)
        if tokenizer is None:
            raise UserError("there is no tokenizer: give the module a `tokenizer` attribute, or set data.tokenizer")
        if tokenizer is not self._tokenizer:
            self._tokenizer = tokenizer
            self._read()
        if stage not in (None, "fit"):
            return
        if not self.train:
            raise UserError(
                f"every prompt of data.source = {self._source_names!r} is also a held-out prompt, so none is left for "
                "training; set another data.validation_source"
            )
        if len(self.train) < self.prompts_per_rollout:
            raise UserError(
                f"data.prompts_per_rollout is {self.prompts_per_rollout}, but {self._source_names!r} has "
                f"{len(self.train)} training prompts; set prompts_per_rollout to {len(self.train)} or less, or add "
                "prompts"
            )
        if self.trainer is None or self.trainer.global_step == 0 or self._stream is None:
            self._stream = Stream(len(self.train), seed=self.seed, sampler=self.sampler)

    def _read(self) -> None:
        module = self.trainer and self.trainer.lightning_module
        max_length = self.max_prompt_length
        if max_length is None:
            max_length = getattr(module, "max_prompt_length", None)
        encoder = Encoder(
            tokenizer=self._tokenizer,
            columns=self.columns,
            chat=self.chat,
            system_prompt=self.system_prompt,
            chat_template=self.chat_template,
            chat_template_args=self.chat_template_args,
            max_prompt_length=max_length,
            overlong=self.overlong,
            tools=getattr(getattr(module, "environment", None), "tool_schemas", ()),
            vocab_size=getattr(module, "vocab_size", None),
        )
        dataset = DataSetReader(
            sources=self.sources,
            validation=self.validation_sources,
            validation_size=self.validation_size,
            encoder=encoder,
            seed=self.seed,
            cache=self.cache,
            streaming=self.streaming,
        ).read()
        for remark in dataset.remarks:
            warn(remark)
        self.train, self.validation = dataset.train, dataset.validation
        self.source_names = set(dataset.source_names)
        self._fingerprint = dataset.fingerprint
        self._row_of_index: dict[int, int] | None = None
        weights = [source.weight for source in self.sources.values()]
        if None not in weights:
            self.sampler = MixtureSampler(
                sizes=tuple(dataset.sizes), weights=tuple(map(float, weights)), shuffle=self.shuffle
            )
        count = "streamed" if self.streaming else len(self.train)
        rank_zero_info(f"{count} training and {len(self.validation)} held-out prompts from {self._source_names}")

    @property
    def prompts_to_check(self) -> Sequence[Prompt]:
        """The training prompts that can be checked before training: all, or the first of a stream."""
        return self.train[:FIRST] if self.streaming else self.train

    @property
    def _source_names(self) -> str:
        return ", ".join(source.source for source in self.sources.values())

    # ── Training ──────────────────────────────────────────────────────────────────────────────────────────────────

    def train_dataloader(self) -> Loader:
        """The loader of ⌊prompts / B⌋ · steps_per_rollout batches, steps_per_rollout of each rollout."""
        W, _ = self._shard
        B = self.prompts_per_rollout
        if B % W:
            nearest = sorted({max(B // W, 1) * W, (B // W + 1) * W})
            raise UserError(
                f"data.prompts_per_rollout is {B}, which can't be divided among {W} data-parallel ranks; "
                f"set it to {' or '.join(map(str, nearest))}"
            )
        repeats = cast(int, self.trainer.lightning_module.steps_per_rollout)  # of `GRPOModule`
        length = len(self.train) // B * repeats
        if isinstance(self.train, StreamedPrompts):
            self._check_trainer()

        def batches() -> Iterator[PromptBatch]:
            # Lightning 2.6 counts a batch that an exception interrupted as started, and would be off by one when the
            # run is resumed a second time.
            started = self.trainer.fit_loop.epoch_loop.batch_progress.total
            started.ready = started.started = started.processed
            for _ in range(length):
                self._stream.advance(B, repeats)
                if isinstance(self.train, StreamedPrompts):
                    self.train.forget(min(self._stream.rows))
                yield self._share(self._stream.rows)

        return Loader(length, batches)

    def _check_trainer(self) -> None:
        trainer = self.trainer
        if trainer.max_steps == -1:
            raise UserError("data.streaming is true, so the end of an epoch is unknown; set trainer.max_steps")
        if self.validation and not isinstance(trainer.val_check_interval, int):
            raise UserError(
                f"trainer.val_check_interval is {trainer.val_check_interval}, a share of an epoch, whose length is "
                "unknown with data.streaming; set it to a number of micro-batches, and check_val_every_n_epoch to null"
            )

    def next_prompts(self) -> PromptBatch:
        """Return this rank's share of the next rollout, so that it can be sampled before the current one is finished.

        The training loader serves the same prompts, unless `more_prompts` or `observe` is called in between.
        """
        W, rank = self._shard
        rows = self._stream.peek(self.prompts_per_rollout)
        return PromptBatch([self.train[i] for i in rows[rank::W]], rollout_number=self._stream.rollout + 1)

    def more_prompts(self, count: int) -> PromptBatch:
        """Return this rank's share of ``count`` further prompts (over all ranks) that are not in the rollout yet.

        Dynamic sampling uses them to replace groups whose rewards are all equal. Every rank must call this method with
        the same count, which is rounded up to a multiple of W so that all ranks get the same number of prompts. There
        are fewer, possibly none, if the data set has no others. They are taken from the same order as rollouts, which
        continue after them.
        """
        W, _ = self._shard
        return self._share(self._stream.more(count, multiple=W))

    def observe(self, prompt_indices: Sequence[int], mean_rewards: Sequence[float] | Tensor) -> None:
        """Pass the mean reward of each group of a rollout to the sampler, for the draws that follow.

        Every rank must call this method with its own prompts; the ranks exchange the values. NaN (no reward applied) is
        ignored.
        """
        if not self.sampler.observes:  # without exchanging the values
            return
        means = torch.as_tensor(mean_rewards, dtype=torch.float32, device="cpu").tolist()
        if self._row_of_index is None:
            self._row_of_index = {prompt.row: row for row, prompt in enumerate(encoded(self.train))}
        rewards = {self._row_of_index[i]: mean for i, mean in zip(prompt_indices, means, strict=True) if mean == mean}
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            gathered: list[dict[int, float]] = [{}] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(gathered, rewards)
            rewards = {row: share[row] for share in gathered for row in share}
        self._stream.observe(rewards)

    @property
    def _shard(self) -> tuple[int, int]:
        """The number of data-parallel ranks and the index of this one; tensor-parallel ranks share an index."""
        kwargs = (self.trainer and self.trainer.distributed_sampler_kwargs) or {"num_replicas": 1, "rank": 0}
        return kwargs["num_replicas"], kwargs["rank"]

    def _share(self, rows: list[int]) -> PromptBatch:
        W, rank = self._shard
        return PromptBatch([self.train[i] for i in rows[rank::W]], rollout_number=self._stream.rollout)

    # ── Held-out prompts ──────────────────────────────────────────────────────────────────────────────────────────

    def val_dataloader(self) -> Loader | list:
        """The loader of this rank's held-out prompts.

        All ranks get the same number of batches of the same sizes. Prompts that only pad the last ones have ``real`` =
        False.
        """
        if not self.validation:
            return []
        W, rank = self._shard
        n, size = len(self.validation), self.validation_batch_size
        places = range(rank, -(-n // W) * W, W)
        shards = [places[i : i + size] for i in range(0, len(places), size)]

        def batches() -> Iterator[PromptBatch]:
            for shard in shards:
                yield PromptBatch([self.validation[i % n] for i in shard], real=[i < n for i in shard])

        return Loader(len(shards), batches)

    def test_dataloader(self) -> Loader | list:
        return self.val_dataloader()

    def predict_dataloader(self) -> Loader | list:
        return self.val_dataloader()

    # ── Checkpoints ───────────────────────────────────────────────────────────────────────────────────────────────

    def state_dict(self, unfinished: int | None = None, *, draw_again: bool = True) -> dict[str, Any]:
        """Return the position, and a fingerprint of the prompts it refers to. Empty if training was never set up.

        Args:
            unfinished: number of the latest batches that are to be served again. None: 1 if a batch has been fetched
                but not processed, else 0.
            draw_again: if the first batch of a rollout is to be served again, discard its draw and all observations
                since, and draw it again. False: serve the rollout as it was drawn.
        """
        if self._stream is None:
            return {}
        if unfinished is None and self.trainer is not None:
            progress = self.trainer.fit_loop.epoch_loop.batch_progress.current
            unfinished = progress.ready - progress.processed
        position = self._stream.state_dict(unfinished or 0, draw_again=draw_again)
        state: dict[str, Any] = {"prompts": len(self.train), "fingerprint": self._fingerprint} | position
        if isinstance(self.train, StreamedPrompts):
            is_complete = state["step"] == state["repeats"]
            state["source"] = self.train.position(state["cursor"] if is_complete else min(state["rows"]))
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """In ``fit``, restore the position of the checkpoint. Raise `UserError` if it was saved with other prompts."""
        if self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:
            return
        if state_dict["fingerprint"] != self._fingerprint:
            raise UserError(
                f"the checkpoint was saved with {state_dict['prompts']} training prompts, but the {len(self.train)} "
                f"prompts of data.source = {self._source_names!r} or their columns are not the same; restore the file, "
                "the data options and the tokenizer, or start a new run"
            )
        if isinstance(state_dict["cursor"], int) == isinstance(self.sampler, MixtureSampler):
            raise UserError(
                "the sources of the checkpoint's run had no weights, or have none now, so their order can't be "
                "continued; restore data.source, or start a new run"
            )
        if isinstance(self.train, StreamedPrompts):
            self.train.seek(state_dict["source"])
        self._stream.load_state_dict(state_dict)

    def serve_again(self, rollout: int | None, step: int) -> bool:
        """Serve ``rollout`` again from micro-batch ``step`` on, in a second `fit` that continues without a checkpoint.

        Return False if ``rollout`` is not the current one. The current one, if it is unfinished, is then drawn again.
        """
        stream = self._stream
        if rollout == stream.rollout:
            stream.load_state_dict(stream.state_dict(stream.step - step, draw_again=False))
            return True
        if stream.step < stream.repeats:
            stream.load_state_dict(stream.state_dict(stream.step))
        return False
