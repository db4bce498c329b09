"""`scholiast append` through the commands: caches grow, and nothing that is there is touched."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from conftest import Lab
from test_interruptions import digests, kill_when, succeed

from storage.blocks import BlockReader
from storage.corpus_info import load_info
from storage.layout import GROUP
from storage.reader import CacheReader

Cli = Callable[..., Any]


@pytest.fixture(autouse=True)
def _short_last_part(lab: Lab) -> None:
    """The lab's 51 blocks leave a gap before what is appended."""
    lab.config["corpus"]["blocks_per_part"] = 4


def grown(lab: Lab, **changes: Any) -> Path:
    """The configuration with a training and a held-out source more."""
    config = json.loads(json.dumps(lab.config["corpus"]["sources"]))
    config += [
        {"domain": "z", "format": "jsonl", "path": f"{lab.root}/y.jsonl"},
        {"domain": "z", "split": "heldout", "format": "jsonl", "path": f"{lab.root}/held.jsonl"},
    ]
    return lab.write("grown.yaml", corpus__sources=config, **changes)


def parts_of(root: Path) -> dict[str, str]:
    """sha256 of every shard, corpus part and manifest."""
    kinds = ("corpus/blocks/*", "**/manifests/*", f"cache/*/{GROUP}/*/c/**/*")
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for kind in kinds
        for path in root.glob(kind)
        if path.is_file()
    }


def test_append_adds_parts_and_touches_none(lab: Lab, cli: Cli) -> None:
    run = lab.root / "run"
    succeed(cli, "cache-teachers", lab.write())
    before = load_info(run / "corpus")
    assert before is not None and before.blocks % 4, "the test wants a gap"
    kept, held_open = parts_of(run), CacheReader(run / "cache/one")
    old = held_open.array("gold_logprob", np.arange(2))
    result = cli("append", grown(lab))
    assert result.exit_code == 0, result.output
    info = load_info(run / "corpus")
    assert info is not None and len(info.generations) == 2
    assert f"{info.blocks - before.blocks} blocks added" in result.output
    now = parts_of(run)
    assert {path: now[path] for path in kept} == kept and len(now) > len(kept)
    assert np.array_equal(held_open.array("gold_logprob", np.arange(2)), old)
    everything = np.arange(before.blocks)
    new = CacheReader(run / "cache/one")
    for name in new.layout.arrays():
        assert np.array_equal(new.array(name, everything), held_open.array(name, everything))
    again = cli("append", grown(lab))
    assert again.exit_code == 0 and "adds no sources" in again.output
    assert parts_of(run) == now


def test_appended_notes_are_those_of_the_sources_alone(lab: Lab, cli: Cli) -> None:
    """Statistics bit for bit, heads as sets (another cache learns other orders of ids); and the same
    read directly as by zarr-python, across the gap."""
    succeed(cli, "cache-teachers", lab.write())
    succeed(cli, "append", grown(lab))
    sources = [
        {"domain": "z", "format": "jsonl", "path": f"{lab.root}/y.jsonl"},
        {"domain": "z", "split": "heldout", "format": "jsonl", "path": f"{lab.root}/held.jsonl"},
    ]
    alone = lab.write("alone.yaml", run_dir=f"{lab.root}/alone", corpus__sources=sources)
    succeed(cli, "cache-teachers", alone)
    info = load_info(lab.root / "run/corpus")
    assert info is not None
    first = info.generations[1].first_part * info.blocks_per_part
    ids = np.arange(first, first + info.generations[1].blocks)
    blocks = BlockReader(lab.root / "run/corpus").read(ids)
    for teacher in ("one", "two"):
        ours = CacheReader(lab.root / "run/cache" / teacher)
        theirs = CacheReader(lab.root / "alone/cache" / teacher)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            group = zarr.open_group(lab.root / "run/cache" / teacher / GROUP, mode="r")
            for name in ours.layout.arrays():
                assert group[name].shape[0] == ids[-1] + 1
                assert np.array_equal(ours.array(name, ids), group[name][ids[0] : ids[-1] + 1])
        for name in ("entropy", "gold_logprob", "log_tail_mass", "log_z", "feature_2"):
            own = ours.array(name, ids)
            assert np.array_equal(own, theirs.array(name, np.arange(len(ids)))), name
        head, other = ours.read(ids).head, theirs.read(np.arange(len(ids))).head
        mine, others = np.argsort(head.ids, -1), np.argsort(other.ids, -1)
        for a, b in ((head.ids, other.ids), (head.logprobs, other.logprobs)):
            assert np.array_equal(
                np.take_along_axis(a, mine, -1)[blocks.scored],
                np.take_along_axis(b, others, -1)[blocks.scored],
            )
    alone_blocks = BlockReader(lab.root / "alone/corpus").read(np.arange(len(ids)))
    assert np.array_equal(blocks.tokens, alone_blocks.tokens)


