"""The files of a checkpoint in a folder or on the hub, and errors that name the one that can't be read."""

import json
from functools import cache
from pathlib import Path
from textwrap import shorten
from typing import Any

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.constants import is_offline_mode
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

from lightning_grpo.errors import UserError

HUB_TIMEOUT = 5.0
"""Seconds to wait for the hub's answer whether a repository exists."""
REMEDY = "set the folder of a Hugging Face checkpoint, or a hub name that this machine can reach"


@cache
def hub_reachable(name: str, kind: str = "model", *, option: str = "model", revision: str | None = None) -> bool:
    """Whether the hub can be reached and has the repository ``name``; if not, only the local cache can be used.

    It is one request without retries, whereas transformers and datasets try six times per file.

    Args:
        name: name of a repository, or of a folder that does not exist.
        kind: ``model`` or ``dataset``.
        option: name of the option whose value is ``name``, for messages.
        revision: branch, tag or commit; None is the main branch.

    Raises:
        UserError: it is not a valid repository name, or neither the hub nor the cache has the repository or revision.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"{option} is {name!r}: no such folder, and not a name on the hub (owner/name)") from error
    if is_offline_mode():
        return False
    try:
        HfApi().repo_info(name, revision=revision, repo_type=kind, timeout=HUB_TIMEOUT)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        if isinstance(try_to_load_from_cache(name, "config.json", revision=revision, repo_type=kind), str):
            return False
        if isinstance(error, RevisionNotFoundError):
            raise UserError(
                f"{option} is {name!r}: the hub has it, but not its revision {revision!r}; set a branch, tag or commit"
            ) from error
        raise UserError(
            f"{option} is {name!r}: no such folder, and the hub has no repository with that name, or none that you can "
            "read (log in with `hf auth login` for a private one)"
        ) from error
    except Exception:
        # whatever else makes the request fail, the cache may have the files
        return False
    return True


def read_json(model: str, name: str) -> dict[str, Any]:
    """Return the object in the JSON file ``name`` of the folder ``model``, or an empty one if there is no such file.

    Raises:
        UserError: the file is not UTF-8, not JSON, or not an object.
    """
    path = Path(model) / name
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        kind = "UTF-8" if isinstance(error, UnicodeDecodeError) else "JSON"
        raise UserError(f"model is {model!r}: its {name} is not {kind} ({error}); copy the file again") from error
    if not isinstance(value, dict):
        raise UserError(
            f"model is {model!r}: its {name} contains a {type(value).__name__}, not an object; copy the file again"
        )
    return value


def unreadable(what: str, model: str, error: Exception) -> UserError:
    """Return the error to raise if ``what`` (config.json, tokenizer, weights) of the folder or hub name ``model`` can't
    be loaded.

    It names the invalid file if that can be determined.
    """
    reason = shorten(str(error), 300, placeholder=" …") or type(error).__name__
    if isinstance(error, KeyError):
        reason = f"{reason} is unknown to transformers"
    if "trust_remote_code" in str(error):
        return UserError(
            f"model is {model!r}: its {what} needs Python code that comes with the checkpoint (auto_map in its "
            "configuration), which is run only if you allow it: read that code and, if you trust it, set model to "
            f"{{name: {model}, trust_remote_code: true}}"
        )
    folder = Path(model)
    if not folder.is_dir():
        return UserError(
            f"model is {model!r}: no such folder, and no {what} of that name could be loaded from the hub or its cache "
            f"({reason}); {REMEDY}"
        )
    for path in sorted(folder.glob("*.json")):
        read_json(model, path.name)
    if what == "weights":
        for path in sorted(folder.glob("*.safetensors")):
            _require_header(model, path)
    contents = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        return UserError(
            f"model is {model!r}: that folder contains a LoRA adapter without its base model; set lora.adapter to it, "
            f"and model to its base model, {read_json(model, 'adapter_config.json').get('base_model_name_or_path')}"
        )
    return UserError(
        f"model is {model!r}: that folder has no readable {what} ({reason}); it contains {contents}; set the "
        "folder of a checkpoint"
    )


def _require_header(model: str, path: Path) -> None:
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        with path.open("rb") as file:
            pointer = file.read(20).startswith(b"version https://git")
        why = "it is a Git LFS pointer, not the file itself: run git lfs pull" if pointer else f"{error}; copy it again"
        raise UserError(f"model is {model!r}: its {path.name} can't be read ({why})") from error
