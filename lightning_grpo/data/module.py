"""PromptDataModule: rows in, batches of encoded prompts out, with a position that checkpoints keep."""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import lightning
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from torch import Tensor

from lightning_grpo.data.encoding import encode_rows
from lightning_grpo.data.prompts import Prompt, PromptBatch, fingerprint
from lightning_grpo.data.sampling import PassSampler, Sampler
from lightning_grpo.data.sources import read
from lightning_grpo.data.stream import Stream
from lightning_grpo.errors import UserError
from lightning_grpo.ranges import check_ranges
from lightning_grpo.seed import seed_of_run

warn = rank_zero_only(logging.getLogger(__name__).warning)

# procedural sources seed row i with seed + i: far enough that no held-out row is a training row's twin
VALIDATION_SEED = 1_000_000_000


class Loader:
    """A sized iterable whose iterator is lazy: the position is read at the first batch, after a checkpoint is."""

    def __init__(self, length: int, batches: Callable[[], Iterator[PromptBatch]]) -> None:
        self.length = length
        self.batches = batches

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[PromptBatch]:
        return self.batches()

    def state_dict(self) -> dict[str, Any]:
        """Empty: the position is the data module's. Tells Lightning that this loader can be resumed."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to load."""


class PromptDataModule(lightning.LightningDataModule):
    """Prompts for rollouts, the other columns going to the rewards.

    A row has a ``prompt`` (text, taken as it is, or a list of chat messages, which go through the tokenizer's chat
    template once) and any other columns. A message's content is text, or a list of text parts. The columns ``tools``
    (JSON schemas) and ``chat_template_kwargs`` (an object), if there are any, go to the template, as objects or as
    JSON text. Rows of verl's parquet convention are understood (``reward_model.ground_truth`` becomes the ``answer``
    that is missing). A bad row is an error that names the file and the line.

    The training loader gives each rollout's prompts ``steps_per_rollout`` times in a row (once per micro-batch; the
    number is the module's, for this rank). An epoch is ⌊prompts / prompts_per_rollout⌋ rollouts; the prompts left over
    begin the next one. With W data-parallel ranks, rank r gets every W-th prompt of the rollout from its r-th on, so
    that with K updates a rollout, update k sees the prompts [k·B/K, (k+1)·B/K) whatever W is. No prompt comes twice in
    one rollout.

    Order and position are kept in checkpoints: a run resumed at any step goes on with the same batches. A rollout that
    was interrupted before its first step is drawn again as it was.

    Args:
        source: A .jsonl, .json, .csv or .parquet file, a pattern of such files (``data/train-*.parquet``), a folder
            written by datasets.save_to_disk, a hub name (owner/name), ``reasoning_gym:TASK`` (procedural, offline),
            ``arithmetic`` or ``letters`` (procedural, built in).
        source_args: Further arguments of the source: a reasoning-gym task's configuration; ``low``, ``high``,
            ``operator``, ``template`` of arithmetic; ``alphabet``, ``repeats`` of letters; ``split`` of a folder;
            ``split``, ``name``, ``revision``, … of a hub data set.
        size: Rows to make (procedural sources) or to read, from the first on. Unset: all there are.
        validation_source: Where held-out prompts come from, as ``source``. Unset: they are taken from ``source``.
        validation_args: As ``source_args``, for ``validation_source``.
        validation_size: Held-out prompts. 0: none, or all of ``validation_source`` where it is set. Taken from
            ``source`` at random. Training rows with the same prompt as a held-out one are dropped.
        columns: New names: ``{prompt: question, answer: reward_model.ground_truth}`` takes the column ``question``
            as the prompt and a nested value as ``answer``. Columns not named keep their names.
        chat: Make a text prompt the message of a user, for models trained for chat.
        system_prompt: Message put before every prompt that is a list of messages.
        chat_template: Jinja template, or a file that holds one, in place of the tokenizer's own.
        chat_template_args: Variables for the template, for example ``{enable_thinking: false}``.
        prompts_per_rollout: Prompts of one rollout, over all ranks (B).
        max_prompt_length: Longest prompt in tokens. Unset: the module's ``max_prompt_length``.
        overlong: What to do with longer ones: ``drop`` them (their count is logged), or stop with an ``error``.
        shuffle: A new order for every pass over the data, from (seed, pass). Not used where ``sampler`` is set.
        sampler: Which prompts come next, for example ``DifficultySampler``. Unset: each once a pass.
        validation_batch_size: Held-out prompts of a rank generated for at once.
        seed: Seed of procedural sources, the choice of held-out prompts, and the order. Unset: that of
            --seed_everything (`lightning.seed_everything`), or 0.
        tokenizer: A Hugging Face tokenizer. Unset: the module's ``tokenizer`` attribute, read in ``setup``.
    """

    def __init__(
        self,
        source: str,
        *,
        source_args: dict[str, Any] | None = None,
        size: int | None = None,
        validation_source: str | None = None,
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
        seed: int | None = None,
        tokenizer: Any = None,
    ) -> None:
        super().__init__()
        ranges = dict.fromkeys(("validation_size", "seed"), "[0, inf)")
        counts = ("size", "prompts_per_rollout", "max_prompt_length", "validation_batch_size")
        check_ranges(locals(), ranges | dict.fromkeys(counts, "[1, inf)"), prefix="data.")
        if overlong not in ("drop", "error"):
            raise UserError(f"data.overlong is {overlong!r}; set 'drop' or 'error'")
        if validation_args and validation_source is None:
            raise UserError("data.validation_args is set without data.validation_source; set that too")
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
        self.sampler = sampler or PassSampler(shuffle=shuffle)
        self.validation_batch_size = validation_batch_size
        self.seed = seed_of_run(seed)
        self.tokenizer = tokenizer
        self.train: list[Prompt] = []
        self.validation: list[Prompt] = []
        self._tokenizer: Any = None
        self._stream: Stream | None = None

    # Rows ---------------------------------------------------------------------------------------------------------

    def setup(self, stage: str | None = None) -> None:
        """Read, check, split and encode all rows, once. Errors name the file and the line."""
        tokenizer = self.tokenizer or getattr(self.trainer and self.trainer.lightning_module, "tokenizer", None)
        if tokenizer is None:
            raise UserError("no tokenizer: the module needs a `tokenizer` attribute, or pass data.tokenizer")
        if tokenizer is not self._tokenizer:
            self._tokenizer = tokenizer
            self._read()
        if stage not in (None, "fit"):
            return
        if not self.train:
            raise UserError(f"every prompt of {self.source!r} equals a held-out one: none is left for training")
        if len(self.train) < self.prompts_per_rollout:
            raise UserError(
                f"data.prompts_per_rollout is {self.prompts_per_rollout} and {len(self.train)} training prompts are "
                f"left of {self.source!r}; set it to {len(self.train)} or less, or give more prompts"
            )
        if self.trainer is None or self.trainer.global_step == 0 or self._stream is None:
            self._stream = Stream(len(self.train), seed=self.seed, sampler=self.sampler)

    def _read(self) -> None:
        rows = self._prompts(self.source, self.source_args, self.size, seed=self.seed, option="data.source")
        if self.validation_source is None:
            rows, self.validation = self._hold_out(rows)
        else:
            seed = self.seed + VALIDATION_SEED
            size = self.validation_size or None
            self.validation = self._prompts(
                self.validation_source, self.validation_args, size, seed=seed, option="data.validation_source"
            )
        held_out = {tuple(prompt.ids) for prompt in self.validation}
        self.train = [prompt for prompt in rows if tuple(prompt.ids) not in held_out]
        if len(self.train) < len(rows):
            warn(f"{len(rows) - len(self.train)} training prompts equal a held-out one and are dropped")
        rank_zero_info(f"{len(self.train)} training and {len(self.validation)} held-out prompts from {self.source}")
        self._place = {prompt.index: place for place, prompt in enumerate(self.train)}
        self._fingerprint = fingerprint(self.train)

    def _prompts(self, source: str, args: dict[str, Any], size: int | None, *, seed: int, option: str) -> list[Prompt]:
        module = self.trainer and self.trainer.lightning_module
        longest = self.max_prompt_length
        if longest is None:
            longest = getattr(module, "max_prompt_length", None)
        rows = read(source, args=args, size=size, seed=seed, option=option)
        prompts = encode_rows(
            rows,
            self._tokenizer,
            columns=self.columns,
            chat=self.chat,
            system_prompt=self.system_prompt,
            chat_template=self.chat_template,
            chat_template_args=self.chat_template_args,
            max_prompt_length=longest,
            overlong=self.overlong,
            vocab_size=getattr(module, "vocab_size", None),
        )
        if len(prompts) < len(rows):
            dropped = f"{len(rows) - len(prompts)} of {len(rows)} prompts of {source} have more than {longest} tokens"
            if not prompts:
                raise UserError(f"{dropped}: none is left; raise max_prompt_length")
            warn(f"{dropped} (max_prompt_length) and are dropped")
        return prompts

    def _hold_out(self, rows: list[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
        if self.validation_size >= len(rows):
            raise UserError(
                f"data.validation_size is {self.validation_size} and {self.source!r} has {len(rows)} prompts; "
                f"set it below {len(rows)}, or give a data.validation_source"
            )
        order = np.random.default_rng((self.seed, len(rows))).permutation(len(rows))
        held = set(order[: self.validation_size].tolist())
        return [row for i, row in enumerate(rows) if i not in held], [rows[i] for i in sorted(held)]

    # Training -----------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> Loader:
        """⌊prompts / B⌋ · steps_per_rollout batches: each rollout's prompts steps_per_rollout times."""
        W, _ = self._shard
        B = self.prompts_per_rollout
        if B % W:
            nearest = sorted({max(B // W, 1) * W, (B // W + 1) * W})
            raise UserError(
                f"data.prompts_per_rollout is {B}, which {W} data-parallel ranks can't share; "
                f"set {' or '.join(map(str, nearest))}"
            )
        repeats = self.trainer.lightning_module.steps_per_rollout
        length = len(self.train) // B * repeats

        def batches() -> Iterator[PromptBatch]:
            # Lightning 2.6 keeps counting a batch that an exception broke off, and would find itself one behind when
            # it is resumed for the second time
            started = self.trainer.fit_loop.epoch_loop.batch_progress.total
            started.ready = started.started = started.processed
            for _ in range(length):
                self._stream.advance(B, repeats)
                yield self._share(self._stream.rows, step=self._stream.step - 1)

        return Loader(length, batches)

    def next_prompts(self) -> PromptBatch:
        """This rank's share of the next rollout, for sampling it ahead of its turn.

        The train loader serves the same, as long as `more_prompts` and `observe` are not called before that.
        """
        W, rank = self._shard
        rows = self._stream.peek(self.prompts_per_rollout)
        return PromptBatch([self.train[i] for i in rows[rank::W]], rollout=self._stream.rollout + 1)

    def more_prompts(self, count: int) -> PromptBatch:
        """This rank's share of ``count`` further prompts (over all ranks), none of which the rollout holds already.

        For dynamic sampling: in place of groups whose rewards are all equal. Every rank calls it with the same count,
        and gets as many as every other, which may take up to W − 1 more in all; rank r has every W-th from its r-th
        on. Fewer come back, down to none, where the data set has no others. They are drawn from the same order as the
        rollouts, which go on after them.
        """
        W, _ = self._shard
        return self._share(self._stream.more(count, multiple=W), step=self._stream.step - 1)

    def observe(self, prompt_indices: Sequence[int], mean_rewards: Sequence[float] | Tensor) -> None:
        """Tell a difficulty-aware sampler the mean reward of each group of a rollout, for the draws after it.

        Call it on every rank, with the rank's own prompts: the ranks exchange what they saw. NaN (no reward applied)
        is passed over.
        """
        if type(self.sampler).update is Sampler.update:
            return
        means = torch.as_tensor(mean_rewards, dtype=torch.float32, device="cpu").tolist()
        seen = {self._place[i]: mean for i, mean in zip(prompt_indices, means, strict=True) if mean == mean}
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            shares: list[dict[int, float]] = [{}] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(shares, seen)
            seen = {row: share[row] for share in shares for row in share}
        self._stream.observe(seen)

    @property
    def _shard(self) -> tuple[int, int]:
        """(number of data-parallel ranks, this one); tensor-parallel ranks have the same."""
        kwargs = (self.trainer and self.trainer.distributed_sampler_kwargs) or {"num_replicas": 1, "rank": 0}
        return kwargs["num_replicas"], kwargs["rank"]

    def _share(self, rows: list[int], *, step: int) -> PromptBatch:
        W, rank = self._shard
        return PromptBatch([self.train[i] for i in rows[rank::W]], rollout=self._stream.rollout, step=step)

    # Held-out prompts ---------------------------------------------------------------------------------------------

    def val_dataloader(self) -> Loader | list:
        """This rank's held-out prompts. Every rank gets as many batches of the same sizes: prompts that fill up the
        last ones are marked by ``real`` = False.
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

    # Checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self, unfinished: int | None = None, *, draw_again: bool = True) -> dict[str, Any]:
        """The position, and what it is a position in. Empty if training was never set up.

        Args:
            unfinished: how many of the batches served last are to be served again. None is a batch fetched and not yet
                trained, if there is one.
            draw_again: draw a rollout whose first batch is to be served again once more, and forget what was drawn and
                observed since. False serves it as it was drawn.
        """
        if self._stream is None:
            return {}
        if unfinished is None and self.trainer is not None:
            progress = self.trainer.fit_loop.epoch_loop.batch_progress.current
            unfinished = progress.ready - progress.processed
        position = self._stream.state_dict(unfinished or 0, draw_again=draw_again)
        return {"prompts": len(self.train), "fingerprint": self._fingerprint} | position

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was, in ``fit``. Refuses other prompts than it was saved with."""
        if self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:
            return
        if state_dict["fingerprint"] != self._fingerprint:
            raise UserError(
                f"the checkpoint was saved with {state_dict['prompts']} training prompts, and the {len(self.train)} "
                f"that data.source = {self.source!r} now gives are not the same, or have other columns; restore the "
                "file, the data options and the tokenizer, or begin a new run"
            )
        self._stream.load_state_dict(state_dict)

    def serve_again(self, rollout: int | None, step: int) -> bool:
        """Serve ``rollout`` again from its ``step``-th micro-batch on, in a `fit` that goes on without a checkpoint.

        False if that is not the rollout at hand: the one at hand, if it was begun, is then drawn again.
        """
        stream = self._stream
        if rollout == stream.rollout:
            stream.load_state_dict(stream.state_dict(stream.step - step, draw_again=False))
            return True
        if stream.step < stream.repeats:
            stream.load_state_dict(stream.state_dict(stream.step))
        return False