@pytest.mark.long
def test_killed_append_goes_on_and_ends_the_same(lab: Lab, cli: Cli) -> None:
    """Also where a part of the older generation was still missing."""
    undisturbed = f"{lab.root}/undisturbed"
    succeed(cli, "cache-teachers", lab.write("first.yaml", run_dir=undisturbed))
    succeed(cli, "append", grown(lab, run_dir=undisturbed))
    succeed(cli, "cache-teachers", lab.write())
    cache = lab.root / "run/cache"
    sorted(cache.glob("two/manifests/*"))[-1].unlink()  # the short one before the gap
    config, before = grown(lab), len(list(cache.glob("*/manifests/*")))
    kill_when(lambda: len(list(cache.glob("*/manifests/*"))) >= before + 3, "append", config)
    succeed(cli, "append", config)
    assert digests(cache) == digests(lab.root / "undisturbed/cache")
    assert digests(lab.root / "run/corpus") == digests(lab.root / "undisturbed/corpus")


def test_one_more_teacher(lab: Lab, cli: Cli) -> None:
    """Before or after the corpus grew, the new teacher's cache is the same."""
    teachers = lab.config["teachers"]
    one = {"one": teachers["one"]}
    succeed(cli, "cache-teachers", lab.write(teachers=one))
    succeed(cli, "append", grown(lab, teachers=one))
    kept = parts_of(lab.root / "run")
    result = cli("append", grown(lab))
    assert result.exit_code == 0 and "adds no sources" in result.output
    now = parts_of(lab.root / "run")
    assert {path: now[path] for path in kept} == kept
    other = f"{lab.root}/other"
    succeed(cli, "cache-teachers", lab.write("other.yaml", run_dir=other))
    succeed(cli, "append", grown(lab, run_dir=other))
    assert digests(lab.root / "run/cache/two") == digests(lab.root / "other/cache/two")


def test_without_append_added_sources_are_refused(lab: Lab, cli: Cli) -> None:
    succeed(cli, "cache-teachers", lab.write())
    for command in ("plan", "prepare", "cache-teachers", "train-student"):
        result = cli(command, grown(lab))
        assert result.exit_code == 1, result.output
        assert "run `scholiast append`" in result.output and "sources.003" in result.output
    refused = cli("append", grown(lab, corpus__block_length=16))
    assert refused.exit_code == 1 and "block_length=16" in refused.output


@pytest.mark.long
def test_student_of_the_smaller_corpus_is_another_run(lab: Lab, cli: Cli) -> None:
    for command in ("cache-teachers", "train-student"):
        succeed(cli, command, lab.write())
    succeed(cli, "append", grown(lab))
    states = {row["step"]: row for row in json.loads(cli("status", grown(lab), "--json").output)}
    assert states["cache two"]["state"] == "done"
    assert cli("plan", grown(lab)).exit_code == 0
    result = cli("train-student", grown(lab))
    assert result.exit_code == 1
    assert "another run" in result.output and "train_blocks" in result.output
    assert "corpus_dir" in result.output
    folders = {"corpus_dir": f"{lab.root}/run/corpus", "cache_dir": f"{lab.root}/run/cache"}
    config = grown(lab, run_dir=f"{lab.root}/next", **folders, train__steps=None, train__epochs=1)
    for command in ("train-student", "evaluate", "report"):
        succeed(cli, command, config)
    figures = json.loads((lab.root / "next/evaluation.json").read_text())
    assert "z" in json.dumps(figures["teachers"]["one"])
