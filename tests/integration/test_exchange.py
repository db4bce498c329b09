"""Captures of other tools become caches that train, and caches become files and come back."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scholiast
import torch
from capture_files import (
    Document,
    K,
    documents,
    teacher,
    topk_lines,
    vllm_lines,
    write_distillkit,
    write_lines,
)
from conftest import Lab, build_parts, digests, make_tokenizer, tree

from pipeline.exchange.importing import Import
from pipeline.exchange.matching import pieces
from pipeline.model_card import model_card
from pipeline.planning.memory import fused_entries
from storage.blocks import BlockReader
from storage.errors import ConfigError
from storage.reader import CacheReader
from storage.types import AnyArray

Cli = Callable[..., Any]
EXACT = {
    "k": 8, "exact_k": 8, "exact_dtype": "float32", "residual_bins": [], "delta_encoding": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Lab, list[Document]]:
    """A prepared corpus, a teacher `big` that no one has, and the documents it has read."""
    root = tmp_path_factory.mktemp("made")
    build_parts(root)
    lab = Lab(root)
    lab.config["teachers"] = {"one": {"model": f"{root}/a"}, "big": {"model": "nowhere/large"}}
    lab.config["corpus"]["blocks_per_part"] = 20
    lab.config["store"] |= {"preset": "exact"}
    lab.config["loss"] = {"chunk_tokens": 16}
    lab.config["fusion"] = {"weights": "max_prob"}
    lab.workspace().prepare()
    return lab, documents(lab.root / "run/corpus")


@pytest.fixture
def take(made: tuple[Lab, list[Document]], cli: Cli, tmp_path: Path) -> Callable[..., Any]:
    """Imports a capture into a cache folder of this test's own."""

    def run(path: Path, kind: str, *more: object) -> Any:
        cache = f"cache_dir={tmp_path}/cache"
        return cli("import", made[0].write(), "--teacher", "big", "--from", path, "--format", kind,
                   "-q", "--set", cache, *more)  # fmt: skip

    return run


def expected_rows(lab: Lab, found: Sequence[Document]) -> dict[tuple[int, int], AnyArray]:
    """Returns what the formula says of each scored row: (block, row) → log p [V]."""
    corpus, rows, at = BlockReader(lab.root / "run/corpus"), {}, dict[int, int]()
    by_number = dict(enumerate(found))
    for block in range(corpus.info.blocks):
        read = corpus.read([block])
        for start, stop in pieces(read.document[0, :-1]):
            number = int(read.document[0, start])
            place = at.get(number, 0)
            at[number] = place + stop - start
            for t in range(start, stop):
                if read.scored[0, t]:
                    rows[block, t] = by_number[number].logp[place + t - start]
    return rows


def require_equal(
    lab: Lab, root: Path, found: Sequence[Document], k: int, tolerance: float
) -> None:
    """Holds every row's head, tail, and gold logprob where it is stored, to the formula."""
    corpus, cache = BlockReader(lab.root / "run/corpus"), CacheReader(root, "big")
    every = np.arange(corpus.info.blocks)
    gold, notes = corpus.read(every).gold, cache.read(every)
    rows = expected_rows(lab, found)
    assert len(rows) == corpus.read(every).scored.sum()
    for (block, t), logp in rows.items():
        ids, values = notes.head.ids[block, t], notes.head.logprobs[block, t]
        assert set(ids.tolist()) == set(np.argsort(-logp, kind="stable")[:k].tolist()), (block, t)
        assert np.abs(values - logp[ids]).max() <= tolerance
        tail = 1 - np.exp(logp[ids].astype(np.float64)).sum()
        assert abs(math.exp(notes.stats.log_tail_mass[block, t]) - tail) <= 1e-5 + k * tolerance
        if "gold_logprob" not in cache.layout.missing:
            assert abs(notes.stats.gold_logprob[block, t] - logp[gold[block, t]]) <= 1e-5


