"""A model's folder without loading the model: where it lies, what it weighs, what identifies it.

Nothing here imports torch or transformers, so that plans and completeness checks take a moment.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import os
from pathlib import Path
from typing import Any

from stages.model_safety import (
    code_identity,
    deciding_index,
    require_plain,
    safetensors_header,
    weight_files,
)
from storage.checked import parse, read_bounded
from storage.errors import TeacherError
from storage.fingerprint import HashMemo

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip


def locate(model: str, revision: str | None, key: str, *, weights: bool = True) -> Path:
    """Returns the local folder of a model; a hub name is downloaded (or found in the hub cache).

    Args:
        model: folder or hub name.
        revision: hub revision.
        key: configuration key, for messages.
        weights: whether the weights are wanted too, or only configuration and tokenizer.

    Raises:
        TeacherError: neither a folder nor a hub model that can be reached.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder
    if _looks_like_path(model):
        raise _no_folder(model, key)
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.jinja", "*.txt", "*.model", "*.py"]
    patterns += ["README.md", "LICEN[SC]E*", "COPYING*"]  # for the student's model card
    try:
        return Path(
            snapshot_download(
                model, revision=revision,
                allow_patterns=[*patterns, "*.safetensors"] if weights else patterns,
            )
        )  # fmt: skip
    except Exception as error:  # the hub client has no common base for "cannot be had"
        raise TeacherError(
            f"the model cannot be had: {type(error).__name__}: {str(error).splitlines()[0]}",
            where=key, found=model,
            todo="check the name, the revision, the network and your hub token; or give a folder",
        ) from error  # fmt: skip


def _looks_like_path(model: str) -> bool:
    """Returns whether a name that is no folder was meant to be one: it is written as a path, or the
    folder is there that it would lie in, and the hub cache has no model of that name."""
    if model.startswith((".", "/", "~")) or model.count("/") != 1 or "\\" in model:
        return True
    return Path(model).parent.is_dir() and not _cached(model)


def _cached(model: str) -> bool:
    from huggingface_hub import constants

    return (Path(constants.HF_HUB_CACHE) / f"models--{model.replace('/', '--')}").is_dir()


def _no_folder(model: str, key: str) -> TeacherError:
    """Returns the error of a folder that is not there, with those there that may have been meant."""
    path = Path(os.path.expanduser(model))
    parent = path.parent
    near, todo = [], "give a folder that holds config.json, or a hub name like org/model"
    if parent.is_dir():
        with contextlib.suppress(OSError):
            names = sorted(one.name for one in parent.iterdir() if (one / "config.json").is_file())
            near = difflib.get_close_matches(path.name, names, 3) or names[:3]
    if "://" in model:
        todo = "give a hub model's name alone: org/model"
    elif path.is_dir():
        todo = f"write it out, since ~ is the shell's to expand: {path}"
    elif near:
        before = os.path.dirname(model.rstrip("/"))
        todo = f"did you mean {' or '.join(os.path.join(before, name) for name in near)}?"
    elif not parent.is_dir():
        found = next(one for one in parent.parents if one.is_dir())
        todo = f"there is no {parent} either, only {found}: {todo}"
    if model.count("/") == 1 and model[0] not in "./~":
        todo += f" (for the hub's model of that name run `hf download {model}` first)"
    return TeacherError("no such model folder", where=key, found=model, todo=todo)


def present(model: str, revision: str | None, *, weights: bool = True) -> bool:
    """Returns whether `locate` would download nothing: it is a path, or in the hub cache already.

    Args:
        weights: whether the weights are asked for too. The hub cache may hold a model's tokenizer
            alone, or some of its shards.
    """
    if Path(model).is_dir() or _looks_like_path(model):
        return True
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(model, revision=revision, local_files_only=True))
    except Exception:  # the hub client has no common base for "is not there"
        return False
    return _whole(folder) if weights else any(folder.iterdir())


def at_hand(model: str, revision: str | None, *, weights: bool = True) -> bool:
    """Returns whether a model (or its tokenizer alone) is here: a folder, or in the hub cache."""
    if Path(model).is_dir():
        return True
    return not _looks_like_path(model) and present(model, revision, weights=weights)


