"""Every mistake a user can make: one message with place, both values and what to do; no traceback."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Lab, make_model, make_tokenizer, sentences

from storage import durable
from storage.errors import CorpusError

Cli = Callable[..., Any]


def refused(result: Any, *parts: str, code: int = 1) -> None:
    assert result.exit_code == code, result.output
    assert result.output.lstrip().splitlines()[-1].strip().startswith("to do:"), result.output
    assert "Traceback" not in result.output
    for part in parts:
        assert part in result.output, (part, result.output)


def test_unknown_key(lab: Lab, cli: Cli) -> None:
    refused(cli("plan", lab.write(trian={})), "trian: unknown key", "'train'", code=2)


def test_missing_configuration(lab: Lab, cli: Cli) -> None:
    refused(cli("plan", lab.root / "none.yaml"), "none.yaml", code=2)


def test_unknown_command_and_option(cli: Cli) -> None:
    assert cli("distil").exit_code == 2
    assert cli("plan", "x.yaml", "--fast").exit_code == 2


def test_missing_model(lab: Lab, cli: Cli) -> None:
    """Before the corpus is packed, which may take hours."""
    config = lab.write(teachers__one__model=f"{lab.root}/nowhere")
    for more in ([], ["--dry-run"]):
        refused(cli("cache-teachers", config, *more), "teachers.one.model", "nowhere")
    assert not (lab.root / "run/corpus").exists()


def test_model_without_weights_or_tokenizer(lab: Lab, cli: Cli) -> None:
    (lab.root / "b/model.safetensors").rename(lab.root / "b/hidden")
    refused(cli("cache-teachers", lab.write()), "no safetensors weights", "teachers.two.model")
    (lab.root / "b/hidden").rename(lab.root / "b/model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (lab.root / "b" / name).unlink()
    refused(cli("cache-teachers", lab.write()), "tokenizer", "teachers.two.model")


def test_another_tokenizer(lab: Lab, cli: Cli) -> None:
    make_tokenizer(lab.root / "b", texts=[text[::-1] for text in sentences(200, 9)])
    result = cli("cache-teachers", lab.write())
    refused(result, "teacher 'two' has another tokenizer", "token id", "expected:", "found:")
    assert not (lab.root / "run/corpus").exists(), "hours of packing would have been spent first"
    refused(cli("cache-teachers", lab.write(), "--dry-run"), "has another tokenizer")


def test_same_vocabulary_cut_differently(lab: Lab, cli: Cli) -> None:
    path = lab.root / "b/tokenizer.json"
    state = json.loads(path.read_text())
    state["pre_tokenizer"]["add_prefix_space"] = True
    path.write_text(json.dumps(state))
    refused(cli("cache-teachers", lab.write()), "cuts text differently", "pre_tokenizer")


@pytest.mark.after("cache-teachers")
def test_student_with_another_tokenizer(lab: Lab, cli: Cli) -> None:
    make_tokenizer(lab.root / "c", texts=[text[::-1] for text in sentences(200, 9)])
    make_model(lab.root / "c", lab.vocab_size, 3)
    config = lab.write(student={"model": f"{lab.root}/c"})
    refused(cli("train-student", config), "the student has another tokenizer")


@pytest.mark.after("cache-teachers")
def test_student_with_too_few_logits_or_too_short_a_context(lab: Lab, cli: Cli) -> None:
    shutil.copytree(lab.root / "a", lab.root / "c")
    make_model(lab.root / "c", lab.vocab_size - 1, 3)
    small = lab.write(student={"model": f"{lab.root}/c"})
    refused(cli("train-student", small), "the student has fewer logits")
    make_model(lab.root / "c", lab.vocab_size, 3)
    path = lab.root / "c/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_position_embeddings": 16}))
    refused(cli("train-student", small), "the student's context", "at most 16", code=2)


@pytest.mark.after("train-student")
def test_damaged_checkpoint(lab: Lab, cli: Cli) -> None:
    """A flipped byte is refused; following the advice mends it."""
    config = lab.write()
    folder = lab.root / "run/students/fused"
    shutil.rmtree(folder / "model")
    path = next((folder / "checkpoints").glob("step-00000006/rank-*.safetensors"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    refused(cli("train-student", config), path.name, "older step-* folder")
    (folder / "checkpoints/latest").write_text("step-00000004")
    assert cli("train-student", config).exit_code == 0


@pytest.mark.after("train-student")
def test_a_dry_run_refuses_a_checkpoint_of_other_settings(lab: Lab, cli: Cli) -> None:
    shutil.rmtree(lab.root / "run/students/fused/model")
    told = cli("train-student", lab.write(), "--dry-run")
    assert told.exit_code == 0 and "export student 'fused'" in told.output, told.output
    for more in (["--dry-run"], []):
        result = cli("train-student", lab.write(), "--set", "train.lr=0.5", *more)
        refused(result, "student of other settings", "train.lr")


@pytest.mark.after("cache-teachers")
def test_a_reader_that_goes_away_is_no_error(lab: Lab) -> None:
    """`scholiast inspect … | head` ends quietly."""
    words = [sys.executable, "-m", "pipeline.cli", "inspect", lab.write()]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 1


@pytest.mark.after("cache-teachers")
def test_two_trainings_in_one_folder(lab: Lab, cli: Cli) -> None:
    """The second is refused as long as the first lives; a kill leaves no lock behind."""
    config = lab.write()
    folder = lab.root / "run/students/fused"
    folder.mkdir(parents=True)
    began, begin = os.pipe()
    child = os.fork()
    if not child:
        with durable.claimed(folder / ".training"):
            os.write(begin, b"!")
            time.sleep(600)
    os.read(began, 1)
    refused(cli("train-student", config), "another training", str(folder), f"process {child} on")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert cli("train-student", config).exit_code == 0
    assert not (folder / ".training").exists()


@pytest.mark.after("train-student")
def test_a_student_that_another_process_has_finished_meanwhile(
    lab: Lab, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = lab.write()
    done = lab.root / "run/students/fused/model/scholiast.json"
    aside, before = done.rename(lab.root / "aside.json"), done.parent.stat().st_ino

    @contextlib.contextmanager
    def claimed(path: Path) -> Iterator[None]:
        aside.rename(done)
        yield

    monkeypatch.setattr(durable, "claimed", claimed)
    assert cli("train-student", config).exit_code == 0
    assert done.parent.stat().st_ino == before, "exported once more"


def test_numbers_that_the_optimizer_would_refuse(lab: Lab, cli: Cli) -> None:
    refused(cli("plan", lab.write(train__betas=[1.0, 0.9])), "train.betas.0", code=2)
    refused(cli("plan", lab.write(train__seed=2**64)), "train.seed", code=2)


def test_a_rule_between_keys_is_told_without_a_dump(lab: Lab, cli: Cli) -> None:
    wrong = {"train__schedule": "wsd", "train__warmup": 0.9, "train__decay": 0.9}
    result = cli("plan", lab.write(**wrong))
    refused(result, "not valid: train: `warmup` and `decay` together exceed the run\n", code=2)
    assert "Value error" not in result.output and "'accumulate'" not in result.output


@pytest.mark.after("cache-teachers")
def test_a_student_that_cannot_be_packed(lab: Lab, cli: Cli) -> None:
    """Its recurrent layers would carry one document's state into the next, and nothing would tell."""
    config = {
        "model_type": "recurrent_gemma", "vocab_size": lab.vocab_size, "hidden_size": 32,
        "lru_width": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3,
        "logits_soft_cap": 1e6,  # another head of its own: that would be refused first
    }  # fmt: skip
    (lab.root / "student").mkdir()
    (lab.root / "student/config.json").write_text(json.dumps(config))
    path = lab.write(student={"config": f"{lab.root}/student"})
    refused(cli("train-student", path), "lets a packed document see", "student.attention")
    absent = lab.write(student={"config": f"{lab.root}/none"})
    refused(cli("train-student", absent), f"student.config: {lab.root}/none")


