"""What is fuzzed: each target changes one artefact, has everything read that reads it, and says what came
of it. A target ends with an answer or an error of ours; anything else is a crash.

Changes are of two kinds. Damage leaves checksums as they are: what is then read must be what was written.
Malice signs what it writes, so that only the shape of things can be refused.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from click.testing import CliRunner
from fuzz.artefacts import ALONE, TEACHERS, digest_of, order, tensors
from fuzz.forgeries import forge
from fuzz.mutations import STRANGE, Draw, bytes_changed, json_changed, value_changed
from hypothesis import strategies as st

from pipeline.block_view import Vocabulary
from pipeline.cli import main
from pipeline.config import load_config
from pipeline.exchange.captured import Reading, capture_files, read_capture, usual_offset
from pipeline.exchange.checks import TOLERANCES, clean
from pipeline.exchange.command import FORMATS
from stages.checkpoint import latest_checkpoint, load_checkpoint
from stages.model_files import context_length, hidden_size, layer_count, parameters, read_config
from stages.train_student import counted
from storage.fingerprint import bytes_sha256, canonical_json, fingerprint
from storage.verify import verify

Files = dict[Path, bytes | None]
"""What files become; None: they are gone."""


class WrongData(Exception):
    """Damage was read as if nothing were the matter."""


@dataclass
class Ground:
    """A copy of the artefacts that targets work on; each puts back what it has changed.

    Attributes:
        root: the folder.
        truth: of each store, the digest of all it holds.
    """

    root: Path
    truth: dict[Path, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.config = self.root / "run.yaml"
        self.stores = {
            **{name: self.root / "run/cache" / name for name in TEACHERS},
            "corpus": self.root / "run/corpus",
        }
        self.files = {
            name: sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
            for name, root in self.stores.items()
        }
        for name, root in self.stores.items():
            self.truth[root] = digest_of(root, name == "corpus")


class Changed:
    """Files changed for the length of a block, then put back as they were."""

    def __init__(self, files: Files) -> None:
        self._new = files
        self._old = {p: p.read_bytes() if p.exists() else None for p in files}

    def __enter__(self) -> None:
        self._put(self._new)

    def __exit__(self, *_: object) -> None:
        self._put(self._old)

    def _put(self, files: Files) -> None:
        for path, data in files.items():
            if data is None:
                path.unlink(missing_ok=True)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)


def store_target(ground: Ground, draw: Draw) -> Files:
    """A file of a cache or the corpus is damaged; nothing may be read but what was written."""
    name = draw(st.sampled_from(sorted(ground.stores)))
    root = ground.stores[name]
    kind = draw(st.sampled_from(["json", "any"]))
    files = [f for f in ground.files[name] if kind == "any" or f.endswith(".json")]
    path = root / draw(st.sampled_from(files))
    data = path.read_bytes()
    if path.suffix == ".json" and draw(st.booleans()):
        changed = json_changed(draw, data, sign=False)
    else:
        changed = bytes_changed(draw, data)
    return {path: changed}


def read_stores(ground: Ground, files: Files, draw: Draw) -> None:
    path = next(iter(files))
    root = next(root for root in ground.stores.values() if path.is_relative_to(root))
    reader = draw(
        st.sampled_from(["read", "read", "verify", "inspect", "repair", "plan", "status"])
    )
    read_one(ground, root, reader)
    if reader == "read" and digest_of(root, root.name == "corpus") != ground.truth[root]:
        raise WrongData(path)


def read_one(ground: Ground, root: Path, reader: str) -> None:
    """Reads a store in one of the ways there are."""
    if reader == "read":
        digest_of(root, root.name == "corpus")
    elif reader == "verify":
        verify(root, workers=1, deep=True)
    elif reader == "inspect":
        command("inspect", root, "--json", "--sample", "2")
    elif reader == "repair":
        command("repair", root, "--dry-run", "--clean", "--deep")
    else:
        command(reader, ground.config, "--json")


def command(*words: object) -> None:
    """Runs a command in this process; raises what it raised."""
    result = CliRunner().invoke(main, [*(str(w) for w in words), "--debug", "--quiet"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception


def forged_target(ground: Ground, draw: Draw) -> Files:
    """A file of a cache or the corpus says something else, and all checksums hold."""
    name = draw(st.sampled_from(sorted(ground.stores)))
    return forge(draw, ground.stores[name])


def read_forged(ground: Ground, files: Files, draw: Draw) -> None:
    path = next(iter(files))
    root = next(root for root in ground.stores.values() if path.is_relative_to(root))
    reader = draw(
        st.sampled_from(["read", "read", "verify", "inspect", "repair", "plan", "status"])
    )
    read_one(ground, root, reader)


def config_target(ground: Ground, draw: Draw) -> Files:
    """The configuration's text is changed, or its values are."""
    data = ground.config.read_bytes()
    if draw(st.booleans()):
        return {ground.root / "changed.yaml": bytes_changed(draw, data)}
    value = yaml.safe_load(data)
    for _ in range(draw(st.integers(1, 3))):
        value = value_changed(draw, value)
    return {
        ground.root / "changed.yaml": yaml.safe_dump(value, allow_unicode=True).encode(
            "utf-8", "replace"
        )
    }


