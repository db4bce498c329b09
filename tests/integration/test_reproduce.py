"""The evidence on tiny models: runs of every kind, shared out, resumed, and the page made of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from conftest import Lab

from pipeline.reproduce import instructions
from pipeline.reproduce.answers import questions
from pipeline.reproduce.command import save_results
from pipeline.reproduce.drawings import draw
from pipeline.reproduce.harness import Harness
from pipeline.reproduce.online import CHUNK, _DenseLoss, fuse
from pipeline.reproduce.results import MEAN_SINGLE, T975, Interval, Results, Spread, answers
from pipeline.reproduce.rows import CE, COMMON, ENCODINGS, ENSEMBLE, ENTROPY, FULL, ONLINE, UNIFORM
from pipeline.reproduce.runs import FIGURES, claimed, perform, read_runs, share, take_runs, tasks_of
from stages.head import Head, HeadRule
from stages.progress import Silent
from stages.weighting import looks_at_gold
from storage.errors import ConfigError

FEW = (CE, ENTROPY, FULL, ONLINE, ENSEMBLE)


@pytest.fixture(autouse=True)
def small(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few documents and short continuations are enough."""
    short = ("prompts=2", "samples=0", "prompt_tokens=4", "new_tokens=4", "resamples=0")
    monkeypatch.setattr(
        "pipeline.reproduce.harness.EVALUATION", tuple(f"evaluate.{text}" for text in short)
    )
    for name in ("x", "y", "held"):
        path = lab.root / f"{name}.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:5]))


def harness_of(lab: Lab, steps: int = 2) -> Harness:
    return Harness(lab.write(), [], lab.root / "evidence", steps, Silent())


def named(harness: Harness, *names: str, table: str = "approaches") -> list[Any]:
    return [row for row in harness.rows if row.table == table and row.name in names]


def command(lab: Lab, cli: Callable[..., Any], *arguments: object) -> Any:
    rows = [part for name in FEW for part in ("--row", name)]
    common = ("--steps", 2, "--seeds", 2, "--folder", lab.root / "evidence", "--debug")
    return cli("reproduce", lab.write(), *common, *rows, *arguments, catch_exceptions=False)


def test_from_nothing_to_the_page(lab: Lab, cli: Callable[..., Any]) -> None:
    evidence = lab.root / "evidence"
    assert "0 of 9 runs done" in command(lab, cli, "--dry-run").output
    for task in (0, 1):  # as two tasks of an array
        result = command(lab, cli, "--task", task, "--tasks", 2)
        assert result.exit_code == 0, result.output
    assert "9 of 9 runs done" in command(lab, cli, "--dry-run").output
    raw = json.loads((evidence / "results.json").read_text())
    assert all(set(one) == {"table", "row", "seed", "metric", "value"} for one in raw)
    found = Results(raw)
    for name in FEW[:-1]:
        assert set(found.seeds("approaches", name, "perplexity/overall")) == {0, 1}
        assert found.seeds("approaches", name, "kd/x")[0] > 0
        assert {0, 1} == set(found.seeds("approaches", name, "bleu/overall"))
    # A row of table 2 with the reference's settings is the same run.
    assert found.seeds("sensitivity", "tau 1.0", "kd/overall") == found.seeds(
        "approaches", ENTROPY, "kd/overall"
    )
    (lab.root / "page").mkdir()
    (lab.root / "page/RESULTS-findings.md").write_text("## Findings\n\nOne é.\n", encoding="utf-8")
    page = command(lab, cli, "--write-results", lab.root / "page/RESULTS.md")
    assert page.exit_code == 0
    text = (lab.root / "page/RESULTS.md").read_text()
    assert (
        "\n\n## Findings\n\nOne é.\n\n## The claims" in text and "(results-approaches.svg)" in text
    )
    assert (lab.root / "page/results-approaches.svg").read_text().startswith("<?xml")
    elsewhere = ("--take", lab.root / "page/RESULTS.json", "--folder", lab.root / "there")
    assert "9 of 9 runs done" in command(lab, cli, *elsewhere, "--dry-run").output
    assert not (lab.root / "there").exists(), "a dry run writes nothing"
    taken = command(lab, cli, *elsewhere)
    assert taken.exit_code == 0, taken.output
    there = {path.name for path in (lab.root / "there").glob("runs/*/*")}
    assert there == {FIGURES, ".lock"}, "nothing was trained again"
    assert json.loads((lab.root / "there/results.json").read_text()) == raw
    left = {path.name for path in evidence.glob("runs/*/students/*/*")}
    assert left == {"metrics.jsonl"}, "checkpoints and models are not kept"


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", '[{"run": "a", "figures": {"metrics": {"ce": "x"}}}]', '[{"run": 1}]']
)
def test_what_is_no_list_of_runs_is_refused(lab: Lab, text: str) -> None:
    path = lab.root / "runs.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="finished runs cannot be read"):
        read_runs(path)