def test_empty_corpus(lab: Lab, cli: Cli) -> None:
    for name in ("x", "y", "held"):
        (lab.root / f"{name}.jsonl").write_text('{"text": ""}\n')
    refused(cli("prepare", lab.write()), "the corpus has no tokens")


def test_corpus_without_files(lab: Lab, cli: Cli) -> None:
    (lab.root / "y.jsonl").unlink()
    refused(cli("prepare", lab.write()), "corpus.sources.1.path", "y.jsonl")


def test_head_larger_than_the_vocabulary(lab: Lab, cli: Cli) -> None:
    config = lab.write(store__k=lab.vocab_size + 1)
    refused(cli("cache-teachers", config), "store.k", f"at most {lab.vocab_size}", code=2)
    assert cli("cache-teachers", lab.write(store__k=lab.vocab_size)).exit_code == 0


def test_block_longer_than_a_context(lab: Lab, cli: Cli) -> None:
    config = lab.write(corpus__block_length=300)
    refused(cli("cache-teachers", config), "corpus.block_length", "at most 256", "300", code=2)


def test_layer_that_does_not_exist(lab: Lab, cli: Cli) -> None:
    config = lab.write(teachers__two__feature_layers=[2, 9])
    refused(cli("cache-teachers", config), "teachers.two.feature_layers", "1 to 3", "[9]")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"loss__temperature": 3.0}, "loss.temperature 3.0 is neither 1 nor in store.temperatures"),
        ({"fusion": {"weights": "static", "static": {"one": 1.0}}}, "fusion.static must give"),
        ({"loss__features__pairs": []}, "loss.features.pairs is empty"),
        ({"teachers__two__feature_layers": [1]}, "teachers.two.feature_layers is [1]"),
        (
            {"fusion": {"teachers": ["two"]}, "teachers__two__feature_layers": []},
            "none of ['two'] has feature_layers",
        ),
    ],
)
def test_what_stage_two_would_miss_is_told_before_stage_one(
    lab: Lab, cli: Cli, changes: dict[str, Any], match: str
) -> None:
    refused(cli("plan", lab.write(**changes)), match, code=2)


