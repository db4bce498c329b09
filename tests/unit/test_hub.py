"""An exported model to the hub, against a stand-in on loopback: checks first, our errors, all files."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from hub_server import TOKEN, Hub, served
from huggingface_hub import HfApi

from pipeline.hub import push_model, require_new
from storage.errors import ConfigError, CorruptShard, RemoteError


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with served() as one:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", one.endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield one


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n# a\n")
    (folder / "model.safetensors").write_bytes(bytes(range(256)))
    return folder


def test_every_file_arrives_in_a_new_private_repository(hub: Hub, model: Path) -> None:
    require_new("me/mine")
    assert hub.repositories == {}  # asking makes nothing
    assert push_model(model, "me/mine", private=True) == f"{hub.endpoint}/me/mine"
    assert hub.private == {"me/mine"}
    assert hub.repositories["me/mine"] == {p.name: p.read_bytes() for p in model.iterdir()}


def test_a_repository_that_exists_is_not_touched(hub: Hub) -> None:
    hub.repositories["me/mine"] = {}
    with pytest.raises(ConfigError, match="has a repository of this name already"):
        require_new("me/mine")


@pytest.mark.parametrize("name", ["mine", "a/b/c", "me/mi ne", "me/mine..x", ""])
def test_what_is_no_name_is_refused(hub: Hub, name: str) -> None:
    with pytest.raises(ConfigError, match="no name of a repository"):
        require_new(name)


def test_without_a_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "/nowhere/token")
    with pytest.raises(RemoteError, match=r"no hub token[^$]*hf auth login"):
        require_new("me/mine")


def test_with_a_token_that_is_refused(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN.replace("x", "y"))
    with pytest.raises(RemoteError, match="refuses our token"):
        require_new("me/mine")


def test_without_a_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    with pytest.raises(RemoteError, match=r"cannot be reached[^$]*nothing was made"):
        require_new("me/mine")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RemoteError, match=r"cannot be reached[^$]*HF_HUB_OFFLINE"):
        require_new("me/mine")


def test_an_upload_that_fails_says_how_to_go_on(hub: Hub, model: Path) -> None:
    hub.refuse["/api/models/me/mine/commit/main"] = 400
    with pytest.raises(RemoteError) as caught:
        push_model(model, "me/mine", private=False)
    assert f"hf upload me/mine {model}" in str(caught.value)
    hub.refuse["/api/repos/create"] = 403
    with pytest.raises(RemoteError, match="refuses our token"):
        push_model(model, "other/mine", private=False)


def test_a_file_that_cannot_be_read_is_no_fault_of_the_network(
    hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = model / "model.safetensors"

    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(HfApi, "upload_folder", refused)
    with pytest.raises(CorruptShard, match=r"cannot be read: Permission denied") as caught:
        push_model(model, "me/mine", private=False)
    assert str(path) in str(caught.value) and f"hf upload me/mine {model}" in str(caught.value)
