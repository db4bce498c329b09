"""Models and checkpoints from someone else: no pickle is loaded, no code runs that nobody asked for."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Lab, make_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from stages.checkpoint import Checkpoints, latest_checkpoint, load_checkpoint, read_facts
from stages.model_files import model_identity, parameters, tokenizer_identity
from stages.ranks import Ranks
from stages.teacher import load_causal_lm, random_causal_lm
from stages.tokenizer import load_tokenizer
from storage.errors import CheckpointError, TeacherError
from storage.fingerprint import HashMemo, bytes_sha256, canonical_json, fingerprint

CPU = torch.device("cpu")
ALONE = Ranks(CPU)


class Bomb:
    """Whoever unpickles it leaves a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """A file that is there if a bomb went off; a bomb is shown to do so."""
    pickle.loads(pickle.dumps(Bomb(tmp_path / "proof")))
    assert (tmp_path / "proof").exists()
    return tmp_path / "mark"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_model(tmp_path / "model", 50, 1, layers=1)
    return tmp_path / "model"


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """The weights of another model of the same shape."""
    make_model(tmp_path / "other", 50, 2, layers=1)
    return tmp_path / "other/model.safetensors"


def load(folder: Path, **more: Any) -> Any:
    return load_causal_lm(
        folder, "teachers.x.model", dtype=torch.float32, attention="auto", device=CPU, **more
    )


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# -- models


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.ckpt"])
def test_pickled_weights_are_refused(folder: Path, mark: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Bomb(mark)}, folder / name)
    with pytest.raises(TeacherError, match="no safetensors weights") as told:
        load(folder)
    assert name in str(told.value) and "save_pretrained" in told.value.todo and not mark.exists()
    with pytest.raises(TeacherError, match="no safetensors weights"):
        model_identity(folder, "teachers.x.model", HashMemo(folder.parent / "hashes.json"))


def test_pickled_weights_beside_safetensors_are_not_looked_at(folder: Path, mark: Path) -> None:
    torch.save({"lm_head.weight": Bomb(mark)}, folder / "pytorch_model.bin")
    load(folder)
    assert not mark.exists()


@pytest.mark.parametrize(
    "named", ["pytorch_model.bin", "../other/model.safetensors", "/x.safetensors"]
)
def test_an_index_leads_nowhere_else(folder: Path, mark: Path, named: str) -> None:
    torch.save({"lm_head.weight": Bomb(mark)}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "part.safetensors", "b": named}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(TeacherError, match="index of weights") as told:
        load(folder)
    assert named in str(told.value) and not mark.exists()


OTHER_WEIGHTS = {
    "outside": ("evil.safetensors.index.json", "../other/model.safetensors"),
    "below": ("sub/w.safetensors", None),
    "pickle by an index": ("evil.safetensors.index.json", "w.bin"),
    "pickle": ("adapter_model.bin", None),
}


@pytest.mark.parametrize("way", OTHER_WEIGHTS)
@pytest.mark.parametrize("inside", [False, True])
def test_a_configuration_names_no_other_weights(
    folder: Path, other: Path, way: str, inside: bool
) -> None:
    """transformers would load them, while the identity is of those that lie there by their own names."""
    tensors = load_file(other)
    for name in ("w.bin", "adapter_model.bin"):
        torch.save(tensors, folder / name)
    (folder / "sub").mkdir()
    (folder / "sub/w.safetensors").write_bytes(other.read_bytes())
    named, index = OTHER_WEIGHTS[way]
    if index:
        text = json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, index)})
        (folder / named).write_text(text)
    said: dict[str, Any] = {"transformers_weights": named}
    edit(folder / "config.json", **({"text_config": [said]} if inside else said))
    for call in (
        load,
        lambda folder: model_identity(folder, "teachers.x.model", HashMemo(folder.parent / "h")),
    ):
        with pytest.raises(TeacherError, match="in place of its own") as told:
            call(folder)
        assert f"transformers_weights: {named}" in str(told.value)