def test_a_killed_run_goes_on_and_finished_ones_are_not_repeated(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = harness_of(lab)
    (task,) = tasks_of(harness, named(harness, ENTROPY), 1)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("pipeline.reproduce.runs.figures_of", die)
        perform(harness, task, keep=False)
    model = task.folder / "students/fused/model/model.safetensors"
    before = model.stat().st_mtime_ns
    assert not task.done
    perform(harness_of(lab), task, keep=True)
    assert task.done and model.stat().st_mtime_ns == before
    figures = (task.folder / FIGURES).read_text()
    assert json.loads(figures)["seconds"] is None, "half of a run says nothing of its time"
    perform(harness_of(lab), task, keep=False)
    assert (task.folder / FIGURES).read_text() == figures and not model.exists()


def test_a_run_belongs_to_one_process_at_a_time(lab: Lab) -> None:
    harness = harness_of(lab)
    (task,) = tasks_of(harness, named(harness, ENTROPY), 1)
    with claimed(task.folder) as mine:
        assert mine
        assert not perform(harness, task, keep=False)
    assert not (task.folder / "students").exists()


def test_shares_are_disjoint_and_whole(lab: Lab) -> None:
    harness = harness_of(lab)
    tasks = tasks_of(harness, harness.rows, 3)
    shares = [share(tasks, i, 4) for i in range(4)]
    assert sorted(t.folder for part in shares for t in part) == sorted(t.folder for t in tasks)
    assert len({t.folder for t in tasks}) == len(tasks) < 3 * len(harness.rows)


def test_what_a_run_is_called_hangs_on_what_it_is(lab: Lab) -> None:
    row = named(harness_of(lab), ENTROPY)[0]
    keys = {harness_of(lab, steps).key(row) for steps in (2, 2, 3)}
    assert len(keys) == 2
    moved = Harness(lab.write(cache_dir="elsewhere"), [], lab.root, 2, Silent())
    assert moved.key(row) in keys
    other = Harness(lab.write(train__lr=0.5), [], lab.root, 2, Silent())
    assert other.key(row) not in keys


def test_the_reference_is_pinned(lab: Lab) -> None:
    """A row means the same whatever the configuration's own fusion and loss are."""
    row = named(harness_of(lab), ENTROPY)[0]
    changed = lab.write(loss__alpha=0.3, fusion__weights="uniform")
    assert (
        Harness(changed, [], lab.root, 2, Silent()).key(row)
        == Harness(lab.write(loss__alpha=0.7), [], lab.root, 2, Silent()).key(row)
        != harness_of(lab).key(named(harness_of(lab), UNIFORM)[0])
    )
    work = Harness(changed, [], lab.root, 2, Silent()).yardstick(False)
    assert work.config.loss.alpha == 0.9 and work.config.fusion.weights == "entropy"
    assert "loss.alpha=0.9" in COMMON


@pytest.mark.long
def test_other_teachers_and_other_caches(lab: Lab) -> None:
    harness = harness_of(lab)
    caches = harness.shared / "caches"
    names = ("with a weak one", "1 + 8 draws")
    rows = [row for row in harness.rows if row.name in names]
    for row, task in zip(rows, tasks_of(harness, rows, 1), strict=True):
        assert perform(harness, task, keep=False)
        metrics = json.loads((task.folder / FIGURES).read_text())["metrics"]
        assert metrics["bytes_per_token"] > 0 and metrics["kd/overall"] > 0
        assert (caches / row.cache / "one/cache.json").exists() == bool(row.cache)
    assert (lab.root / "run/cache/weak/cache.json").exists()
    config = json.loads((harness.shared / "weak/config.json").read_text())
    assert config["num_hidden_layers"] == 2, "one of three layers is left out"


@pytest.mark.long
def test_the_instruction_task(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    functions = [(f"def f{i}(): return {i}", f"Return {i}.") for i in (1, 2, 3, 4, 5, 6, 6)]
    monkeypatch.setattr(instructions, "_functions", lambda: iter(functions))
    monkeypatch.setattr(instructions, "REQUEST", "Say what this does: ")
    monkeypatch.setitem(instructions.SIZES, "demo", instructions.Size(4, 100, 5 / 3))
    lab.config["corpus"]["block_length"] = 250
    harness = harness_of(lab)
    (row,) = named(harness, ENTROPY, table="multi-task")
    (task,) = tasks_of(harness, [row], 1)
    assert perform(harness, task, keep=False)
    metrics = json.loads((task.folder / FIGURES).read_text())["metrics"]
    assert {"kd/x", "kd/docstrings", "answer_rouge_l/docstrings"} <= set(metrics)
    chats = {
        part: (harness.shared / f"mix/text/{part}.jsonl").read_text().splitlines()
        for part in ("train", "heldout")
    }
    assert [len(set(lines)) for lines in chats.values()] == [2, 4]
    assert not set(chats["train"]) & set(chats["heldout"])
    work = harness.yardstick(True)
    asked = questions(work.batch_reader().corpus, 9)
    tokenizer = work.tokenizer()
    answers = [json.loads(line)["messages"][1]["content"] for line in chats["heldout"]]
    # The first document of a block may have begun in another, and the last may end there.
    assert len(asked) >= 2 and [tokenizer.decode(one.following) for one in asked] == [
        f"{text}<|end|>" for text in answers[1 : 1 + len(asked)]
    ]
    assert all(tokenizer.decode(one.tokens).endswith("<|assistant|>") for one in asked)
    targets = sum(len(tokenizer(f"{text}<|end|>")["input_ids"]) for text in answers)
    assert targets - 1 <= metrics["rows/docstrings"] <= targets, "only the answers are targets"


def test_instructions_come_from_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instructions, "PACKAGES", ("json",))
    tasks = dict(instructions._functions())
    assert "Deserialize ``fp``" not in "".join(tasks), "a docstring is not left in its function"
    assert all(source.startswith(("def ", "async def ", "@")) for source in tasks)
    assert all(30 <= len(docstring) <= 300 for docstring in tasks.values()) and tasks


def test_every_row_is_a_valid_configuration(lab: Lab) -> None:
    harness = harness_of(lab)
    for row in harness.rows:
        fusion = harness.workspace(row, 0).config.fusion
        assert row.gold == looks_at_gold(fusion.weights), row.name


def raw_of(
    row: str, values: list[float], metric: str = "ce/overall", table: str = "approaches"
) -> list[dict[str, Any]]:
    return [
        {"table": table, "row": row, "seed": i, "metric": metric, "value": v}
        for i, v in enumerate(values)
    ]


def test_means_and_claims() -> None:
    values = {
        FULL: [10.0, 11.0, 12.0], UNIFORM: [12.0, 12.5, 13.9], "single: one": [12.0, 10.0, 13.0],
        "single: two": [15.0, 16.0, 17.0],
    }  # fmt: skip
    found = Results(
        [one for row, each in values.items() for m in ("ce/overall", "perplexity/overall")
         for one in raw_of(row, each, m)]
    )  # fmt: skip
    assert found.best_single("approaches") == "single: one"
    assert found.seeds("approaches", MEAN_SINGLE, "ce/overall") == {0: 13.5, 1: 13.0, 2: 15.0}
    assert found.spread("approaches", FULL, "perplexity/overall") == Spread(11.0, 1.0)
    apart = found.paired("approaches", FULL, UNIFORM, "perplexity/overall")
    assert apart == pytest.approx([-2.0, -1.5, -1.9])
    by_rival = {a.claim.worse: a for a in answers(found) if a.claim.better == FULL}
    assert (by_rival[UNIFORM].favour, by_rival[UNIFORM].verdict) == (3, "yes")
    assert (by_rival["best single"].favour, by_rival["best single"].verdict) == (
        2, "not told apart",
    )  # fmt: skip
    assert by_rival[MEAN_SINGLE].verdict == "yes"


def test_intervals_are_students_t() -> None:
    """Reference: R's t.test(c(1, 2, 4))."""
    found = Interval.of([1.0, 2.0, 4.0])
    assert (found.mean, found.low, found.high) == pytest.approx(
        (2.33333, -1.461237, 6.127904), abs=1e-3
    )
    assert Interval.of([1.0]).high == float("inf")
    assert len(T975) == 21 and list(T975) == sorted(T975, reverse=True)


@pytest.mark.parametrize(
    ("better", "worse", "distinct", "verdict"),
    [
        ([1.0, 1.1], [2.0, 2.1], 0.5, "too few seeds"),
        ([2.0, 2.1, 2.2], [1.0, 1.1, 1.3], 0.5, "yes"),
        ([1.0, 1.1, 1.3], [2.0, 2.1, 2.2], 0.5, "no"),
        ([2.0, 2.1, 2.2], [1.0, 1.1, 1.3], 0.05, "babble"),
    ],
)
def test_verdicts(better: list[float], worse: list[float], distinct: float, verdict: str) -> None:
    bleu = "sampled_bleu/overall"
    raw = raw_of(ENTROPY, better, bleu) + raw_of(UNIFORM, worse, bleu)
    raw += raw_of(UNIFORM, [distinct] * 3, "sampled_distinct_1/overall")
    assert [one.verdict for one in answers(Results(raw))] == [verdict]


def test_runs_that_learned_from_something_else_are_refused(lab: Lab) -> None:
    harness = harness_of(lab)
    mine, other = tasks_of(harness, named(harness, ENTROPY, UNIFORM), 1)
    assert perform(harness, mine, keep=False)
    figures = json.loads((mine.folder / FIGURES).read_text())
    figures["learned_from"] |= {"clip": 9.0, "corpus": "abc"}
    assert take_runs(harness, {other.folder.name: figures}, 1) == 1
    with pytest.raises(ConfigError, match="corpus, clip differ"):
        save_results(harness, 1, lab.root / "page.md")
    del figures["learned_from"]  # as before runs told of it
    (other.folder / FIGURES).write_text(json.dumps(figures))
    with pytest.raises(ConfigError, match=r"caches, .*clip, precision differ"):
        save_results(harness, 1, lab.root / "page.md")
    third = tasks_of(harness, named(harness, FULL), 1)[0]
    with pytest.raises(ConfigError, match=r"caches, .*clip, precision differ"):
        perform(harness, third, keep=False)
    assert not (third.folder / "students").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--tables", "5"), "tables are 1, 2, 3, 4"),
        (("--row", "nothing"), "no row 'nothing'"),
        (("--task", "2", "--tasks", "2"), "there is no such task"),
        (("--task", "2"), "only half known"),
        (("--dry-run", "--write-results", "page.md"), "writes no page"),
    ],
)
def test_wrong_usage_is_refused(
    lab: Lab, cli: Callable[..., Any], arguments: tuple[str, ...], said: str
) -> None:
    result = cli("reproduce", lab.write(), "--folder", lab.root / "evidence", *arguments)
    assert result.exit_code == 2 and said in result.output
    assert not (lab.root / "evidence").exists()


