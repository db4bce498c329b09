"""An exported model to the hub: everything is checked before anything is made or sent."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from storage.errors import ConfigError, RemoteError, ScholiastError, unreadable

_WHERE = "--push-to-hub"


def require_new(name: str) -> None:
    """Sees to it that a repository of this name can be made.

    Args:
        name: ORG/NAME.

    Raises:
        ConfigError: no name of a repository, or the hub has it already.
        RemoteError: no token, a token the hub refuses, or no hub that answers.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError

    try:
        _tools().validate_repo_id(name)
    except HFValidationError as error:
        raise _no_name(name, str(error)) from error
    if name.count("/") != 1:
        raise _no_name(name, name)
    if get_token() is None:
        raise RemoteError(
            "there is no hub token", where=_WHERE, expected="one that may write",
            todo="run `hf auth login`, or set HF_TOKEN",
        )  # fmt: skip
    with _translated(name, "run the same command again: nothing was made or sent"):
        api = HfApi()
        api.whoami()
        there = api.repo_exists(name)
    if there:
        raise ConfigError(
            "the hub has a repository of this name already", where=_WHERE, found=name,
            todo=f"name another, or export without {_WHERE} and run `hf upload {name} FOLDER`",
        )  # fmt: skip


def push_model(folder: Path, name: str, private: bool) -> str:
    """Makes the repository and uploads a model's folder to it; returns its address.

    Raises:
        RemoteError: the hub refuses or fails; says how to go on with what is exported.
        CorruptShard: a file cannot be read.
    """
    from huggingface_hub import HfApi

    _tools().disable_progress_bars()
    with _translated(name, f"the model is in {folder}: run `hf upload {name} {folder}` to go on"):
        api = HfApi()
        made = api.create_repo(name, private=private)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Exported by scholiast")
    return str(made)


def address(name: str) -> str:
    """Returns where a repository is, or would be."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{name}"


def _tools() -> Any:
    """Returns what the client exports without saying so to type checkers."""
    import huggingface_hub.utils

    return huggingface_hub.utils


def _no_name(name: str, found: str) -> ConfigError:
    return ConfigError(
        "no name of a repository", where=_WHERE, expected="ORG/NAME, of letters, digits, -, _ and .",
        found=found, todo="give your user's or organisation's name, a slash, and the model's name",
    )  # fmt: skip


@contextlib.contextmanager
def _translated(name: str, todo: str) -> Iterator[None]:
    """Turns what the hub's client raises into our errors."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except ScholiastError:
        raise
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise RemoteError(
                "the hub refuses our token", where=_at(name), expected="a token that may write there",
                found=_line(error), todo="run `hf auth login` with such a token, or set HF_TOKEN",
            ) from error  # fmt: skip
        raise RemoteError(
            "the hub refuses", where=_at(name), found=_line(error), todo=todo
        ) from error
    except Exception as error:  # of its HTTP library, which has changed its name before
        if isinstance(error, OSError) and error.filename is not None:  # a socket has no name
            raise unreadable("a file", error, error.filename, todo) from error
        if not _of_the_network(error):
            raise
        raise RemoteError(
            "the hub cannot be reached", where=_at(name), expected="an answer", found=_line(error),
            todo=f"check the network, HF_ENDPOINT and HF_HUB_OFFLINE; {todo}",
        ) from error  # fmt: skip


def _at(name: str) -> str:
    return f"{_WHERE} {name}"


def _of_the_network(error: Exception) -> bool:
    library = type(error).__module__.split(".")[0]
    return isinstance(error, OSError | TimeoutError) or library.startswith("httpx")


def _line(error: Any) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
