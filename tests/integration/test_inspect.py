"""What `scholiast inspect` says is what lies there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Lab, build_parts, make_model, make_tokenizer

from pipeline.block_view import Vocabulary, visible
from pipeline.inspect import has_target
from storage.blocks import BlockReader
from storage.fingerprint import tree_bytes
from storage.reader import CacheReader

Cli = Callable[..., Any]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    root = tmp_path_factory.mktemp("made")
    build_parts(root)
    lab = Lab(root)
    lab.config["store"]["draws"] = 6
    lab.config["corpus"]["blocks_per_part"] = 12
    lab.workspace().cache_teachers()
    return lab


def told(cli: Cli, *arguments: object) -> dict[str, Any]:
    result = cli("inspect", *arguments, "--json", "-q")
    assert result.exit_code == 0, result.output
    facts: dict[str, Any] = json.loads(result.output)
    return facts


def test_facts_are_those_of_the_files(made: Lab, cli: Cli) -> None:
    facts = told(cli, made.write(), "--sample", 10_000)
    corpus, run = BlockReader(made.root / "run/corpus"), made.root / "run"
    assert set(facts["caches"]) == {"one", "two"} and set(facts["corpora"]) == {"corpus"}
    assert facts["corpora"]["corpus"]["fingerprint"] == corpus.info.fingerprint
    blocks = np.arange(corpus.info.blocks)
    scored = corpus.read(blocks).scored
    for name, one in facts["caches"].items():
        reader = CacheReader(run / "cache" / name)
        assert one["identity"] == json.loads(json.dumps(reader.identity))
        vouched = sum(array["bytes"] for array in one["arrays"].values())
        shards = [p for array in reader.layout.arrays()
                  for p in (run / "cache" / name).glob(f"*/{array}/c/**/*") if p.is_file()]  # fmt: skip
        assert vouched == sum(path.stat().st_size for path in shards)
        assert one["bytes"] == tree_bytes(run / "cache" / name)
        assert one["other_bytes"] + one["manifest_bytes"] == one["bytes"] - vouched
        assert one["bytes_per_token"] == pytest.approx(one["bytes"] / scored.size)
        stats, figures = reader.read(blocks).stats, one["figures"]
        assert figures["rows"] == scored.sum() and figures["blocks"] == len(blocks)
        assert figures["entropy"]["mean"] == pytest.approx(stats.entropy[scored].mean(), rel=1e-5)
        tail = np.exp(stats.log_tail_mass[scored])
        assert figures["tail_mass"]["p90"] == pytest.approx(np.percentile(tail, 90), rel=1e-5)
        assert figures["head_mass"]["mean"] == pytest.approx(1 - tail.mean(), rel=1e-5)
        gold = stats.gold_logprob[scored].mean()
        assert figures["perplexity"] == pytest.approx(np.exp(-gold), rel=1e-5)


def test_rows_are_those_of_the_block(made: Lab, cli: Cli) -> None:
    shown = told(cli, made.write(), "--block", 4, "--rows", "5:30", "--top", 3)["block"]
    corpus = BlockReader(made.root / "run/corpus")
    blocks, vocabulary = corpus.read([4]), Vocabulary.read(made.root / "a")
    assert [row["row"] for row in shown["rows"]] == list(range(5, 30))
    assert {"domain": shown["domain"], "split": shown["split"]} == {"domain": "x", "split": "train"}
    for row in shown["rows"]:
        t = row["row"]
        assert row["token"]["id"] == blocks.tokens[0, t]
        assert row["next"]["id"] == blocks.tokens[0, t + 1]
        assert row["next"]["text"] == vocabulary.text(int(blocks.tokens[0, t + 1]))
        assert row["scored"] == blocks.scored[0, t] == bool(row["teachers"])
        for name, seen in row["teachers"].items():
            notes = CacheReader(made.root / "run/cache" / name).read(np.array([4]))
            best = np.sort(notes.head.logprobs[0, t])[::-1][:3]
            found = [candidate["p"] for candidate in seen["candidates"]]
            assert found == pytest.approx(np.exp(best), rel=1e-6)
            for candidate in seen["candidates"]:
                place = np.flatnonzero(notes.head.ids[0, t] == candidate["id"])
                expected = np.exp(notes.head.logprobs[0, t][place])
                assert expected == pytest.approx(candidate["p"], rel=1e-6)
            assert sum(d["times"] for d in seen["drawn"]) == 6
            ids = [d["id"] for d in seen["drawn"] for _ in range(d["times"])]
            assert notes.draws is not None and sorted(ids) == sorted(notes.draws.ids[0, t])
            assert seen["entropy"] == pytest.approx(float(notes.stats.entropy[0, t]))
    assert {row["scored"] for row in shown["rows"]} == {True, False}


def test_bare_cache_shows_ids_and_the_same_rows(made: Lab, cli: Cli) -> None:
    """Without corpus and tokenizer: which rows have a target is told from the notes alone."""
    root = made.root / "run/cache/one"
    bare = told(cli, root, "--rows", "0:32")["block"]["rows"]
    named = told(cli, made.write(), "--rows", "0:32")["block"]["rows"]
    assert [row["scored"] for row in bare] == [row["scored"] for row in named]
    candidate = bare[0]["teachers"]["one"]["candidates"][0]
    assert candidate["text"] == f"#{candidate['id']}" and "token" not in bare[0]
    helped = told(cli, root, "--rows", "0:32", "--corpus", made.root / "run/corpus",
                  "--tokenizer", made.root / "a")["block"]["rows"]  # fmt: skip
    assert [row["token"] for row in helped] == [row["token"] for row in named]


@pytest.mark.parametrize(
    "preset",
    ["compact", *(pytest.param(name, marks=pytest.mark.long) for name in ("exact", "balanced"))],
)
def test_rows_with_a_target_are_told_from_the_notes(made: Lab, tmp_path: Path, preset: str) -> None:
    """As they are stored: rounded statistics, a head that top_p cuts or that holds everything."""
    for k, top_p in ((8, 0.5), (made.vocab_size, 1.0)):
        store = {"preset": preset, "k": k, "draws": 0, "top_p": top_p, "temperatures": []}
        cache = tmp_path / f"{k}"
        made.workspace(
            store=store, cache_dir=str(cache), corpus_dir=f"{made.root}/run/corpus",
            teachers={"one": {"model": f"{made.root}/a"}}, loss={},
        ).cache_teachers()  # fmt: skip
        corpus, reader = BlockReader(made.root / "run/corpus"), CacheReader(cache / "one")
        blocks = np.arange(corpus.info.blocks)
        assert np.array_equal(has_target(reader.read(blocks).stats), corpus.read(blocks).scored)


@pytest.mark.parametrize("preset", ["exact", "balanced", "compact"])
def test_rows_of_a_flat_teacher_have_a_target(made: Lab, tmp_path: Path, preset: str) -> None:
    """One id of a near-uniform distribution: the tail's mass is stored as 1 in many rows."""
    make_model(tmp_path / "flat", made.vocab_size, 3, initializer_range=1e-4)
    make_tokenizer(tmp_path / "flat")
    made.workspace(
        store={"preset": preset, "k": 1, "draws": 0, "temperatures": []},
        cache_dir=str(tmp_path), corpus_dir=f"{made.root}/run/corpus",
        teachers={"one": {"model": str(tmp_path / "flat")}}, loss={},
    ).cache_teachers()  # fmt: skip
    corpus, reader = BlockReader(made.root / "run/corpus"), CacheReader(tmp_path / "one")
    blocks = np.arange(corpus.info.blocks)
    stats, scored = reader.read(blocks).stats, corpus.read(blocks).scored
    if preset == "compact":  # rounded to 2^-7
        assert (stats.log_tail_mass[scored] == 0).any()
    assert np.array_equal(has_target(stats), scored)