def test_the_online_gradient_is_autograds() -> None:
    """Against the loss written out, with padded logits, α between 0 and 1, and more than a chunk."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    rows, vocab, scales, tau = CHUNK + 3, 7, (0.3, 0.7), 0.8
    hidden, weight = normal(rows, 4).requires_grad_(), normal(9, 4).requires_grad_()
    gold = torch.randint(0, vocab, (rows,), generator=generator)
    heads = [Head(normal(vocab + pad, 5), None, HeadRule(), False) for pad in (0, 2)]
    theirs = [(head, normal(rows, 5)) for head in heads]
    total, terms = _DenseLoss.apply(  # type: ignore[no-untyped-call]
        hidden, weight, Head(weight, None, HeadRule(), False), gold, theirs, vocab, scales, tau
    )
    logq = (hidden @ weight.T).log_softmax(-1)
    logps = [(h @ head.weight.T)[:, :vocab].log_softmax(-1) for head, h in theirs]
    shares = torch.stack([(p.exp() * p).sum(-1) / tau for p in logps]).softmax(0)
    each = torch.stack([(p.exp() * (p - logq[:, :vocab])).sum(-1) for p in logps])
    ce, kd = -logq.gather(-1, gold[:, None])[:, 0], (shares * each).sum(0)
    plain = (scales[0] * ce + scales[1] * kd).sum()
    torch.testing.assert_close(total, plain)
    torch.testing.assert_close(terms[:2], torch.stack([ce, kd]))
    found = torch.autograd.grad(2 * total, (hidden, weight))
    torch.testing.assert_close(found, torch.autograd.grad(2 * plain, (hidden, weight)))


def test_online_targets_know_no_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    teachers = [torch.randn(3, 7, generator=generator) for _ in range(2)]
    logq = torch.randn(3, 9, generator=generator).log_softmax(-1)
    mixture, kd = fuse(teachers, logq, 1.0)
    assert mixture.shape == (3, 9) and bool((mixture[:, 7:] == 0).all())
    torch.testing.assert_close(mixture.sum(-1), torch.ones(3))
    plain = [each.log_softmax(-1) for each in teachers]
    weights = torch.stack([(p.exp() * p).sum(-1) for p in plain]).softmax(0)
    each = torch.stack([(p.exp() * (p - logq[:, :7])).sum(-1) for p in plain])
    torch.testing.assert_close(kd, (weights * each).sum(0))


def test_the_frontier_is_drawn_beside_its_distance_to_whole_distributions(tmp_path: Path) -> None:
    raw = [
        {"table": ENCODINGS, "row": row, "seed": seed, "metric": metric, "value": value}
        for row, values in (("bucket, k = 8", (3.0, 3.4)), (CE, (4.0, 4.4)), (ONLINE, (2.9, 3.2)))
        for seed, loss in enumerate(values)
        for metric, value in (("ce/overall", loss), ("bytes_per_token", 40.0))
        if row != CE or metric == "ce/overall"
    ]
    for found, panels in ((raw, 2), ([one for one in raw if one["row"] != ONLINE], 1)):
        name = draw(Results(found), tmp_path, {})[ENCODINGS]
        drawn = "".join(ElementTree.parse(tmp_path / name).getroot().itertext())
        assert drawn.count("bytes a token and teacher") == panels
        assert ("seed by seed" in drawn) == (panels == 2) and CE in drawn
    assert not draw(Results([one for one in raw if one["row"] in (CE, ONLINE)]), tmp_path, {})