def test_names_that_reports_use_are_refused(lab: Lab, cli: Cli) -> None:
    teachers = {**lab.config["teachers"], "fused": lab.config["teachers"]["one"]}
    refused(cli("plan", lab.write(teachers=teachers)), "cannot be named 'fused'", code=2)
    lab.config["corpus"]["sources"][0]["domain"] = "overall"
    refused(cli("plan", lab.write()), "cannot be named 'overall'", code=2)


def test_interrupted_preparation_of_other_options(lab: Lab, cli: Cli) -> None:
    assert cli("prepare", lab.write()).exit_code == 0
    (lab.root / "run/corpus/corpus.json").unlink()
    refused(
        cli("prepare", lab.write(corpus__block_length=16)), "block_length=16", "block_length=32"
    )
    assert cli("prepare", lab.write()).exit_code == 0


def test_share_that_leaves_one_side_empty(lab: Lab, cli: Cli) -> None:
    (lab.root / "x.jsonl").write_text('{"text": "one document"}\n')
    lab.config["corpus"]["sources"][0]["heldout"] = 0.1
    refused(cli("prepare", lab.write()), "corpus.sources.0", "1 documents", "`heldout`")


@pytest.mark.after("train-student")
def test_moved_splits_are_another_run(lab: Lab, cli: Cli) -> None:
    """The tokens, and with them the cache, stay the same; a student trained on them does not."""
    sources = lab.config["corpus"]["sources"]
    sources[1]["split"], sources[2]["split"] = "heldout", "train"
    shutil.rmtree(lab.root / "run/corpus")
    assert "cache complete" in cli("cache-teachers", lab.write()).output
    refused(cli("train-student", lab.write()), "another run", "train_blocks")
    refused(cli("evaluate", lab.write()), "another run", "train_blocks")