def _whole(folder: Path) -> bool:
    """Returns whether a snapshot holds weights, and all shards that its index names."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return any(folder.glob("*.safetensors"))
    try:
        shards = set(parse(read_bounded(index))["weight_map"].values())
        return all((folder / str(name)).is_file() for name in shards)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # cut off: the download begins again


def config_file(folder: Path) -> Path:
    """Returns the configuration's file, given that or its folder."""
    return folder if folder.is_file() else folder / "config.json"


def read_config(folder: Path, key: str) -> dict[str, Any]:
    """Returns config.json, with a multimodal model's `text_config` laid over it.

    Args:
        folder: that holds it, or the file itself.

    Raises:
        TeacherError: missing or not JSON.
    """
    path = config_file(folder)
    try:
        config = parse(read_bounded(path))
        if not isinstance(config, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError) as error:
        raise TeacherError(
            f"the model's configuration cannot be read: {error}", where=f"{key}: {path}",
            todo="give the folder of a transformers checkpoint",
        ) from error  # fmt: skip
    inner = config.get("text_config")
    return {**config, **(inner if isinstance(inner, dict) else {})}


def dimension(config: dict[str, Any], *names: str) -> int | None:
    """Returns the first of several names a configuration has for one dimension."""
    found = next((config[n] for n in names if config.get(n) is not None), None)
    return int(found) if isinstance(found, int | float) else None


def hidden_size(config: dict[str, Any]) -> int:
    """Returns D, or 0 if the configuration does not name it."""
    return dimension(config, "hidden_size", "n_embd", "d_model") or 0


def layer_count(config: dict[str, Any]) -> int | None:
    """Returns how many decoder layers there are, if the configuration says so."""
    return dimension(config, "num_hidden_layers", "n_layer", "num_layers")


def context_length(config: dict[str, Any]) -> int | None:
    """Returns the longest block the model was made for, if its configuration says so."""
    return dimension(config, "max_position_embeddings", "n_positions", "n_ctx")


def parameters(folder: Path, key: str) -> int:
    """Returns the number of stored parameters, from the safetensors headers alone.

    Raises:
        TeacherError: there are no weights, or a file of them is cut or damaged.
    """
    headers = (safetensors_header(path, key) for path in weight_files(folder, key))
    return sum(math.prod(tensor["shape"]) for header in headers for tensor in header.values())


def parameters_of(config: dict[str, Any]) -> int:
    """Returns about how many parameters a configuration means: attention, gated MLP, embeddings."""
    size, layers = hidden_size(config), layer_count(config) or 0
    heads = int(config.get("num_attention_heads") or 1)
    shared = int(config.get("num_key_value_heads") or heads) / heads
    inner = int(config.get("intermediate_size") or 4 * size)
    tied = 1 if config.get("tie_word_embeddings", True) else 2
    embeddings = int(config.get("vocab_size", 0)) * size * tied
    return layers * (int(2 * (1 + shared) * size * size) + 3 * size * inner) + embeddings


def model_identity(
    folder: Path, key: str, memo: HashMemo, trust_remote_code: bool = False
) -> dict[str, str]:
    """Returns file name → sha256 of the configuration and every weight file; of the index of weights
    where that leaves some out; of a trusted model also of its code.

    Raises:
        TeacherError: no weights that can be recorded, or a configuration that names others.
    """
    require_plain(folder, key)
    paths = [folder / "config.json", *weight_files(folder, key)]
    if index := deciding_index(folder, key):
        paths.append(index)
    code = code_identity(folder, key, memo) if trust_remote_code else {}
    identity = {path.name: memo.sha256(path) for path in paths} | code
    memo.save()
    return identity


def tokenizer_identity(folder: Path, key: str, memo: HashMemo) -> dict[str, str]:
    """Returns file name → sha256 of the tokenizer's files.

    Raises:
        TeacherError: the folder holds no tokenizer, or names other files of one.
    """
    require_plain(folder, key)
    found = {n: memo.sha256(folder / n) for n in _TOKENIZER_FILES if (folder / n).is_file()}
    if not found:
        raise TeacherError(
            "the folder holds no tokenizer", where=f"{key}: {folder}",
            todo="save the tokenizer beside the model (tokenizer.save_pretrained)",
        )  # fmt: skip
    return found
