"""Several runs side by side: each model once, what differs, and clear refusals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_report import EVIL, Page, complete, evaluation, write_run

import pipeline
from pipeline.reporting.compare import compare, read_runs, rows_of
from pipeline.reporting.compare_page import write_comparison
from storage.errors import ConfigError

Cli = Callable[..., Any]


def measured(name: str, corpus: str = "c0ffee", **more: Any) -> dict[str, Any]:
    found = evaluation(**more)
    found["name"], found["fingerprints"]["corpus"] = name, corpus
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three runs: two over one corpus, whose fusion and coder differ, and one over another."""
    root = tmp_path_factory.mktemp("runs")
    first, second, third = (measured("first"), complete(measured("second", fused=2.9)),
                            measured(EVIL, "decaf", baseline=None))  # fmt: skip
    second["fingerprints"]["caches"]["coder"] = "cd" * 32
    second["config"] |= {"fusion": {"weights": "min_ce", "tau": 2.0}, "run_dir": "elsewhere"}
    second["fused"]["overall"]["ce"] = 2.25
    second["versions"]["torch"] = "2.11.0"
    return [
        write_run(root / name, one) for name, one in zip("abc", (first, second, third), strict=True)
    ]


def test_of_one_domain_there_is_no_overall(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / name, complete(measured(name, domains=("prose",)))) for name in "ab"
    ]
    (group,) = compare(read_runs(folders)).groups
    assert group.table.headers[2] == "perplexity\nprose" and not group.several
    assert "overall" not in "".join(group.table.headers)
    other = write_run(tmp_path / "c", measured("c", domains=("code",)))
    (group,) = compare(read_runs([folders[0], other])).groups
    assert group.table.headers[2:5] == [f"perplexity\n{d}" for d in ("prose", "code", "overall")]


def test_each_model_of_a_corpus_stands_once(runs: list[Path]) -> None:
    rows = rows_of(read_runs(runs[:2]))
    found = [(row.kind, row.line.label, row.runs) for row in rows]
    assert found == [
        ("teacher", "generalist", ["first", "second"]),
        ("teacher", "coder", ["first"]),
        ("teacher", "coder", ["second"]),
        ("ensemble", "fused ensemble", ["first"]),
        ("ensemble", "fused ensemble", ["second"]),
        ("untrained", "student before", ["first", "second"]),
        ("student", "student, fused teachers", ["first"]),
        ("student", "student, cross-entropy only", ["first"]),
        ("student", "student, fused teachers", ["second"]),
        ("student", "student, cross-entropy only", ["second"]),
        ("student", "student other", ["second"]),
    ]


def test_untrained_students_of_different_targets_are_told_apart(runs: list[Path]) -> None:
    first, second = read_runs(runs[:2])
    second.evaluation["students"]["before"]["domains"]["overall"]["kd"] = 9.0
    labels = [row.runs for row in rows_of([first, second]) if row.kind == "untrained"]
    assert labels == [["first"], ["second"]]


def test_only_what_differs_is_listed(runs: list[Path]) -> None:
    table = compare(read_runs(runs[:2])).differences
    assert table.headers == ["key", "first", "second"]
    assert table.rows == [
        ["fusion.weights", "–", "min_ce"],
        ["fusion.tau", "–", "2.0"],
        ["versions.torch", "2.9.1", "2.11.0"],
    ]


def test_the_best_student_is_named(runs: list[Path]) -> None:
    comparison = compare(read_runs(runs[:2]))
    assert comparison.verdict.startswith(
        "second · fused has the lowest overall held-out perplexity of 5 trained students, 18.17"
    )
    assert comparison.notes[0].startswith("second: The teachers are weighted by min_ce")
    assert "same number of steps" not in comparison.verdict


def test_corpora_are_never_in_one_table(runs: list[Path]) -> None:
    comparison = compare(read_runs(runs))
    assert [(group.corpus, group.runs) for group in comparison.groups] == [
        ("c0ffee", ["first", "second"]),
        ("decaf", [EVIL]),
    ]
    assert "cannot be compared" in comparison.verdict
    assert {row[0] for row in comparison.groups[1].table.rows} == {EVIL}


def test_the_page_shows_all_and_escapes_it(runs: list[Path], tmp_path: Path) -> None:
    paths, _ = write_comparison(runs, tmp_path)
    page = Page(paths["html"].read_text())
    assert page.tags.count("script") == 1 == len(page.scripts)  # sorting
    for shown in (EVIL, "not comparable", "18.17", "fusion.weights", "first · fused", "12.3"):
        assert shown in page.text
    text = paths["md"].read_text()
    assert EVIL not in text and "not comparable" in text and "18.17" in text
    figures = json.loads(paths["json"].read_text())
    assert [run["label"] for run in figures["runs"]] == ["first", "second", EVIL]
    assert figures["runs"][1]["evaluation"]["students"]["fused"]["domains"]["overall"][
        "perplexity"
    ] == math.exp(2.9)
    assert figures["comparison"]["groups"][0]["costs"]["rows"][0][0] == "all"


def test_runs_of_one_name_are_told_by_their_folders(runs: list[Path], tmp_path: Path) -> None:
    twin = write_run(tmp_path / "twin", measured("first"))
    assert [run.label for run in read_runs([runs[0], twin])] == ["a", "twin"]


# -- the command


def test_runs_are_named_by_folder_or_configuration(
    runs: list[Path], tmp_path: Path, cli: Cli
) -> None:
    demo = yaml.safe_load((Path(pipeline.__file__).parent / "configs/demo.yaml").read_text())
    config = tmp_path / "second.yaml"
    config.write_text(yaml.safe_dump(demo | {"run_dir": str(runs[1])}))
    result = cli("report", str(runs[0]), config, "--out", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    assert "second · fused has the lowest" in result.output
    assert (tmp_path / "out" / "comparison.html").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["a", "a"], ["the same run is named twice"]),
        (["a", "empty"], ["not a run's"]),
        (["a", "unmeasured"], ["has not been evaluated", "scholiast evaluate"]),
        (["a", "missing"], ["cannot be read"]),
        (["a", "--set", "train.lr=1"], ["--set goes with a configuration"]),
    ],
)
def test_wrong_runs_are_refused(
    runs: list[Path], cli: Cli, arguments: list[str], told: list[str]
) -> None:
    root = runs[0].parent
    (root / "empty").mkdir(exist_ok=True)
    (root / "unmeasured/students").mkdir(parents=True, exist_ok=True)
    paths = [str(root / a) if a.isalpha() else a for a in arguments]
    result = cli("report", *paths)
    assert result.exit_code != 0
    assert all(text in result.output for text in told), result.output
    assert "Traceback" not in result.output


def test_one_run_twice_by_another_path_is_refused(runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(runs[0])
    with pytest.raises(ConfigError, match="named twice"):
        read_runs([runs[0], tmp_path / "link"])


def test_a_teacher_measured_against_another_ensemble_stands_apart(tmp_path: Path) -> None:
    folders = []
    for name, agreement in (("a", 0.5), ("b", 0.8)):
        one = complete(measured(name))
        one["teachers"]["generalist"]["overall"]["agreement"] = agreement
        folders.append(write_run(tmp_path / name, one))
    apart = [row.runs for row in rows_of(read_runs(folders)) if row.line.label == "generalist"]
    assert apart == [["a"], ["b"]]