def read_config_file(ground: Ground, files: Files, draw: Draw) -> None:
    path = next(iter(files))
    overrides = draw(
        st.sampled_from([(), ("train.lr=1",), ("teachers.x.y=[&a x, *a]",), ("a=!!int x",)])
    )
    load_config(path, overrides)


def planned_target(ground: Ground, draw: Draw) -> Files:
    """Values of the configuration are changed, but not where it writes to."""
    value = yaml.safe_load(ground.config.read_bytes())
    folder = value.pop("run_dir")
    for _ in range(draw(st.integers(1, 2))):
        value = value_changed(draw, value)
    value = {**value, "run_dir": folder} if isinstance(value, dict) else value
    text = yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "replace")
    return {ground.root / "changed.yaml": text}


def read_planned(ground: Ground, files: Files, draw: Draw) -> None:
    command(draw(st.sampled_from(["plan", "status"])), next(iter(files)), "--json")


def checkpoint_target(ground: Ground, draw: Draw) -> Files:
    """A checkpoint's file is damaged, or forged with the facts that vouch for it."""
    folder = ground.root / "checkpoints/step-00000008"
    name = draw(st.sampled_from(["facts.json", "tensors.json", "rank-00000.safetensors", "latest"]))
    if name == "latest":
        return {folder.parent / name: bytes_changed(draw, (folder.parent / name).read_bytes())}
    data, sign = (folder / name).read_bytes(), draw(st.booleans())
    if name == "facts.json":
        return {folder / name: json_changed(draw, data, sign)}
    structured = name.endswith(".json") and draw(st.booleans())
    changed = json_changed(draw, data, sign=False) if structured else bytes_changed(draw, data)
    files: Files = {folder / name: changed}
    if sign:
        files |= vouched(folder, name, changed)
    return files


def vouched(folder: Path, name: str, changed: bytes) -> Files:
    """Returns a checkpoint's facts with another sha256 of one file, signed."""
    facts = json.loads((folder / "facts.json").read_bytes())
    facts.pop("sha256")
    facts["files"][name] = bytes_sha256(changed)
    return {folder / "facts.json": canonical_json({**facts, "sha256": fingerprint(facts)})}


def read_checkpoint(ground: Ground, files: Files, draw: Draw) -> None:
    found = latest_checkpoint(ground.root / "checkpoints")
    assert found is not None
    folder, facts = found
    position = order().resume(facts.get("position"))
    counted(facts, folder)
    order().take(position, 3)
    state = tensors(0.0)
    load_checkpoint(folder, facts, state, ALONE)
    step = float(folder.name.rsplit("-", 1)[1])
    damaged = len(files) == 1 and next(iter(files)).name != "facts.json"
    if damaged and not all(bool((t == step).all()) for t in state["student"].values()):
        raise WrongData(folder)


def model_target(ground: Ground, draw: Draw) -> Files:
    """A file of a model's folder is changed."""
    folder = ground.root / "a"
    name = draw(st.sampled_from(["config.json", "model.safetensors", "tokenizer.json", "index"]))
    if name == "index":
        index = {"weight_map": {"a": "model.safetensors", "b": "model.safetensors"}}
        value = value_changed(draw, index)
        return {folder / "model.safetensors.index.json": json.dumps(value).encode()}
    data = (folder / name).read_bytes()
    structured = name == "config.json" and draw(st.booleans())
    return {
        folder / name: json_changed(draw, data, False) if structured else bytes_changed(draw, data)
    }


def read_model(ground: Ground, files: Files, draw: Draw) -> None:
    path = next(iter(files))
    if path.name == "tokenizer.json":
        Vocabulary.read(path.parent).text(5)
    elif draw(st.integers(0, 9)) == 0:
        command("plan", ground.config, "--json")
    else:
        config = read_config(path.parent, "model")
        layer_count(config), hidden_size(config), context_length(config)
        parameters(path.parent, "model")