def test_vllms_dumps_become_the_teachers_rows(
    made: tuple[Lab, list[Document]], take: Any, cli: Cli, tmp_path: Path
) -> None:
    lab, found = made
    path = write_lines(tmp_path / "dump.jsonl", vllm_lines(found))
    before = tree(tmp_path), tree(lab.root / "run")
    tried = take(path, "vllm", "--dry-run", "--json")
    assert tried.exit_code == 0, tried.output
    assert (tree(tmp_path), tree(lab.root / "run")) == before  # nothing was written
    result = take(path, "vllm", "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.output)
    assert facts["found"] == json.loads(tried.output)["found"]
    assert facts["found"]["missing"] == ["entropy"]
    assert facts["found"]["candidates"] == [K, K + 1]  # the actual token is always told
    assert facts["found"]["rows"] == facts["found"]["same"] + facts["found"]["other"]
    require_equal(lab, tmp_path / "cache/big", found, K, 0.0)
    assert not [p for p in (tmp_path / "cache").iterdir() if p.name != "big"]
    checked = cli("verify", tmp_path / "cache", "--deep", "-q")
    assert checked.exit_code == 0, checked.output
    cache = CacheReader(tmp_path / "cache/big")
    assert np.isnan(cache.read(np.array([3])).stats.entropy).all()
    identity = cache.identity
    assert identity["origin"] == "imported" and identity["source"]["format"] == "vllm"
    assert "entropy" not in cache.layout.arrays()


def test_the_servers_responses_are_read_too(
    made: tuple[Lab, list[Document]], take: Any, tmp_path: Path
) -> None:
    lab, found = made
    lines = [{"id": "cmpl-1", "choices": [{"index": 0, **line}]} for line in vllm_lines(found)]
    result = take(write_lines(tmp_path / "dump.jsonl", lines), "vllm")
    assert result.exit_code == 0, result.output
    require_equal(lab, tmp_path / "cache/big", found, K, 0.0)


def test_distillkits_captures_become_the_teachers_rows(
    made: tuple[Lab, list[Document]], take: Any, tmp_path: Path
) -> None:
    lab, found = made
    shuffled = [found[i] for i in np.random.default_rng(0).permutation(len(found))]
    with_pad = [Document([*d.tokens, 0], np.concatenate([d.logp, d.logp[:1]])) for d in shuffled]
    layout = {**EXACT, "d": lab.vocab_size}
    path = write_distillkit(tmp_path / "capture", with_pad, layout)
    result = take(path, "distillkit", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["found"]["missing"] == ["entropy", "gold_logprob"]
    require_equal(lab, tmp_path / "cache/big", found, 8, 1e-5)


def test_distillkits_bins_cost_what_they_round(
    made: tuple[Lab, list[Document]], take: Any, tmp_path: Path
) -> None:
    lab, found = made
    bins = [{"scale_dtype": "float32", "element_bits": 9, "num_elements": n} for n in (3, 2)]
    layout = {**EXACT, "d": 1000, "exact_k": 3, "residual_bins": bins}
    path = write_distillkit(tmp_path / "capture", found, layout)
    (tmp_path / "capture/compression_config.yaml").rename(tmp_path / "layout.yaml")
    refused = take(path, "distillkit")
    assert refused.exit_code == 2 and "--layout" in refused.output
    result = take(path, "distillkit", "--layout", tmp_path / "layout.yaml")
    assert result.exit_code == 0, result.output
    require_equal(lab, tmp_path / "cache/big", found, 8, 0.05)
    layout["d"] = 5000  # another number of bits an id
    (tmp_path / "layout.yaml").write_text(json.dumps(layout))
    wrong = take(path, "distillkit", "--layout", tmp_path / "layout.yaml")
    assert wrong.exit_code == 1 and "bytepacked_indices is not packed as" in wrong.output


def test_json_lines_and_easydistills_probabilities(
    made: tuple[Lab, list[Document]], take: Any, tmp_path: Path
) -> None:
    lab, found = made
    result = take(write_lines(tmp_path / "a.jsonl", topk_lines(found)), "topk-jsonl")
    assert result.exit_code == 0, result.output
    require_equal(lab, tmp_path / "cache/big", found, K, 0.0)
    shutil.rmtree(tmp_path / "cache")
    easy = [
        [{str(i): math.exp(row[i]) for i in np.argsort(-row, kind="stable")[:K].tolist()}
         for row in d.logp[:-1]]
        for d in found
    ]  # fmt: skip
    tokens = write_lines(tmp_path / "tokens.jsonl", [{"input_ids": d.tokens} for d in found])
    logits = write_lines(tmp_path / "logits.jsonl", easy)
    refused = take(logits, "topk-jsonl", "--tokens", tokens)
    assert refused.exit_code == 1 and "maybe these are probabilities" in refused.output
    result = take(logits, "topk-jsonl", "--tokens", tokens, "--values", "probabilities")
    assert result.exit_code == 0, result.output
    require_equal(lab, tmp_path / "cache/big", found, K, 1e-5)


def test_text_is_tokenised_again(
    made: tuple[Lab, list[Document]], take: Any, tmp_path: Path
) -> None:
    lab, found = made
    tokenizer = lab.workspace().tokenizer()
    names = {i: t for t, i in tokenizer.get_vocab().items()}
    lines = [
        {"text": tokenizer.decode(d.tokens, skip_special_tokens=True),
         "logprobs": [{names[int(i)]: v for i, v in line.items()} for line in told["logprobs"]]}
        for d, told in zip(found, topk_lines(found), strict=True)
    ]  # fmt: skip
    result = take(write_lines(tmp_path / "a.jsonl", lines), "topk-jsonl", "--keys", "tokens")
    assert result.exit_code == 0, result.output
    require_equal(lab, tmp_path / "cache/big", found, K, 0.0)


def test_captured_blocks_serve_too_and_the_same_context_comes_first(
    made: tuple[Lab, list[Document]], take: Any, tmp_path: Path
) -> None:
    """Blocks captured whole, and the documents' pieces of one block: these are taken there."""
    lab, _ = made
    corpus = BlockReader(lab.root / "run/corpus")
    read = corpus.read(range(corpus.info.blocks))
    whole = []
    for tokens, document in zip(read.tokens.tolist(), read.document.tolist(), strict=True):
        present = [t for t, number in zip(tokens, document, strict=True) if number >= 0]
        whole.append(Document(present, teacher(present, corpus.info.vocab_size)))
    result = take(write_lines(tmp_path / "a.jsonl", topk_lines(whole)), "topk-jsonl", "--json")
    assert result.exit_code == 0, result.output
    plain = json.loads(result.output)["found"]
    assert plain["other"] > 0 and plain["same"] > 0
    shutil.rmtree(tmp_path / "cache")
    (start, stop), *_ = list(pieces(read.document[0, :-1]))[1:]
    mine = read.tokens[0, start:stop].tolist()
    piece = Document(mine, teacher(mine, corpus.info.vocab_size))
    path = write_lines(tmp_path / "a.jsonl", topk_lines([*whole, piece]))
    assert json.loads(take(path, "topk-jsonl", "--json").output)["found"]["same"] > plain["same"]
    notes = CacheReader(tmp_path / "cache/big").read(np.array([0]))
    top = np.sort(np.argsort(-piece.logp[0], kind="stable")[:K])
    assert np.sort(notes.head.ids[0, start]).tolist() == top.tolist()


# -- what is refused, with its place, and nothing written


def bad(found: Sequence[Document], change: Callable[[list[Any]], None]) -> list[Any]:
    lines = json.loads(json.dumps(vllm_lines(found)))
    change(lines)
    return list(lines)


def _nan(lines: list[Any]) -> None:
    next(iter(lines[4]["prompt_logprobs"][3].values()))["logprob"] = math.nan


def _positive(lines: list[Any]) -> None:
    next(iter(lines[4]["prompt_logprobs"][3].values()))["logprob"] = 1.5


def _beyond(lines: list[Any]) -> None:
    entry = lines[4]["prompt_logprobs"][3]
    entry["100000"] = entry.pop(next(reversed(entry)))


def _first(lines: list[Any]) -> None:
    for line in lines:
        line["prompt_logprobs"][0] = line["prompt_logprobs"][1]


def _shifted(lines: list[Any]) -> None:
    for line in lines:
        line["prompt_logprobs"] = [None, None, *line["prompt_logprobs"][1:-1]]


def _dropped(lines: list[Any]) -> None:
    lines[7]["prompt_logprobs"] = lines[7]["prompt_logprobs"][:-2]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_nan, ("a logprob is NaN", "line 5, entry 3")),
        (_positive, ("a logprob is positive", "line 5, entry 3")),
        (_beyond, ("beyond the vocabulary", "line 5, entry 3", "100000")),
        (_first, ("the first entry tells of a sequence's first token", "before -", "declared -")),
        (_shifted, ("the capture is shifted", "offset 0: -", "offset -1: -")),
        (_dropped, ("another number of entries", "line 8")),
    ],
)  # fmt: skip
def test_a_wrong_capture_is_refused_before_anything_is_written(
    made: tuple[Lab, list[Document]], take: Any, tmp_path: Path, change: Any, words: Sequence[str]
) -> None:
    path = write_lines(tmp_path / "dump.jsonl", bad(made[1], change))
    result = take(path, "vllm")
    assert result.exit_code == 1, result.output
    assert all(word in result.output for word in words), result.output
    assert not (tmp_path / "cache/big").exists()


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("entropy", -3.5, "an entropy is negative or above"),
        ("entropy", math.inf, "an entropy is negative or above"),
        ("gold_logprobs", 2.0, "an actual token's logprob is infinite or positive"),
    ],
)
def test_wrong_statistics_are_refused_before_anything_is_written(
    made: tuple[Lab, list[Document]], take: Any, tmp_path: Path, key: str, value: float, what: str
) -> None:
    found = topk_lines(made[1])
    for line in found:
        line[key] = [None] * len(line["logprobs"])
    found[4][key][3] = value
    result = take(write_lines(tmp_path / "a.jsonl", found), "topk-jsonl")
    assert result.exit_code == 1 and what in result.output, result.output
    assert "line 5, entry 3" in result.output
    assert not (tmp_path / "cache/big").exists()