@pytest.mark.after("train-student")
def test_student_of_other_settings_is_not_evaluated(lab: Lab, cli: Cli) -> None:
    """What was given with --set to the training must be given again: the message says what to type."""
    other = lab.write(loss__alpha=1.0, train__lr=1.0)
    ended = cli("evaluate", other)
    refused(ended, "a student of other settings", "loss.alpha=1.0; train.lr=1.0, as given now",
            "loss.alpha=0.9; train.lr=0.003, as it was trained",
            "--set loss.alpha=0.9 --set train.lr=0.003")  # fmt: skip
    typed = ended.output.partition("trained with: ")[2].partition(", or name")[0]
    assert cli("evaluate", other, "--dry-run", *shlex.split(typed)).exit_code == 0
    baseline = cli("evaluate", lab.write(), "--set", "train.baseline=true")
    refused(baseline, "'cross_entropy' has not been trained", "trained here: fused")


@pytest.mark.after("cache-teachers")
@pytest.mark.parametrize("damage", ["truncated", "zeroed"])
def test_damaged_shard_is_mended_by_the_advice(lab: Lab, cli: Cli, damage: str) -> None:
    config, root = lab.write(), lab.root / "run/cache/one"
    path = root / "notes.zarr/head_ids/c/1/0/0"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] if damage == "truncated" else bytes(len(whole)))
    next(root.glob("manifests/000001-*.json")).unlink()
    assert cli("cache-teachers", config).exit_code == 0
    assert path.read_bytes() == whole


@pytest.mark.after("cache-teachers")
def test_lost_cache_json_keeps_the_parts(lab: Lab, cli: Cli) -> None:
    root = lab.root / "run/cache/one"
    before = {p: p.stat().st_mtime_ns for p in root.glob("notes.zarr/**/*") if p.is_file()}
    info = (root / "cache.json").read_bytes()
    (root / "cache.json").unlink()
    refused(cli("cache-teachers", lab.write(store__k=4)), "made from something else")
    assert not (root / "cache.json").exists()
    assert cli("cache-teachers", lab.write()).exit_code == 0
    assert (root / "cache.json").read_bytes() == info
    assert {p: p.stat().st_mtime_ns for p in before} == before


@pytest.mark.after("cache-teachers")
def test_cache_made_from_something_else_is_left_as_it_is(lab: Lab, cli: Cli) -> None:
    before = {p: p.read_bytes() for p in (lab.root / "run/cache").rglob("*") if p.is_file()}
    refused(cli("cache-teachers", lab.write(store__k=9)), "store.k=9", "store.k=8")
    make_model(lab.root / "b", lab.vocab_size + 24, 77, hidden=64)
    refused(cli("cache-teachers", lab.write()), "run/cache/two", "teacher.model.safetensors=")
    after = {p: p.read_bytes() for p in (lab.root / "run/cache").rglob("*") if p.is_file()}
    assert after == before


@pytest.mark.after("train-student")
def test_run_with_other_settings_is_left_as_it_is(lab: Lab, cli: Cli) -> None:
    model = lab.root / "run/students/fused/model/model.safetensors"
    before = model.read_bytes()
    refused(cli("train-student", lab.write(train__lr=1e-4)), "train.lr=0.0001", "train.lr=0.003")
    assert model.read_bytes() == before


def test_steps_out_of_order(lab: Lab, cli: Cli) -> None:
    config = lab.write()
    refused(cli("train-student", config), "not been prepared", "scholiast cache-teachers")
    assert cli("prepare", config).exit_code == 0
    refused(cli("train-student", config), "parts missing", "one: ")
    assert cli("cache-teachers", config).exit_code == 0
    refused(cli("evaluate", config), "has not been trained", "scholiast train-student")
    refused(cli("report", config), "not been evaluated", "scholiast evaluate")
    refused(cli("generate", config, "-p", "a"), "no trained student")


