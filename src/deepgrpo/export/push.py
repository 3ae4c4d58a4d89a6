"""Upload of an exported model to the hub, by huggingface_hub."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError

from deepgrpo.errors import ConfigError, HubError, first_line

_OF_THE_NETWORK: type[Exception] = HfHubHTTPError.__bases__[0]
"""The error of the HTTP library that huggingface_hub uses, for a hub that does not answer."""


def check_target(repository: str) -> None:
    """Raise ConfigError before any work if the name is no repository's, or there is no token."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ConfigError(f"--push is {repository!r}; name a repository as OWNER/NAME")
    if get_token() is None:
        raise ConfigError("--push needs a token of the hub with write access; run: hf auth login, or set HF_TOKEN")


def push(directory: Path, repository: str, *, public: bool, message: str) -> str:
    """Upload a directory, as one commit where the hub allows it; make the repository if it does not exist.

    Returns a line with its address. Raises HubError if the hub refuses or does not answer; the directory stays.
    """
    api = HfApi()
    try:
        address = api.create_repo(repository, private=not public, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=directory, commit_message=message)
    except (HfHubHTTPError, _OF_THE_NETWORK, OSError, ValueError) as error:
        code = getattr(getattr(error, "response", None), "status_code", None)
        cure = {
            401: "log in again with: hf auth login, or set HF_TOKEN",
            403: "use a token with write access to that owner",
            404: "look at the name of the owner",
        }.get(code or 0, "look at the network and try again")
        raise HubError(
            f"--push {repository}: the hub refused the upload ({first_line(error)}); {cure}. The model is whole in "
            f"{directory}: `hf upload {repository} {directory}` uploads it, too"
        ) from error
    return f"uploaded to {address}"