def test_a_capture_that_leaves_rows_out_is_refused_with_the_first(
    made: tuple[Lab, list[Document]], take: Any, tmp_path: Path
) -> None:
    _, found = made
    cut = [Document(d.tokens[:20], d.logp[:20]) for d in found]
    lost = sum(max(0, len(d.tokens) - 20) for d in found)
    result = take(write_lines(tmp_path / "a.jsonl", vllm_lines(cut)), "vllm")
    assert result.exit_code == 1
    assert f"{lost:,} of " in result.output and "the first: block " in result.output
    result = take(write_lines(tmp_path / "a.jsonl", vllm_lines(found[1:])), "vllm")
    # Its first tokens are read by other documents too, and serve from there.
    assert "the first: block 0, row " in result.output and "document 0" in result.output
    assert not (tmp_path / "cache/big").exists()


def test_another_tokenizer_is_refused(
    made: tuple[Lab, list[Document]], take: Any, tmp_path: Path
) -> None:
    make_tokenizer(tmp_path / "other", 300, ["quite another text altogether"] * 9)
    path = write_lines(tmp_path / "a.jsonl", vllm_lines(made[1]))
    result = take(path, "vllm", "--tokenizer", tmp_path / "other")
    assert result.exit_code == 1 and "another tokenizer" in result.output
    other = [Document([(t * 7 + 1) % 250 for t in d.tokens], d.logp) for d in made[1]]
    result = take(write_lines(tmp_path / "a.jsonl", vllm_lines(other)), "vllm")
    assert result.exit_code == 1 and "the first: block 0" in result.output, result.output
    assert not (tmp_path / "cache/big").exists()


