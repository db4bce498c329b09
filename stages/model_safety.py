"""What of a model's folder is never read or run: pickled weights, adapters, code that nobody asked for.

No model is loaded here. Weights are safetensors, which hold numbers and nothing else; code runs only with
`trust_remote_code: true`, and then what is made by it names that code by content.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from storage.checked import parse, read_bounded
from storage.errors import TeacherError
from storage.fingerprint import HashMemo

_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_OTHERS_LAYOUT = "consolidated"
"""How the names of Mistral's own files begin, which lie beside transformers' in the same folder."""
_ELSEWHERE = ("transformers_weights", "configuration_files", "fast_tokenizer_files")
"""Keys by which transformers reads another file than the one that everybody looks at."""
_MOST_HEADER = 100_000_000
"""Bytes of a safetensors header, the format's own limit."""


def weight_files(folder: Path, key: str) -> list[Path]:
    """Returns the safetensors files of a checkpoint, sorted.

    Raises:
        TeacherError: there is none, or the folder says that weights lie elsewhere: in a file that its
            index names outside the folder, or in an adapter's (which may be a pickle, and whose base
            may be any model).
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
        raise TeacherError(
            "the model has no safetensors weights", where=f"{key}: {folder}",
            found=f"pickled weights, which are never loaded: {pickled[0]}" if pickled else None,
            todo="save it again as safetensors where it is trusted: "
            "AutoModelForCausalLM.from_pretrained(…).save_pretrained(…)",
        )  # fmt: skip
    if (folder / "adapter_config.json").exists():
        raise TeacherError(
            "the folder holds an adapter, not a whole model", where=f"{key}: {folder}",
            todo="merge it into its base (merge_and_unload) and save_pretrained the result",
        )  # fmt: skip
    _require_own(folder, key, {path.name for path in files})
    return files


def deciding_index(folder: Path, key: str) -> Path | None:
    """Returns the index of weights where it chooses among the folder's files, and so is part of what
    the model is; None where their contents alone decide.

    That is where all are loaded: the one whole file, or every file but those of another layout, which
    transformers does not read.

    Raises:
        TeacherError: as `weight_files`.
    """
    files = {path.name for path in weight_files(folder, key)}
    if _WHOLE in files or not (folder / _INDEX).exists():
        return None
    expected = {name for name in files if not name.startswith(_OTHERS_LAYOUT)}
    return None if _named(folder) == expected else folder / _INDEX


def _named(folder: Path) -> set[str]:
    """Returns the files that the index of weights names."""
    return set(parse(read_bounded(folder / _INDEX))["weight_map"].values())


def _require_own(folder: Path, key: str, files: set[str]) -> None:
    """Refuses an index of weights that names anything but the folder's safetensors files."""
    if not (folder / _INDEX).exists():
        return
    try:
        strange = sorted(str(name) for name in _named(folder) - files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        strange = [f"{type(error).__name__}: {error}"]
    if strange:
        raise TeacherError(
            "the index of weights names what is no safetensors file of the folder",
            where=f"{key}: {folder / _INDEX}", found=strange[0][:200],
            todo="download or save the model again, whole",
        )  # fmt: skip


def require_plain(folder: Path, key: str) -> None:
    """Refuses a configuration by which transformers would read or run something else than it seems.

    That is another file of weights (which may be a pickle, or lie outside the folder), another
    configuration or tokenizer, none of which is part of the model's identity; or a repository of compiled
    kernels, which is downloaded and run, trusted or not, where the package `kernels` is installed.

    Args:
        folder: a model's or a tokenizer's, or a configuration's file.

    Raises:
        TeacherError: says which key.
    """
    if folder.is_file():
        _require_plain(folder, key)
        return
    for name in ("config.json", "tokenizer_config.json"):
        _require_plain(folder / name, key)


def _require_plain(path: Path, key: str) -> None:
    try:
        config = parse(read_bounded(path))
    except OSError:
        return  # whoever loads it says what is wrong
    except ValueError as error:  # transformers may still read it, as one that is too large
        raise TeacherError(
            f"the model's configuration cannot be read: {error}", where=f"{key}: {path}",
            todo="give the folder of a transformers checkpoint",
        ) from error  # fmt: skip
    for keys, value in _leaves(config):
        name = ".".join(keys)
        if found := next((one for one in keys if one in _ELSEWHERE), None):
            raise TeacherError(
                "the model's configuration names files to read in place of its own",
                where=f"{key}: {path}", found=f"{name}: {value}"[:200],
                expected="files with transformers' own names, which can be recorded",
                todo=f"take {found} out of {path.name}, and give the files it names their usual names",
            )  # fmt: skip
        if "implementation" in name and isinstance(value, str) and ("/" in value or ":" in value):
            raise TeacherError(
                "the model's configuration asks for code from elsewhere", where=f"{key}: {path}",
                expected="attention that transformers has", found=f"{name}: {value}"[:200],
                todo=f"take that key out of {path.name}, and choose by `attention`",
            )  # fmt: skip


def _leaves(value: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yields (keys on the way there, value) of all that holds nothing further, however deep it lies."""
    left: list[tuple[tuple[str, ...], Any]] = [((), value)]
    while left:
        keys, one = left.pop()
        if isinstance(one, dict) and one:
            left += [((*keys, key), inner) for key, inner in one.items()]
        elif isinstance(one, list) and one:
            left += [(keys, inner) for inner in one]
        else:
            yield keys, one


def first_line(error: Exception) -> str:
    """Returns what an error says, on one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def todo_of(error: Exception, otherwise: str) -> str:
    """Returns what to do about a model that cannot be loaded: of one with code, to decide about that."""
    if "trust_remote_code" not in str(error):
        return otherwise
    return (
        "its own code is not run unless it is trusted: read it, and then set trust_remote_code: true "
        "beside the model (a tokenizer's is never run for the corpus); or take a model without code"
    )


def safetensors_header(path: Path, key: str) -> dict[str, Any]:
    """Returns tensor → {dtype, shape, data_offsets} of a file, read from its header alone.

    Raises:
        TeacherError: it is no safetensors file.
    """
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if not 2 <= size <= min(_MOST_HEADER, path.stat().st_size - 8):
                raise ValueError(f"a header of {size:,} bytes")
            header = parse(file.read(size))
        tensors = {name: one for name, one in header.items() if name != "__metadata__"}
        for one in tensors.values():
            if not all(isinstance(n, int) and n >= 0 for n in one["shape"]):
                raise ValueError(f"a shape of {one['shape']!r:.40}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TeacherError(
            f"no safetensors file: {error}", where=f"{key}: {path}",
            todo="download or save the model again",
        ) from error  # fmt: skip
    return tensors


def code_identity(folder: Path, key: str, memo: HashMemo) -> dict[str, str]:
    """Returns file name → sha256 of the code that comes with a model, at any depth.

    For models that were told to be trusted: their code decides what they say as their weights do.

    Raises:
        TeacherError: the configuration names code of another repository, which may change at any time.
    """
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).is_file() and (elsewhere := _elsewhere(folder / name)):
            raise TeacherError(
                "the model runs code of another repository", where=f"{key}: {folder / name}",
                found=elsewhere, expected="code that lies beside the model, and so can be recorded",
                todo="copy those .py files into the folder, and drop the part before '--' in auto_map",
            )  # fmt: skip
    paths = sorted(folder.rglob("*.py"))
    return {path.relative_to(folder).as_posix(): memo.sha256(path) for path in paths}


def _elsewhere(path: Path) -> str | None:
    """Returns a reference of a configuration's auto_map that begins with a repository's name."""
    try:
        named = json.dumps(parse(read_bounded(path)).get("auto_map") or {})
    except (OSError, ValueError, AttributeError):
        return None  # whoever loads it says what is wrong
    return next((part for part in named.split('"') if "--" in part), None)
