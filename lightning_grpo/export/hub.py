"""Uploading an exported folder to the Hugging Face hub."""

import os
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from lightning_grpo.errors import RunError, UserError


def hub_token() -> str:
    """The hub's token in the environment.

    Raises:
        UserError: there is none.
    """
    if not (token := os.environ.get("HF_TOKEN")):
        raise UserError("push_to_hub needs a token that may write: set the environment variable HF_TOKEN")
    return token


def push(folder: Path, repository: str, token: str) -> str:
    """Upload a folder, to a repository that is created, private, if there is none.

    Returns:
        The repository's address.

    Raises:
        UserError: ``repository`` is not a repository's name.
        RunError: the hub can't be reached, or refused.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"push_to_hub is {repository!r}, which is no name on the hub; set OWNER/NAME") from error
    api = HfApi(token=token)
    try:
        url = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id, folder_path=folder, commit_message="Upload the policy that lightning_grpo trained"
        )
    except Exception as error:  # of whichever HTTP library the installed huggingface_hub uses
        reason = " ".join(str(error).split())
        raise RunError(
            f"{folder} was written, but not uploaded to {repository}: {reason}; upload it by "
            f"`hf upload {repository} {folder}`"
        ) from error
    return str(url)