def test_no_configuration_is_read_in_place_of_another(folder: Path) -> None:
    """By that key transformers reads the other file, whose kernels and numbers nobody has looked at."""
    config = json.loads((folder / "config.json").read_text())
    other = {**config, "rms_norm_eps": 0.5, "_attn_implementation": "someone/kernel"}
    (folder / "config.4.0.0.json").write_text(json.dumps(other))
    edit(folder / "config.json", configuration_files=["config.4.0.0.json"])
    for call in (load, lambda f: random_causal_lm(f, "student.config", attention="auto")):
        with pytest.raises(TeacherError, match="in place of its own") as told:
            call(folder)
        assert "configuration_files: config.4.0.0.json" in str(told.value)


def test_no_tokenizer_is_read_in_place_of_another(lab: Lab) -> None:
    folder = lab.root / "a"
    (folder / "tokenizer.4.0.0.json").write_bytes((folder / "tokenizer.json").read_bytes())
    edit(folder / "tokenizer_config.json", fast_tokenizer_files=["tokenizer.4.0.0.json"])
    for call in (
        load_tokenizer,
        lambda folder, key: tokenizer_identity(folder, key, HashMemo(lab.root / "h")),
    ):
        with pytest.raises(TeacherError, match="in place of its own"):
            call(folder, "corpus.tokenizer")


def test_a_configuration_too_large_to_look_at_is_not_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.checked.LARGEST", 100)
    with pytest.raises(TeacherError, match="more than 100 bytes"):
        load(folder)


def test_an_index_that_chooses_is_part_of_what_a_cache_is_of(folder: Path, other: Path) -> None:
    """Of two files with the same tensors it decides which are loaded."""
    names = list(load_file(other))
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    other.rename(folder / "b.safetensors")
    memo, index = HashMemo(folder.parent / "h"), folder / "model.safetensors.index.json"
    told, loaded = [], []
    for name in ("a.safetensors", "b.safetensors"):
        index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, name)}))
        told.append(model_identity(folder, "k", memo))
        loaded.append(load(folder).get_input_embeddings().weight)
    assert not torch.equal(*loaded) and told[0] != told[1]