def capture_target(ground: Ground, draw: Draw) -> Files:
    """A capture of another tool is changed, or the layout beside it; there are no checksums."""
    folder = ground.root / "captures" / draw(st.sampled_from(sorted(FORMATS)))
    path = draw(st.sampled_from(sorted(folder.iterdir())))
    data = path.read_bytes()
    if draw(st.integers(0, 3)) == 0:
        return {path: bytes_changed(draw, data)}
    if path.suffix == ".jsonl":
        lines = data.splitlines()
        at = draw(st.integers(0, len(lines) - 1))
        lines[at] = json.dumps(_row_changed(draw, json.loads(lines[at]))).encode()
        return {path: b"\n".join(lines)}
    if path.suffix == ".yaml":
        value = _row_changed(draw, yaml.safe_load(data))
        return {path: yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "replace")}
    return {path: _table_changed(draw, path)}


def _row_changed(draw: Draw, row: dict[str, Any]) -> Any:
    """Returns a mapping with values changed: as often as any of the many candidates, one of its keys'."""
    if draw(st.booleans()):
        key = draw(st.sampled_from(sorted(row)))
        return {**row, key: draw(st.sampled_from([*STRANGE, 3, 64, 10**400, -(10**400)]))}
    return value_changed(draw, row)


def _table_changed(draw: Draw, path: Path) -> bytes:
    """Returns a Parquet file with one of its rows changed, of whatever types that then has."""
    rows = pq.read_table(path).to_pylist()[:5]
    at = draw(st.integers(0, len(rows) - 1))
    rows[at] = _row_changed(draw, rows[at])
    made = io.BytesIO()
    try:
        pq.write_table(pa.Table.from_pylist(rows), made)
    except (pa.ArrowException, TypeError, ValueError, OverflowError, AttributeError):
        return bytes_changed(draw, path.read_bytes())  # no table holds that
    return made.getvalue()


def read_captured(ground: Ground, files: Files, draw: Draw) -> None:
    """Mostly by the reader and the checks alone; in every tenth case by all that `import` does."""
    path = next(iter(files))
    folder, plain = path.parent, path.parent.name == "topk-jsonl"
    values = draw(st.sampled_from(["logprobs", "probabilities"])) if plain else "logprobs"
    keys = draw(st.sampled_from(["ids", "tokens"])) if plain else "ids"
    tokens = path if plain and draw(st.booleans()) else None
    if draw(st.integers(0, 9)):
        kind: Any = folder.name
        reading = Reading(
            kind, usual_offset(kind, tokens), values, keys, None, tokens, {"5": 5},
            lambda text: list(text.encode()),
        )  # fmt: skip
        for one in read_capture(capture_files(folder, kind), reading):
            clean(one, 300, TOLERANCES[kind])
        return
    more = ["--values", values, "--keys", keys, *(["--tokens", tokens] if tokens else [])]
    if draw(st.booleans()):
        more += ["--k", str(draw(st.integers(1, 8)))]
    command(
        "import", ground.config, "--teacher", "big", "--from", folder, "--format", folder.name,
        "--dry-run", "--json", *more, "--set", "teachers.big.model=nowhere", "--set",
        "loss.features={}",
    )  # fmt: skip


@dataclass(frozen=True)
class Target:
    """One thing that is fuzzed.

    Attributes:
        change: draws what files become.
        read: has them read.
        share: of the time.
    """

    change: Callable[[Ground, Draw], Files]
    read: Callable[[Ground, Files, Draw], None]
    share: float


TARGETS: dict[str, Target] = {
    "stores damaged": Target(store_target, read_stores, 2.0),
    "stores forged": Target(forged_target, read_forged, 4.0),
    "configuration": Target(config_target, read_config_file, 1.0),
    "configuration planned": Target(planned_target, read_planned, 1.0),
    "checkpoints": Target(checkpoint_target, read_checkpoint, 1.5),
    "models": Target(model_target, read_model, 0.5),
    "captures": Target(capture_target, read_captured, 1.5),
}


def ground_at(made: Path, folder: Path) -> Ground:
    """Returns a fresh copy of the artefacts, whose configuration names it."""
    shutil.copytree(made, folder, dirs_exist_ok=True)
    config = folder / "run.yaml"
    config.write_text(config.read_text().replace(str(made), str(folder)))
    return Ground(folder)
