"""Comparison of an engine's tokenizer with the trainer's.

Engine and trainer exchange only token ids. A difference would show only in odd samples and in stop strings that never
match.
"""

import hashlib
import json
from typing import Any

from transformers import PreTrainedTokenizerBase

from lightning_grpo.errors import UserError

PROBE = "Grüße aus 東京!\n\n\tdef f(x):  return 3.14 * x  # 1234567890 👍 <|im_start|><s>[INST]"


def tokenizer_facts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The properties that must agree, as JSON values, so that a server can report them too."""
    template = json.dumps(getattr(tokenizer, "chat_template", None), sort_keys=True)
    return {
        "vocabulary size": len(tokenizer),
        "special tokens": dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)),
        "end-of-sequence token": tokenizer.eos_token_id,
        "encoding of a probe": tokenizer.encode(PROBE),
        "chat template (hash)": hashlib.sha256(template.encode()).hexdigest()[:16],
    }


def require_same_tokenizer(engine: dict[str, Any], trainer: dict[str, Any], *, at: str) -> None:
    """Compare the `tokenizer_facts` of both sides.

    Args:
        at: names the engine.

    Raises:
        UserError: names the differences.
    """
    differing = [name for name in trainer if engine.get(name) != trainer[name]]
    if differing:
        shown = "; ".join(f"{name}: {str(engine.get(name))[:80]}, not {str(trainer[name])[:80]}" for name in differing)
        raise UserError(f"{at} has another tokenizer than the trainer ({shown}); use the same tokenizer files for both")
