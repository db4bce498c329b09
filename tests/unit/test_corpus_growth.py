"""More sources for a finished corpus: a generation of their own, and nothing else is touched."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Lab

import stages.packing
from stages.corpus import append, prepare
from stages.options import CorpusOptions, SourceOptions
from stages.progress import Silent
from storage import manifest
from storage.blocks import BlockReader, object_name
from storage.corpus_info import CorpusInfo, load_info
from storage.errors import CorpusError, IncompleteCache, StaleCache
from storage.fingerprint import HashMemo
from storage.repair import repair
from storage.verify import verify

Do = Callable[..., CorpusInfo]


def options(lab: Lab, names: str, width: int = 5, **changes: Any) -> CorpusOptions:
    """x, y and held by their first letters; H: x again, with a held-out share."""
    files = {"x": "x", "y": "y", "h": "held", "H": "x"}
    sources = [
        {"domain": name.lower(), "format": "jsonl", "path": str(lab.root / f"{files[name]}.jsonl"),
         "heldout": 0.3 if name == "H" else 0.0}
        for name in names
    ]  # fmt: skip
    base = {"tokenizer": str(lab.root / "a"), "block_length": 16, "blocks_per_part": width}
    return CorpusOptions(**{**base, **changes}, sources=tuple(SourceOptions(**s) for s in sources))


def do(call: Do, lab: Lab, chosen: CorpusOptions, name: str = "corpus") -> CorpusInfo:
    return call(chosen, lab.root / name, HashMemo(lab.root / "memo.json"), Silent())


def files(root: Path) -> dict[str, str]:
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in root.rglob("*")
        if p.is_file()
    }


def ids_of(info: CorpusInfo, generation: int) -> Any:
    """Block ids of one generation."""
    g = info.generations[generation]
    first = g.first_part * info.blocks_per_part
    return np.arange(first, first + g.blocks)


@pytest.mark.parametrize("width", [1, 3, 5, 64])
def test_appended_blocks_are_those_of_the_sources_alone(lab: Lab, width: int) -> None:
    before = do(prepare, lab, options(lab, "x", width))
    root, kept = lab.root / "corpus", files(lab.root / "corpus")
    info = do(append, lab, options(lab, "xyH", width))
    alone = do(prepare, lab, options(lab, "yH", width), "alone")
    assert info.generations[0] == before.generations[0] and info.sources[:1] == before.sources
    assert info.blocks == before.blocks + alone.blocks
    new, reader = ids_of(info, 1), BlockReader(root)
    assert new[0] % width == 0 and new[0] >= before.blocks
    assert all(
        set(range(*info.part_range(p))) <= {*ids_of(info, 0), *new} for p in range(info.parts)
    )
    ours, theirs = reader.read(new), BlockReader(lab.root / "alone").read(np.arange(alone.blocks))
    for name in ("tokens", "offset", "loss_mask"):
        assert np.array_equal(getattr(ours, name), getattr(theirs, name)), name
    shifted = np.where(theirs.document >= 0, theirs.document + 30, -1)
    assert np.array_equal(ours.document, shifted), "documents' numbers go on"
    assert ours.block_ids.tolist() == new.tolist()
    after = files(root)
    changed = {name for name, digest in kept.items() if after[name] != digest}
    assert changed == {"corpus.json", "begun.json"}
    assert load_info(root) == do(prepare, lab, options(lab, "xyH", width)) == info


def test_splits_and_domains_honour_the_gap(lab: Lab) -> None:
    before = do(prepare, lab, options(lab, "x"))
    assert before.blocks % 5, "the test wants a gap"
    info = do(append, lab, options(lab, "xyH"))
    for split, domain in (("train", "x"), ("train", "y"), ("train", "h"), ("heldout", "h")):
        ids = info.block_ids(split, domain)
        assert len(ids) and (info.domain_of(ids) == info.domains.index(domain)).all()
    every = np.sort(np.concatenate([info.block_ids("train"), info.block_ids("heldout")]))
    assert np.array_equal(every, np.concatenate([ids_of(info, 0), ids_of(info, 1)]))
    with pytest.raises(IndexError, match="gaps"):
        BlockReader(lab.root / "corpus").read([before.blocks])


class Kill(Exception):
    pass


@pytest.mark.parametrize("width", [3, 5])  # 48 blocks: with and without a gap
@pytest.mark.parametrize("parts", [0, 1, 3])
def test_killed_append_leaves_the_old_corpus_and_goes_on(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, width: int, parts: int
) -> None:
    before = do(prepare, lab, options(lab, "x", width))
    shutil.copytree(lab.root / "corpus", lab.root / "undisturbed")
    whole = do(append, lab, options(lab, "xyh", width), "undisturbed")
    written, real = [], stages.packing.write_part

    def dies(*args: Any) -> None:
        if len(written) == parts:
            raise Kill
        written.append(1)
        real(*args)

    monkeypatch.setattr(stages.packing, "write_part", dies)
    with pytest.raises(Kill):
        do(append, lab, options(lab, "xyh", width))
    monkeypatch.setattr(stages.packing, "write_part", real)
    assert do(prepare, lab, options(lab, "x", width)) == before
    assert len(BlockReader(lab.root / "corpus").read(np.arange(before.blocks)).tokens)
    with pytest.raises(StaleCache, match="scholiast append"):
        do(prepare, lab, options(lab, "xyh", width))
    assert do(append, lab, options(lab, "xyh", width)) == whole
    assert files(lab.root / "corpus") == files(lab.root / "undisturbed")


def test_killed_before_corpus_json(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """All parts stand, only the commit of the whole is missing."""
    import stages.corpus

    do(prepare, lab, options(lab, "x"))
    old = (lab.root / "corpus/corpus.json").read_bytes()
    whole = do(append, lab, options(lab, "xy"))
    kept = files(lab.root / "corpus")
    (lab.root / "corpus/corpus.json").write_bytes(old)

    def never(*args: Any) -> None:
        raise AssertionError("a part was packed again")

    monkeypatch.setattr(stages.packing, "write_part", never)
    assert do(append, lab, options(lab, "xy")) == whole
    assert files(lab.root / "corpus") == kept


@pytest.mark.parametrize("width", [3, 5])  # 48 blocks: with and without a gap
def test_appended_twice(lab: Lab, width: int) -> None:
    do(prepare, lab, options(lab, "x", width))
    second = do(append, lab, options(lab, "xy", width))
    kept = files(lab.root / "corpus")
    third = do(append, lab, options(lab, "xyh", width))
    assert third.generations[:2] == second.generations and len(third.generations) == 3
    assert len({g.fingerprint for g in third.generations}) == 3
    assert third.fingerprint == third.generations[2].fingerprint
    after = files(lab.root / "corpus")
    changed = {name for name, digest in kept.items() if after[name] != digest}
    assert changed == {"corpus.json", "begun.json"}
    documents = BlockReader(lab.root / "corpus").read(ids_of(third, 2)).document
    assert set(documents[documents >= 0].tolist()) == set(range(60, 68))
    assert do(append, lab, options(lab, "xyh", width)) == third, "nothing new"
    assert files(lab.root / "corpus") == after


@pytest.mark.parametrize("lost", [None, 1, -1])
def test_lost_files_are_made_again_the_same(lab: Lab, lost: int | None) -> None:
    """begun.json remembers the generations when corpus.json is deleted to mend a part."""
    do(prepare, lab, options(lab, "x"))
    info = do(append, lab, options(lab, "xy"))
    root = lab.root / "corpus"
    kept = files(root)
    (root / "corpus.json").unlink()
    if lost is not None:
        part = range(info.parts)[lost]
        manifest.path_of(root, part, info.owners.of(part)).unlink()
    assert do(prepare, lab, options(lab, "xy")) == info
    assert files(root) == kept


@pytest.mark.parametrize("part", [0, -1])
def test_repaired_parts_of_a_grown_corpus_are_the_same(lab: Lab, part: int) -> None:
    do(prepare, lab, options(lab, "x"))
    info = do(append, lab, options(lab, "xy"))
    root = lab.root / "corpus"
    assert verify(root).sound
    kept, path = files(root), root / object_name(range(info.parts)[part])
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    repair(verify(root))
    unfinished = verify(root)
    assert unfinished.sound and not unfinished.complete, unfinished.problems
    assert do(prepare, lab, options(lab, "xy")) == info
    assert files(root) == kept and verify(root).sound


def test_altered_begun_json_is_not_trusted(lab: Lab) -> None:
    do(prepare, lab, options(lab, "x"))
    do(append, lab, options(lab, "xy"))
    (lab.root / "corpus/corpus.json").unlink()
    path = lab.root / "corpus/begun.json"
    assert verify(lab.root / "corpus").sound
    path.write_bytes(path.read_bytes().replace(b'"block_length":16', b'"block_length":17'))
    assert [p.path for p in verify(lab.root / "corpus").problems if p.part is None] == [
        "begun.json"
    ]


def test_fingerprint_is_of_content_alone(lab: Lab) -> None:
    """Another file format with the same documents: the identity differs, the fingerprints do not."""
    import datasets

    do(prepare, lab, options(lab, "x"))
    info = do(append, lab, options(lab, "xy"))
    texts = [json.loads(line) for line in (lab.root / "y.jsonl").read_text().splitlines()]
    datasets.Dataset.from_list(texts).to_parquet(str(lab.root / "y.parquet"))
    chosen = options(lab, "xy")
    parquet = SourceOptions(domain="z", format="parquet", path=str(lab.root / "y.parquet"))
    do(prepare, lab, options(lab, "x"), "other")
    other = do(
        append, lab, chosen.model_copy(update={"sources": (chosen.sources[0], parquet)}), "other"
    )
    assert other.identity != info.identity
    assert [g.fingerprint for g in other.generations] == [g.fingerprint for g in info.generations]


@pytest.mark.parametrize(
    ("names", "changes", "match"),
    [
        ("yx", {}, r"sources\.000"),
        ("y", {}, r"sources\.000"),
        ("yxh", {}, r"sources\.000"),
        ("x", {"block_length": 8}, "block_length=8"),
        ("xyh", {"append_eos": False}, "append_eos=false"),
    ],
)
def test_anything_but_sources_at_the_end_is_refused(
    lab: Lab, names: str, changes: dict[str, Any], match: str
) -> None:
    do(prepare, lab, options(lab, "xy"))
    kept = files(lab.root / "corpus")
    with pytest.raises(StaleCache, match=match) as caught:
        do(append, lab, options(lab, names, **changes))
    assert "after the last one" in caught.value.todo
    assert files(lab.root / "corpus") == kept


def test_changed_earlier_source_is_refused(lab: Lab) -> None:
    do(prepare, lab, options(lab, "x"))
    with (lab.root / "x.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(StaleCache, match=r"sources\.000\.files"):
        do(append, lab, options(lab, "xy"))


def test_append_needs_a_complete_corpus(lab: Lab) -> None:
    with pytest.raises(IncompleteCache, match="scholiast prepare"):
        do(append, lab, options(lab, "xy"))


def test_sources_without_a_token_leave_the_corpus_as_it_was(lab: Lab) -> None:
    before = do(prepare, lab, options(lab, "x"))
    whole = (lab.root / "y.jsonl").read_text()
    (lab.root / "y.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(CorpusError, match="the added sources have no tokens"):
        do(append, lab, options(lab, "xy"))
    assert load_info(lab.root / "corpus") == before
    (lab.root / "y.jsonl").write_text(whole)
    assert len(do(append, lab, options(lab, "xy")).generations) == 2


def test_leftovers_of_another_append_are_refused_and_told(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    do(prepare, lab, options(lab, "x"))
    old = (lab.root / "corpus/corpus.json").read_bytes()
    other = do(append, lab, options(lab, "xh"))
    (lab.root / "corpus/corpus.json").write_bytes(old)  # as if killed just before the end
    with pytest.raises(StaleCache, match="delete the manifests of that fingerprint") as caught:
        do(append, lab, options(lab, "xy"))
    prefix = other.generations[1].identity[: manifest.PREFIX]
    assert f"-{prefix}.json" in str(caught.value)
    for path in (lab.root / "corpus/manifests").glob(f"*-{prefix}.json"):
        path.unlink()
    info = do(append, lab, options(lab, "xy"))
    assert len(BlockReader(lab.root / "corpus").read(ids_of(info, 1)).tokens)