@pytest.mark.parametrize("beside", [None, "consolidated.safetensors"])
def test_an_ordinary_index_is_no_part_of_it(folder: Path, beside: str | None) -> None:
    """It names all that transformers reads: what shards of another layout, as Mistral's, lie beside them
    changes nothing, and caches made before keep their identity."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {f"model-{i}.safetensors": names[i::2] for i in range(2)}
    for shard, own in shards.items():
        save_file({name: tensors[name] for name in own}, folder / shard, {"format": "pt"})
    weight_map = {name: shard for shard, own in shards.items() for name in own}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    if beside:
        save_file({"norm.weight": torch.ones(3)}, folder / beside, {"format": "pt"})
    load(folder)
    files = {"config.json", *shards, *([beside] if beside else [])}
    memo = HashMemo(folder.parent / "h")
    assert set(model_identity(folder, "k", memo)) == files
    if beside:  # named, it is one that is read
        index.write_text(json.dumps({"metadata": {}, "weight_map": {**weight_map, "x": beside}}))
        assert set(model_identity(folder, "k", memo)) == {*files, index.name}


def test_an_adapter_is_no_model(folder: Path, mark: Path) -> None:
    """transformers would take its base from anywhere, and its weights from a pickle."""
    (folder / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "base_model_name_or_path": "x/y"}'
    )
    torch.save({"a": Bomb(mark)}, folder / "adapter_model.bin")
    with pytest.raises(TeacherError, match="adapter"):
        load(folder)
    assert not mark.exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff" * 8, (2**40).to_bytes(8, "little") + b"{}", b"\x02" + b"\0" * 7 + b"[]",
     b"\x19" + b"\0" * 7 + b'{"a": {"shape": [-1, 2]}}', b"\x0a" + b"\0" * 7 + b'{"a": 1}  '],
    ids=repr,
)  # fmt: skip
def test_what_is_no_safetensors_file(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(TeacherError, match="no safetensors file"):
        parameters(folder, "teachers.x.model")
    with pytest.raises(TeacherError, match="cannot be loaded"):
        load(folder)


def own_code(folder: Path, mark: Path) -> None:
    """Gives a model code of its own, which leaves a mark when it runs."""
    edit(
        folder / "config.json", model_type="strange",
        auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
    )  # fmt: skip
    (folder / "code.py").write_text(
        f"from pathlib import Path\nPath({str(mark)!r}).touch()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Config(LlamaConfig):\n    model_type = 'strange'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
    )


def test_code_of_a_model_runs_only_if_it_is_trusted(
    folder: Path, mark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    own_code(folder, mark)
    with pytest.raises(TeacherError, match="cannot be loaded") as told:
        load(folder)
    assert "trust_remote_code: true" in told.value.todo and not mark.exists()
    load(folder, trust_remote_code=True)
    assert mark.exists()


def test_code_of_a_tokenizer_does_not_run(lab: Lab, mark: Path) -> None:
    folder = lab.root / "a"
    edit(folder / "tokenizer_config.json", tokenizer_class="Strange",
         auto_map={"AutoTokenizer": ["code.Strange", "code.Strange"]})  # fmt: skip
    (folder / "code.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\n")
    with pytest.raises(TeacherError, match="tokenizer cannot be loaded") as told:
        load_tokenizer(folder, "corpus.tokenizer")
    assert "trust_remote_code" in told.value.todo and not mark.exists()


def test_trusted_code_is_part_of_what_a_cache_is_of(folder: Path, mark: Path) -> None:
    own_code(folder, mark)
    memo = HashMemo(folder.parent / "hashes.json")
    plain = model_identity(folder, "k", memo)
    trusted = model_identity(folder, "k", memo, trust_remote_code=True)
    assert trusted == {**plain, "code.py": bytes_sha256((folder / "code.py").read_bytes())}
    (folder / "code.py").write_text("pass")
    assert model_identity(folder, "k", memo) == plain
    assert model_identity(folder, "k", memo, trust_remote_code=True) != trusted


def test_code_of_another_repository_cannot_be_recorded(folder: Path) -> None:
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "someone/else--code.Model"})
    with pytest.raises(TeacherError, match="another repository"):
        model_identity(folder, "k", HashMemo(folder.parent / "h.json"), trust_remote_code=True)


@pytest.mark.parametrize(
    "changes",
    [{"_attn_implementation": "someone/kernel"}, {"attn_implementation": "flash_attention_2|x/y:fn"},
     {"text_config": {"_attn_implementation": "someone/kernel@main"}},
     {"layers": [{"_experts_implementation": "someone/kernel"}]}],
    ids=str,
)  # fmt: skip
def test_a_configuration_names_no_kernels(folder: Path, changes: dict[str, Any]) -> None:
    """transformers would download compiled code by that name, whatever trust_remote_code says."""
    edit(folder / "config.json", **changes)
    with pytest.raises(TeacherError, match="code from elsewhere"):
        load(folder)


def test_a_config_that_is_no_object(lab: Lab, cli: Callable[..., Any]) -> None:
    for content in ("[]", "5", "{" * 9000, '{"text_config": 5, "hidden_size": "x"}'):
        (lab.root / "a/config.json").write_text(content)
        result = cli("plan", lab.write())
        assert result.exit_code in (0, 1) and "unexpected" not in result.output


# -- checkpoints


def checkpoint(root: Path) -> Path:
    checkpoints = Checkpoints(root, ALONE, 2, background=False)
    state = {"student": {"w": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(2.5).bfloat16()},
             "optimizer": {"step": torch.tensor(5.0), "none": torch.zeros(0, 3)},
             "random": {"0": {"cpu": torch.get_rng_state()}}}  # fmt: skip
    checkpoints.save(5, state, {"tokens": 9})
    checkpoints.close()
    return root / "step-00000005"


def empty(**more: Any) -> dict[str, Any]:
    return {"student": {"w": torch.zeros(2, 3), "b": torch.zeros((), dtype=torch.bfloat16)}, **more}


def test_a_checkpoint_holds_no_pickle(tmp_path: Path) -> None:
    """Every file is JSON or safetensors, which other readers open; none is a pickle, or a zip of one."""
    folder = checkpoint(tmp_path)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["facts.json", "rank-00000.safetensors", "tensors.json"]
    json.loads((folder / "tensors.json").read_bytes())
    with safe_open(folder / "rank-00000.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("student.w@0,0"), torch.arange(6.0).reshape(2, 3))
        assert "optimizer.step@" in file.keys()  # noqa: SIM118 - it is no dict
    for path in folder.iterdir():
        assert not zipfile.is_zipfile(path) and not re.match(rb"\x80[\x02-\x05]", path.read_bytes())
    state = empty()
    load_checkpoint(folder, read_facts(folder), state, ALONE)
    assert state["student"]["w"][1, 2] == 5.0 and state["student"]["b"] == 2.5


def test_no_pickle_is_loaded_from_a_checkpoint(tmp_path: Path, mark: Path) -> None:
    """One of DCP's own, as an earlier version wrote: refused, whoever vouches for it."""
    folder = checkpoint(tmp_path / "c")
    for path in (folder / "tensors.json", folder / "rank-00000.safetensors"):
        path.unlink()
    (folder / ".metadata").write_bytes(pickle.dumps(Bomb(mark)))
    torch.save(Bomb(mark), folder / "__0_0.distcp")
    facts = {"step": 5, "ranks": 1, "files": {}}
    (folder / "facts.json").write_bytes(canonical_json({**facts, "sha256": fingerprint(facts)}))
    found = latest_checkpoint(tmp_path / "c")
    assert found is not None
    with pytest.raises(CheckpointError, match="earlier version"):
        load_checkpoint(*found, empty(), ALONE)
    resign(folder, "tensors.json", pickle.dumps(Bomb(mark)))
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_checkpoint(folder, read_facts(folder), empty(), ALONE)
    assert not mark.exists()