def test_k_is_what_every_entry_has(
    made: tuple[Lab, list[Document]], take: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.exchange import importing

    lab, found = made
    uneven = [*topk_lines(found[:5], 4), *topk_lines(found[5:], 9)]
    path = write_lines(tmp_path / "a.jsonl", uneven)
    refused = take(path, "topk-jsonl")
    assert refused.exit_code == 2 and "4 to 9" in refused.output and "--k 4" in refused.output
    monkeypatch.setattr(importing, "read_capture", None)  # with another --k it is not read again
    many = take(path, "topk-jsonl", "--k", "5")
    assert many.exit_code == 2 and "fewer candidates than k" in many.output
    large = take(path, "topk-jsonl", "--k", lab.vocab_size + 1)
    assert large.exit_code == 2 and "fewer candidates" in large.output
    assert take(path, "topk-jsonl", "--k", "4").exit_code == 0
    require_equal(lab, tmp_path / "cache/big", found, 4, 0.0)
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["big"]


def test_what_was_read_of_a_capture_that_cannot_serve_is_not_kept(
    made: tuple[Lab, list[Document]], take: Any, tmp_path: Path
) -> None:
    path = write_lines(tmp_path / "a.jsonl", topk_lines(made[1][1:]))
    assert take(path, "topk-jsonl").exit_code == 1  # rows without a distribution
    assert not list((tmp_path / "cache").iterdir())
    write_lines(path, [{"logprobs": [{"3": -1}]}])
    assert take(path, "topk-jsonl").exit_code == 2  # no tokens are told: read half
    assert not list((tmp_path / "cache").iterdir())


def test_another_capture_is_not_written_over(
    made: tuple[Lab, list[Document]], take: Any, tmp_path: Path
) -> None:
    _, found = made
    path = write_lines(tmp_path / "a.jsonl", vllm_lines(found))
    assert take(path, "vllm").exit_code == 0
    before = digests(tmp_path / "cache")
    again = take(path, "vllm", "--json")  # all is there
    assert again.exit_code == 0 and json.loads(again.output)["written"] == 0
    other = take(write_lines(tmp_path / "b.jsonl", vllm_lines(found, 4)), "vllm")
    assert other.exit_code == 1 and "made from something else" in other.output
    assert digests(tmp_path / "cache") == before


@pytest.mark.after("cache-teachers")
def test_an_own_cache_is_not_overwritten(lab: Lab, cli: Cli, tmp_path: Path) -> None:
    before = digests(lab.root / "run/cache")
    path = tmp_path / "a.jsonl"
    path.write_text("{}\n")
    result = cli("import", lab.write(), "--teacher", "one", "--from", path, "--format", "vllm")
    assert result.exit_code == 1 and "has a cache of its own" in result.output, result.output
    assert digests(lab.root / "run/cache") == before


def test_a_stopped_import_goes_on(
    made: tuple[Lab, list[Document]], take: Any, cli: Cli, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from pipeline.exchange import importing
    from storage.writer import CacheWriter

    path = write_lines(tmp_path / "a.jsonl", vllm_lines(made[1]))
    assert take(path, "vllm").exit_code == 0
    undisturbed = digests(tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")
    plain, count = CacheWriter.write_part, [0]

    def once(self: CacheWriter, *arguments: Any) -> Any:
        count[0] += 1
        if count[0] == 2:
            raise KeyboardInterrupt
        return plain(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(CacheWriter, "write_part", once)
        assert take(path, "vllm").exit_code == 130
    lab = made[0]
    refused = cli("cache-teachers", lab.write(), "-q", "--set", f"cache_dir={tmp_path}/cache",
                  "--teacher", "big")  # fmt: skip
    assert refused.exit_code == 1 and "scholiast import" in refused.output
    monkeypatch.setattr(importing, "read_capture", None)  # it is not read again
    result = take(path, "vllm", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["written"] == 2
    assert digests(tmp_path / "cache") == undisturbed


@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_dry_run_leaves_nothing(
    made: tuple[Lab, list[Document]], take: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    how: signal.Signals, code: int,
) -> None:  # fmt: skip
    path = write_lines(tmp_path / "a.jsonl", vllm_lines(made[1]))
    before, places = tree(tmp_path), []

    def stopped(self: Import, _: Any) -> None:
        places.append(self.scratch.root)
        os.kill(os.getpid(), how)

    monkeypatch.setattr(Import, "cover", stopped)
    assert take(path, "vllm", "--dry-run").exit_code == code
    assert [place.parent for place in places] == [tmp_path], "beside the cache folder to be"
    assert tree(tmp_path) == before
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


# -- what the cache can then be used for


def test_an_imported_teacher_trains_and_is_evaluated_beside_an_own_one(
    lab: Lab, cli: Cli, tmp_path: Path
) -> None:
    lab.config["teachers"] = {"one": {"model": f"{lab.root}/a"}, "big": {"model": "nowhere/large"}}
    lab.config["corpus"]["blocks_per_part"] = 30
    lab.config["loss"] = {"chunk_tokens": 16}
    lab.config["train"] |= {"steps": 2, "eval_every": 2}
    config = lab.write(fusion__weights="max_prob")
    work = lab.workspace(fusion__weights="max_prob")
    work.prepare()
    layout = {**EXACT, "d": lab.vocab_size, "k": 6, "exact_k": 6}  # fewer than our own store.k
    path = write_distillkit(tmp_path / "capture", documents(lab.root / "run/corpus"), layout)
    imported = cli(
        "import", config, "--teacher", "big", "--from", path, "--format", "distillkit", "-q"
    )
    assert imported.exit_code == 0, imported.output
    for command in ("cache-teachers", "train-student", "evaluate", "report", "plan", "status"):
        result = cli(command, config, "-q")
        assert result.exit_code == 0, (command, result.output)
    assert fused_entries(work) == 8 + 6, "of the imported cache what it has"
    card = (lab.root / "run/students/fused/model/README.md").read_text()
    assert "captured by another tool | – | not stated | – | 6 | 0 | balanced |" in card
    assert "| 8 | 0 | balanced |" in card and "draws of the others" not in card
    work = lab.workspace(fusion={"weights": "max_prob", "k": 5})
    info, jobs = work.finished_jobs()
    drawn = [replace(job, layout=replace(job.layout, draws=3)) for job in jobs]
    where = lab.root / "run/students/fused/model"
    assert model_card(work, "fused", work.config.loss, info, jobs, where).count("| 5 | 0 |") == 2
    more = model_card(work, "fused", work.config.loss, info, drawn, where)
    assert more.count("| 5 | 3 | balanced |") == 2 and "and draws of the others, as many" in more
    figures = json.loads((lab.root / "run/evaluation.json").read_text())
    big, one = figures["teachers"]["big"]["overall"], figures["teachers"]["one"]["overall"]
    assert big["perplexity"] is None and big["entropy"] is None and big["accuracy"] > 0.3
    assert one["perplexity"] > 1 and figures["fused"]["overall"]["perplexity"] is None
    assert "big" not in figures["teacher_models"] and "NaN" not in json.dumps(figures)
    targets = []
    for on_device in (False, True):
        reader = lab.workspace(fusion__weights="max_prob").batch_reader(on_device=on_device)
        batch = reader.ready(reader.read(np.array([0, 2])), torch.device("cpu"))
        assert batch.target is not None and batch.target.ids.shape[::2] == (2, 8)
        targets.append(batch.target)
    for name in ("ids", "logp", "p", "tail", "weights"):
        assert torch.equal(*(getattr(target, name) for target in targets)), name
    assert [set(row) for row in (targets[0].p > 0).sum(-1).tolist()] == [{6}, {8}]
    opened = scholiast.open_cache(config)
    found = opened.targets(scholiast.collate([opened.dataset()[i] for i in (0, 2)]))
    assert opened.k == found.ids.shape[-1] == 8
    for changes, word in (
        ({"fusion__weights": "entropy"}, "does not hold entropy"),
        ({"fusion__weights": "min_ce"}, "does not hold gold_logprob"),
        ({"fusion__weights": "em"}, "does not hold gold_logprob"),
        ({"fusion__weights": "uniform", "loss__temperature": 2.0}, "other temperatures"),
    ):
        with pytest.raises(ConfigError, match=word) as error:
            lab.workspace(**changes).batch_reader()
        assert "uniform" in error.value.todo or "1.0" in error.value.todo
    with pytest.raises(ConfigError, match="no capture holds hidden states"):
        lab.workspace(teachers__big__feature_layers=[2]).finished_jobs()


def test_draws_count_where_every_fused_cache_has_some(lab: Lab, cli: Cli, tmp_path: Path) -> None:
    lab.config["teachers"] = {"one": {"model": f"{lab.root}/a"}, "big": {"model": "nowhere/large"}}
    lab.config["corpus"]["blocks_per_part"] = 30
    lab.config["store"] |= {"k": 6, "draws": 4}
    lab.config["loss"] = {"chunk_tokens": 16}
    config = lab.write(fusion__weights="uniform")
    lab.workspace(fusion__weights="uniform").prepare()
    path = write_lines(tmp_path / "a.jsonl", vllm_lines(documents(lab.root / "run/corpus"), 4))
    imported = cli("import", config, "--teacher", "big", "--from", path, "--format", "vllm", "-q")
    assert imported.exit_code == 0, imported.output
    lab.workspace().cache_teachers()
    ids = np.array([0, 2])
    both = lab.workspace(fusion__weights="uniform")
    for reader in (both.batch_reader(), both.heldout_reader()):
        target = reader.read(ids).target
        assert reader.tail == "bucket" and target is not None and target.ids.shape[-1] == 6
        assert bool((target.tail > 0).all())
    alone = lab.workspace(fusion={"weights": "uniform", "teachers": ["one"]})
    assert alone.batch_reader().tail == "draws" and alone.heldout_reader().tail == "bucket"
    with pytest.raises(ConfigError, match="teacher 'big' holds no draws"):
        lab.workspace(fusion__weights="uniform", loss__target="draws").batch_reader()

    cache = scholiast.open_cache(config)
    assert cache.teachers[0] == "big"
    batch = scholiast.collate([cache.dataset()[int(i)] for i in ids])
    assert cache.targets(batch).ids.shape[-1] == 6 and bool((cache.targets(batch).tail > 0).all())
    chosen = scholiast.FusionOptions(weights="uniform", teachers=("one",))
    for temperature in (1.0, 2.0):
        options = scholiast.LossOptions(temperature=temperature)
        target = scholiast.DistillationLoss(cache, options, chosen).joined(batch).target
        assert target is not None and target.ids.shape[::2] == (1, 10)
    drawn = scholiast.LossOptions(target="draws")
    scholiast.DistillationLoss(cache, drawn, chosen)
    with pytest.raises(ConfigError, match="teacher 'big' holds no draws"):
        scholiast.DistillationLoss(cache, drawn)


def test_a_lower_bound_must_be_asked_for_and_is_marked(
    made: tuple[Lab, list[Document]], take: Any, cli: Cli, tmp_path: Path
) -> None:
    lab, found = made
    path = write_lines(tmp_path / "a.jsonl", vllm_lines(found))
    result = take(path, "vllm", "--entropy", "lower-bound", "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.output)["found"]
    assert facts["bounds"] == ["entropy"] and facts["missing"] == []
    cache = CacheReader(tmp_path / "cache/big")
    stored = cache.stats(np.arange(cache.layout.blocks)).entropy
    for (block, t), logp in expected_rows(lab, found).items():
        assert 0 < stored[block, t] <= -(np.exp(logp) * logp).sum() + 1e-4
    shown = cli("inspect", tmp_path / "cache/big", "-q")
    assert "entropy (nats), a lower bound" in shown.output, shown.output
    shutil.rmtree(tmp_path / "cache")
    assert take(path, "vllm").exit_code == 0
    shown = cli("inspect", tmp_path / "cache/big", "-q", "--block", "0")
    assert "missing" in shown.output and "lower bound" not in shown.output


# -- export


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Caches of two teachers: one with draws, temperatures and features."""
    root = tmp_path_factory.mktemp("cached")
    build_parts(root)
    lab = Lab(root)
    lab.config["corpus"]["blocks_per_part"] = 20
    lab.config["store"] |= {"draws": 3}
    lab.workspace().cache_teachers()
    return lab


def test_parquet_holds_the_notes_and_is_read_by_others(
    cached: Lab, cli: Cli, tmp_path: Path
) -> None:
    import datasets

    out = tmp_path / "out"
    result = cli("export-cache", cached.write(), out, "--format", "parquet", "-q")
    assert result.exit_code == 0, result.output
    files = sorted((out / "two").glob("*.parquet"))
    table = pa.concat_tables([pq.read_table(file) for file in files])
    corpus = BlockReader(cached.root / "run/corpus")
    cache = CacheReader(cached.root / "run/cache/two", "two")
    assert table["block"].to_pylist() == list(range(corpus.info.blocks))
    about = json.loads(pq.read_schema(files[0]).metadata[b"scholiast"])
    assert about["identity"] == json.loads(json.dumps(cache.identity)) and about["part"] == 0
    ids = np.arange(corpus.info.blocks)
    read, notes = corpus.read(ids), cache.read(ids)
    columns = ("input_ids", "tokens"), ("document", "document"), ("offset", "offset")
    for column, name in columns:
        assert table[column].to_pylist() == getattr(read, name).tolist()
    assert notes.draws is not None and notes.draws.logprobs is not None
    for n, t in np.argwhere(read.scored)[::7].tolist():
        row = {name: table[name][n].as_py() for name in table.column_names}
        order = np.argsort(-notes.head.logprobs[n, t], kind="stable")
        assert set(row["head_ids"][t]) == set(notes.head.ids[n, t].tolist())
        assert row["head_logprobs"][t] == notes.head.logprobs[n, t][order].tolist()
        for name in ("entropy", "gold_logprob"):
            assert row[name][t] == getattr(notes.stats, name)[n, t]
        assert row["tail_mass"][t] == np.exp(notes.stats.log_tail_mass[n, t])
        assert row["log_z"][t] == notes.stats.log_z[n, t].tolist()
        assert row["draw_ids"][t] == notes.draws.ids[n, t].tolist()
        assert row["draw_logprobs"][t] == notes.draws.logprobs[n, t].tolist()
        assert row["feature_2"] == notes.features.layers[2][n].tolist()
    masked = np.argwhere(~read.scored)[0].tolist()
    assert table["head_ids"][masked[0]].as_py()[masked[1]] is None
    loaded = datasets.load_dataset(
        "parquet", data_files=[str(f) for f in files], split="train", cache_dir=str(tmp_path / "hf")
    )
    assert loaded[3]["head_ids"] == table["head_ids"][3].as_py()
    assert loaded[3]["entropy"] == table["entropy"][3].as_py()


def test_a_stopped_export_goes_on_and_others_are_not_overwritten(
    cached: Lab, cli: Cli, tmp_path: Path
) -> None:
    arguments = ("export-cache", cached.root / "run", tmp_path / "out", "--teacher", "one", "-q")
    before = tree(tmp_path), tree(cached.root)
    tried = cli(*arguments, "--format", "parquet", "--dry-run")
    assert tried.exit_code == 0 and (tree(tmp_path), tree(cached.root)) == before
    assert cli(*arguments, "--format", "parquet").exit_code == 0
    whole = digests(tmp_path / "out")
    assert {Path(name).parts[0] for name in whole} == {"one"}
    (tmp_path / "out/one/part-000001.parquet").unlink()
    again = cli(*arguments, "--format", "parquet", "--json")
    assert again.exit_code == 0 and json.loads(again.output)["teachers"]["one"]["written"] == 1
    assert digests(tmp_path / "out") == whole
    other = cli(*arguments, "--format", "topk-jsonl")
    assert other.exit_code == 1 and "export of something else" in other.output
    alone = cli(
        "export-cache", cached.root / "run/cache/one", tmp_path / "b", "--format", "parquet"
    )
    assert alone.exit_code == 2 and "--corpus" in alone.output
    corpus = cached.root / "run/corpus"
    given = cli("export-cache", cached.root / "run/cache/one", tmp_path / "b", "--format", "parquet",
                "-q", "--corpus", corpus)  # fmt: skip
    assert given.exit_code == 0 and (tmp_path / "b/one/part-000000.parquet").exists()
    unknown = cli("export-cache", cached.root / "run", tmp_path / "c", "--format", "parquet",
                  "--teacher", "nobody")  # fmt: skip
    assert unknown.exit_code == 2 and "no such cache" in unknown.output


def test_export_and_import_give_the_cache_back_within_the_codecs_error(
    cached: Lab, cli: Cli, tmp_path: Path
) -> None:
    assert cli("export-cache", cached.write(), tmp_path / "out", "--format", "topk-jsonl",
               "--teacher", "two", "-q").exit_code == 0  # fmt: skip
    cached.config["teachers"]["back"] = {"model": "nowhere"}
    config = cached.write("back.yaml", loss={"chunk_tokens": 16}, cache_dir=f"{tmp_path}/cache")
    del cached.config["teachers"]["back"]
    result = cli("import", config, "--teacher", "back", "--from", tmp_path / "out/two", "--format",
                 "topk-jsonl", "-q", "--json")  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)["found"]
    assert found["missing"] == [] and found["bounds"] == [] and found["other"] == 0
    corpus = BlockReader(cached.root / "run/corpus")
    ids = np.arange(corpus.info.blocks)
    scored = corpus.read(ids).scored
    first = CacheReader(cached.root / "run/cache/two").read(ids)
    back = CacheReader(tmp_path / "cache/back").read(ids)
    # Levels are decoded and encoded again: the same ones. So are statistics but the tail's mass, which
    # the head tells: its error is that of the head's levels, 1/(2a) in the cube root (balanced: a = 420).
    a = 420
    for name in ("entropy", "gold_logprob"):
        assert (getattr(first.stats, name)[scored] == getattr(back.stats, name)[scored]).all(), name
    order, again = (np.argsort(h.ids[scored], axis=-1) for h in (first.head, back.head))
    for name in ("ids", "logprobs"):
        mine = np.take_along_axis(getattr(first.head, name)[scored], order, -1)
        theirs = np.take_along_axis(getattr(back.head, name)[scored], again, -1)
        assert (mine == theirs).all(), name
    p = np.exp(first.head.logprobs[scored].astype(np.float64))
    bound = (3 * p ** (2 / 3) / (2 * a) + 3 * p ** (1 / 3) / (2 * a) ** 2 + 1 / (2 * a) ** 3).sum(
        -1
    )
    tails = [np.exp(n.stats.log_tail_mass[scored].astype(np.float64)) for n in (first, back)]
    step = 2.0**-10  # of a statistic, relative in the mass
    assert (np.abs(tails[0] - tails[1]) <= bound + 2 * step * np.maximum(*tails) + 1e-9).all()