def test_too_little_disk(lab: Lab, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli("prepare", lab.write()).exit_code == 0
    usage = shutil.disk_usage(lab.root)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    refused(cli("cache-teachers", lab.write()), "too little disk space", "0.001 MB free")


@pytest.mark.after("cache-teachers")
@pytest.mark.parametrize("name", ["head_ids/c/1/0/0", "entropy/c/0/0"])
def test_damaged_cache(lab: Lab, cli: Cli, name: str) -> None:
    """A flipped byte is refused, and following the message's advice mends it."""
    config = lab.write(train__steps=None, train__epochs=1)  # reads every part
    root = lab.root / "run/cache/one"
    path: Path = root / "notes.zarr" / name
    data = bytearray(path.read_bytes())
    data[10] ^= 4
    path.write_bytes(data)
    part = int(name.split("/")[2])
    refused(cli("train-student", config), name, "scholiast repair")
    assert cli("repair", config).exit_code == 0
    assert not list(root.glob(f"manifests/{part:06d}-*.json"))
    assert cli("cache-teachers", config).exit_code == 0
    assert cli("train-student", config).exit_code == 0


@pytest.mark.after("cache-teachers")
def test_missing_shard(lab: Lab, cli: Cli) -> None:
    config = lab.write(train__steps=None, train__epochs=1)
    (lab.root / "run/cache/two/notes.zarr/head_logprobs/c/0/0/0").unlink()
    refused(cli("train-student", config), "head_logprobs/c/0/0/0", "missing")


def test_nothing_to_train_on(lab: Lab, cli: Cli) -> None:
    for source in lab.config["corpus"]["sources"]:
        source["split"] = "heldout"
    assert cli("cache-teachers", lab.write()).exit_code == 0
    refused(cli("train-student", lab.write()), "no training blocks")


def test_nothing_to_learn(lab: Lab, cli: Cli) -> None:
    """Documents of one token each: blocks, but not one row with a target."""
    (lab.root / "x.jsonl").write_text('{"text": "a"}\n' * 200)
    sources = [lab.config["corpus"]["sources"][0]]
    config = lab.write(corpus__sources=sources, corpus__append_eos=False)
    assert cli("cache-teachers", config).exit_code == 0
    refused(cli("train-student", config), "no row of the training blocks has a target")
    assert not list((lab.root / "run").rglob("metrics.jsonl"))


def test_empty_file_and_a_layer_named_twice(lab: Lab, cli: Cli) -> None:
    (lab.root / "x.jsonl").write_text("")
    result = cli("prepare", lab.write())
    refused(result, "x.jsonl", "it is empty")
    assert "StopIteration" not in result.output
    result = cli("plan", lab.write(teachers__one__feature_layers=[2, 2]))
    refused(result, "named twice", "feature_layers", code=2)


def test_only_the_sides_that_are_known_are_shown() -> None:
    assert "None" not in str(CorpusError("what", found="this", todo="do"))
    assert "None" not in str(CorpusError("what", expected="that", todo="do"))


def test_no_heldout_data_is_no_failure(lab: Lab, cli: Cli) -> None:
    lab.config["corpus"]["sources"].pop()
    for command in ("cache-teachers", "train-student", "evaluate", "report"):
        result = cli(command, lab.write())
        assert result.exit_code == 0, result.output
    assert "no held-out data" in result.output


def test_no_gpu(lab: Lab, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(cli("cache-teachers", lab.write(device="cuda")), "no GPU", "device", code=2)


def test_debug_shows_the_traceback(lab: Lab, cli: Cli) -> None:
    from storage.errors import IncompleteCache

    with pytest.raises(IncompleteCache):
        cli("train-student", lab.write(), "--debug", catch_exceptions=False)