def resign(folder: Path, name: str, data: bytes, **more: Any) -> None:
    """Writes a file and facts that vouch for it."""
    (folder / name).write_bytes(data)
    facts = json.loads((folder / "facts.json").read_bytes())
    facts.pop("sha256")
    facts = {**facts, **more, "files": {**facts["files"], name: bytes_sha256(data)}}
    (folder / "facts.json").write_bytes(canonical_json({**facts, "sha256": fingerprint(facts)}))


@pytest.mark.parametrize(
    ("file", "offset", "shape"),
    [
        ("../secret.safetensors", [0, 0], [2, 3]), ("/etc/passwd", [0, 0], [2, 3]),
        ("rank-00000.safetensors", [0, 0], [2**40, 3]), ("rank-00000.safetensors", [-1, 0], [2, 3]),
        ("rank-00000.safetensors", [0, 0], [1, 3]), ("facts.json", [0, 0], [2, 3]),
    ],
)  # fmt: skip
def test_pieces_lie_where_the_facts_say(
    tmp_path: Path, file: str, offset: list[int], shape: list[int]
) -> None:
    """And are the whole of their tensor: what no piece covers would stay as it was."""
    folder = checkpoint(tmp_path)
    index = json.loads((folder / "tensors.json").read_bytes())
    index["student.w"]["pieces"] = [[file, offset, shape]]
    resign(folder, "tensors.json", json.dumps(index).encode())
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_checkpoint(folder, read_facts(folder), empty(), ALONE)


@pytest.mark.parametrize(
    "files", [{"../x": "0" * 64}, {"/etc/passwd": ""}, [], {"tensors.json": 5}], ids=str
)
def test_facts_name_files_of_the_checkpoint_alone(tmp_path: Path, files: Any) -> None:
    folder = checkpoint(tmp_path)
    facts = {"step": 5, "ranks": 1, "files": files}
    (folder / "facts.json").write_bytes(canonical_json({**facts, "sha256": fingerprint(facts)}))
    with pytest.raises(CheckpointError, match="facts"):
        read_facts(folder)