def test_the_summary_of_stage_one_counts_every_file(made: Lab) -> None:
    work = made.workspace()
    costs = work.cache_costs(work.jobs(work.prepared()))
    for name, cost in costs.items():
        assert cost["bytes"] == tree_bytes(made.root / "run/cache" / name)


def test_tables_name_everything(made: Lab, cli: Cli) -> None:
    result = cli("inspect", made.root / "run", "-q", "--rows", "0:3")
    assert result.exit_code == 0
    layout = CacheReader(made.root / "run/cache/one").layout
    words = (
        "one",
        "two",
        "fingerprint",
        "head mass",
        "perplexity",
        "manifests",
        "block 0 (x, train)",
    )
    for word in (*layout.arrays(), *words):
        assert word in result.output
    assert "corpus" in cli("inspect", made.root / "run/corpus", "-q").output


def test_partly_done_cache_shows_what_is_done(made: Lab, cli: Cli, tmp_path: Path) -> None:
    run = Path(shutil.copytree(made.root / "run", tmp_path / "run"))
    next((run / "cache/one/manifests").glob("000000*")).unlink()
    facts = told(cli, run)
    assert facts["caches"]["one"]["parts_done"] == facts["caches"]["two"]["parts_done"] - 1
    assert facts["block"]["block"] == 12, "the first block that both have"
    result = cli("inspect", run, "--block", 0)
    assert result.exit_code == 1 and "part 0" in result.output


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["run", "--block", 9999], "no such block"),
        (["run", "--rows", "30:40"], "no such rows"),
        (["run", "--rows", "3"], "no range of rows"),
        (["run", "--tokenizer", "run"], "there is no tokenizer"),
        (["run", "--set", "name=x"], "--set goes with a configuration"),
        (["nowhere.yaml"], "nowhere.yaml"),
        (["a"], "neither a cache nor a corpus"),
    ],
)
def test_wrong_arguments(
    made: Lab, cli: Cli, monkeypatch: pytest.MonkeyPatch, arguments: list[Any], match: str
) -> None:
    monkeypatch.chdir(made.root)
    result = cli("inspect", *arguments)
    assert result.exit_code and match in result.output and "Traceback" not in result.output
    assert "to do:" in result.output


def test_caches_of_two_corpora_are_refused(made: Lab, cli: Cli, tmp_path: Path) -> None:
    other = made.write("other.yaml", run_dir=str(tmp_path / "other"), corpus__block_length=16)
    assert cli("prepare", other).exit_code == 0
    result = cli("inspect", made.root / "run/cache/one", "--corpus", tmp_path / "other/corpus")
    assert result.exit_code == 1 and "another corpus" in result.output


def test_control_characters_are_escaped() -> None:
    assert visible("a\x1b[31m\r\n\t\u202e\u2028é漢") == r"a\x1b[31m\r\n\t\u202e\u2028é漢"


def test_no_torch_is_loaded(made: Lab) -> None:
    code = (
        "import sys; from click.testing import CliRunner; from pipeline.cli import main;"
        f"done = [CliRunner().invoke(main, [c, {str(made.write())!r}]).exit_code"
        " for c in ('inspect', 'verify', 'repair')];"
        "print(done, [m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[0, 0, 0] []"
