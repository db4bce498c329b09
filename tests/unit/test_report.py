"""The report holds the numbers that were put in, and nothing of a corpus becomes markup."""

from __future__ import annotations

import hashlib
import json
import math
import xml.etree.ElementTree as ElementTree
from base64 import b64encode
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pipeline.reporting import curves, plots, report, report_tables
from pipeline.reporting.plots import Line
from pipeline.reporting.report import summary, write_report
from storage.errors import CorruptShard, IncompleteCache

TEMPLATES = Path(report.__file__).parent / "templates"
EVIL = "<script>alert(1)</script>"
COLUMNS = 3  # model, KL and accuracy stand beside the domains
HOSTILE = [
    "</script><img src=x onerror=alert(1)>",
    "\u2028<!--",
    "\ud800",
    "\u202eevil",
    "⟨E2⟩",
    EVIL,
]


def row(ce: float, **more: float) -> dict[str, float]:
    return {"rows": 1000, "ce": ce, "perplexity": math.exp(ce), **more}


def evaluation(
    teachers: Sequence[str] = ("generalist", "coder"),
    domains: Sequence[str] = ("reference", "code"),
    fused: float = 3.0,
    baseline: float | None = 3.2,
    heldout: bool = True,
) -> dict[str, Any]:
    """Returns a whole evaluation; every domain of a model has the same cross-entropy."""

    def table(ce: float, **more: float) -> dict[str, dict[str, float]]:
        return {d: row(ce, **more) for d in [*domains, "overall"]} if heldout else {}

    losses = {"before": 15.363, "fused": fused, "cross_entropy": baseline}
    students = {s: ce for s, ce in losses.items() if ce is not None}
    trained = [s for s in students if s != "before"]
    taught = table(2.5, entropy=2.125, weight=1 / len(teachers))
    return {
        "name": "demo", "created": "2026-11-23T21:00:00+00:00", "device": "cpu", "threads": 2,
        "versions": {"scholiast": "0.1.0", "torch": "2.9.1"},
        "fingerprints": {"corpus": "c0ffee" * 10, "caches": dict.fromkeys(teachers, "ab" * 32)},
        "config": {"loss": {"temperature": 1.5}, "sources": [{"path": f"a/{EVIL}"}]},
        "corpus": {
            "tokens": 41234, "blocks": 162, "block_length": 256, "vocab_size": 49152,
            "sources": [
                {"domain": d, "split": "train", "first_block": 0, "blocks": 7, "documents": 3,
                 "tokens": 1792} for d in domains
            ],
        },
        "domains": list(domains),
        "teachers": dict.fromkeys(teachers, taught) if heldout else {},
        "fused": table(2.375),
        "students": {
            s: {"parameters": 61_234_560, "domains": table(ce, kd=1.2345, accuracy=0.3141)}
            for s, ce in students.items()
        },
        "samples": [
            {"domain": domains[0], "prompt": f"{EVIL} ``` & so", "reference": "\n  indented",
             "continuations": {s: f"{s} goes on\ud800" for s in students}}
        ],
        "cache": {
            t: {"parameters": 134_515_008, "bytes": 13_456_789, "tokens": 41234,
                "bytes_per_token": 326.35, "arrays": {"head_ids": 128.25, "entropy": 4.0},
                "tokens_per_second": None, "peak_bytes": None, "device": None} for t in teachers
        },
        "training": {
            s: {"steps": 40, "tokens": 40960, "seconds": 1834.2, "tokens_per_second": 22.33,
                "peak_bytes": 2_345_678_901} for s in trained
        },
    }  # fmt: skip


def complete(measured: dict[str, Any]) -> dict[str, Any]:
    """Adds what newer evaluations measure: intervals, calibration, what was written, single tokens."""
    tables = [*measured["teachers"].values(), measured["fused"]]
    tables += [student["domains"] for student in measured["students"].values()]
    for table in tables:
        for one in table.values():
            one |= {"bits_per_byte": 0.987, "ece": 0.0543, "agreement": 0.654}
            one["intervals"] = {"perplexity": [one["perplexity"] * 0.9, one["perplexity"] * 1.1],
                                "ece": [0.0498, 0.0587]}  # fmt: skip
    scores = {"bleu": 12.34, "chrf": 23.45, "rouge_l": 0.3456, "distinct_1": 0.456,
              "distinct_2": 0.789, "intervals": {"bleu": [11.1, 13.9]}}  # fmt: skip
    written = {d: {"greedy": scores, "sampled": scores} for d in [*measured["domains"], "overall"]}
    loaded = {"parameters": 1, "generation": written, "tokens_per_s": 4321.0}
    measured["teacher_models"] = dict.fromkeys(measured["teachers"], loaded)
    measured["students"]["fused"] |= {"generation": written, "tokens_per_s": 8765.0}
    extra = {"parameters": 7_654_321, "domains": measured["students"]["fused"]["domains"]}
    measured["students"]["other"] = extra
    for sample in measured["samples"]:
        sample["continuations"] |= {name: f"{name} writes" for name in measured["teachers"]}
    measured["tokens"] = tokens(measured)
    return measured


def tokens(measured: dict[str, Any]) -> dict[str, Any]:
    """Returns a view of a few tokens with hostile texts; the second row has no target."""
    columns = {"entropy": [2.5, None, 0.5], "ce": [1.25, None, 0.125],
               "candidates": [[0, 1], None, [2]], "p": [[0.5, 0.25], None, [0.75]]}  # fmt: skip
    taught = {**columns, "weight": [0.5, None, 0.5]}
    passage = {
        "domain": measured["domains"][0], "block": 7, "text": [0, 1, 2, 3], "fused": columns,
        "teachers": dict.fromkeys(measured["teachers"], taught),
        "students": {"fused": columns, "other": columns},
    }  # fmt: skip
    return {"pieces": HOSTILE, "passages": [passage]}


def write_run(folder: Path, measured: dict[str, Any], tail: str = '{"step": 4') -> Path:
    """Puts a run on disk; its metrics end in `tail`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(measured))
    names = [*measured["domains"], "overall"] if measured["fused"] else []
    for student in measured["training"]:
        rows: list[dict[str, Any]] = [{"step": 0, "heldout": {d: row(15.0) for d in names}}]
        for step in range(1, 41):
            weights = {d: dict.fromkeys(measured["cache"], 0.5) for d in measured["domains"]}
            kd = 1.0 if student == "fused" else 0.0
            rows.append(
                {"step": step, "rows": 100, "lr": 1e-3, "total": 4.0, "ce": 5.0, "kd": kd,
                 "features": 0.0, "grad_norm": 1.0, "seconds": 1.0 * step, "peak_bytes": 1,
                 "weights": weights if student == "fused" and step % 2 else {}}
            )  # fmt: skip
        rows[-1]["heldout"] = {d: row(4.0) for d in names}
        path = folder / "students" / student / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{json.dumps(r)}\n" for r in rows) + tail)
    return folder


class Page(HTMLParser):
    """Collects tags, attributes and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.scripts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.scripts[-1] += data
        else:
            self.text += data


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The three files of a run whose names and texts are hostile, as text."""
    measured = complete(evaluation(teachers=("generalist", f"{EVIL}$x$"), domains=("a|b", EVIL)))
    measured["config"]["fusion"] = {"weights": "min_ce"}
    paths = write_report(write_run(tmp_path_factory.mktemp("run"), measured))
    assert {p.name for p in paths.values()} == {"report.html", "report.md", "report.json"}
    assert {p.name for p in paths["md"].parent.iterdir()} == {p.name for p in paths.values()}
    return {kind: path.read_text() for kind, path in paths.items()}


def test_json_holds_every_figure_unrounded(written: dict[str, str]) -> None:
    figures, measured = json.loads(written["json"]), evaluation()
    assert figures["tokens"]["pieces"] == HOSTILE
    assert figures["students"]["fused"]["domains"]["overall"]["perplexity"] == math.exp(3.0)
    assert figures["cache"]["generalist"] == measured["cache"]["generalist"]
    assert figures["comparison"]["difference_percent"] == pytest.approx((math.exp(-0.2) - 1) * 100)
    assert figures["curves"]["fused"]["losses"]["ce"]["value"] == [5.0] * 40
    assert figures["curves"]["fused"]["heldout"]["overall"]["step"] == [0, 40]
    assert "kd" not in figures["curves"]["cross_entropy"]["losses"]
    assert figures["curves"]["fused"]["weights"]["a|b"]["generalist"]["step"] == [*range(1, 40, 2)]


@pytest.mark.parametrize("kind", ["html", "md"])
@pytest.mark.parametrize(
    "shown",
    [
        "20.09", "24.53", "4.7e6", "1.234", "31.4", "10.75", "12.18", "0.50", "2.12",
        "326.35", "128.25", "13.5 MB", "2.35 GB", "22.3", "31 min", "134,515,008", "41,234",
        "18.1 per cent lower", "after 40 steps each", "torch", "23 November 2026, 21:00 UTC",
        "temperature: 1.5", "cross_entropy goes on", "generalist writes", "student other",
        "0.987", "5.4", "65.4", "12.3", "23.4", "34.6", "0.456", "0.789", "4,321", "8,765",
        "7,654,321",
    ],
)  # fmt: skip
def test_text_shows_the_numbers(written: dict[str, str], kind: str, shown: str) -> None:
    assert shown in (Page(written[kind]).text if kind == "html" else written[kind])


def test_of_one_domain_figures_are_shown_once(tmp_path: Path) -> None:
    """Overall said the same again, in every table."""
    measured = complete(evaluation(domains=("prose",)))
    paths = write_report(write_run(tmp_path, measured))
    html, markdown = Page(paths["html"].read_text()).text, paths["md"].read_text()
    assert summary(measured).headers[:2] == ["model", "perplexity\nprose"]
    assert "overall" not in "".join(summary(measured).headers)
    assert [*report_tables.by_metric(measured)] == [] and report_tables.overall(measured).rows
    for text in (html.replace("\u2011", "-"), markdown):
        assert text.count("All held-out figures") == 1 and text.count("Generation quality") == 1
        assert "accuracy, by domain" not in text and "By domain" not in text
        assert "tokens of all domains" not in text
    for shown in ("0.987", "12.3", "5.4", "4,321"):
        assert shown in html and shown in markdown
    written = markdown.partition("## Generation quality")[2].partition("\n## ")[0]
    assert written.count("| generalist |") == 2, "greedy and sampled, and not by domain as well"
    assert json.loads(paths["json"].read_text())["fused"].keys() == {"prose", "overall"}


def test_html_escapes_what_comes_from_data_and_asks_for_nothing(written: dict[str, str]) -> None:
    page = Page(written["html"])
    assert not {"link", "img", "iframe"} & set(page.tags)
    assert page.text.count(EVIL) >= 10  # tables, legends, samples, configuration, drawings
    links = [value for name, value in page.attributes if name in {"src", "href", "xlink:href"}]
    assert links and all(value and value.startswith("#") for value in links)
    assert "url(http" not in written["html"] and "@import" not in written["html"]
    assert "prefers-color-scheme: dark" in written["html"] and "#fe00" not in written["html"]
    assert ("title", "c0ffee" * 10) in page.attributes
    assert "\n\n  indented" in written["html"]  # the parser drops the first newline of a <pre>


def test_scripts_are_ours_alone_and_data_for_them_is_as_it_was(written: dict[str, str]) -> None:
    page = Page(written["html"])
    island, *code = page.scripts
    shipped = [(TEMPLATES / name).read_text() for name in ("sort.js", "tokens.js")]
    assert code == shipped
    hashes = [b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in shipped]
    allowed = f"script-src 'sha256-{hashes[0]}' 'sha256-{hashes[1]}'"
    policies = [value for name, value in page.attributes if name == "content" and value]
    assert any(policy.endswith(allowed) for policy in policies)
    data = json.loads(island)
    assert not set("<>&\u2028") & set(island)
    assert data["pieces"] == HOSTILE
    assert data["lines"]["teachers"]["generalist"] == ["generalist", "teacher-1", "solid"]
    assert data["lines"]["students"]["other"][0] == "student other"


def test_cells_sort_by_the_numbers_behind_them(written: dict[str, str]) -> None:
    values = {value for name, value in Page(written["html"]).attributes if name == "data-value"}
    expected = [math.exp(15.363), 134_515_008.0, 13_456_789.0, 1834.2, 0.3141, 0.3456]
    assert {repr(value) for value in expected} <= values
    assert not any("," in (value or ",") for value in values)


def test_intervals_stand_beside_their_values(written: dict[str, str]) -> None:
    low, high = (math.exp(3.0) * factor for factor in (0.9, 1.1))
    assert (
        f'<td data-value="{math.exp(3.0)!r}">20.09<small>{low:.2f}–{high:.2f}</small>'
        in (written["html"])
    )
    assert "<small>5.0–5.9</small>" in written["html"]
    assert "<small>11.1–13.9</small>" in written["html"]


@pytest.mark.parametrize("weights", ["confidence", "min_ce"])
def test_weights_that_look_at_the_gold_token_are_told_of(
    written: dict[str, str], weights: str
) -> None:
    measured = evaluation()
    measured["config"]["fusion"] = {"weights": weights}
    assert f"{weights}: these weights look at the gold token" in summary(measured).note
    assert "min_ce: these weights look at the gold token" in Page(written["html"]).text
    assert "min_ce: these weights look at the gold token" in written["md"]
    measured["config"]["fusion"] = {"weights": "em"}
    assert "em: one weight a teacher and domain, fitted to the gold" in summary(measured).note
    measured["config"]["fusion"] = {"weights": "entropy"}
    assert summary(measured).note == ""
    measured["config"]["loss"]["target"] = "residual"
    assert "the distillation loss uses the answer" in summary(measured).note


def test_summary_fits_a_terminal() -> None:
    from rich.cells import cell_len

    table = summary(complete(evaluation(["generalist"], ["reference", "code", "bible"])))
    lines = [header.split("\n") for header in table.headers]
    widths = [
        max(cell_len(text) for text in [*lines[i], *(row[i] for row in table.rows)])
        for i in range(len(lines))
    ]
    assert sum(widths) + 2 * (len(widths) - 1) <= 120


def test_what_is_no_evaluation_is_refused(tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text("{}")
    with pytest.raises(CorruptShard, match="not an evaluation"):
        write_report(tmp_path)
    (tmp_path / "evaluation.json").write_text("[]")
    with pytest.raises(CorruptShard, match="not a JSON object"):
        write_report(tmp_path)


def test_ids_in_the_page_are_unique(written: dict[str, str]) -> None:
    ids = [value for name, value in Page(written["html"]).attributes if name == "id"]
    assert ids and len(ids) == len(set(ids))


def test_markdown_has_markup_of_data_only_in_fences(written: dict[str, str]) -> None:
    lines, fence, outside = written["md"].splitlines(), "", list[str]()
    for line in lines:
        if not fence and line.startswith("```"):
            fence = line.removesuffix("text")
        elif line == fence:
            fence = ""
        elif not fence:
            outside.append(line)
    assert not fence and not any("<" in line for line in outside)
    assert "````text" in lines  # longer than the backticks in the prompt
    assert "a\\|b" in written["md"] and "&lt;script" in written["md"]
    head = next(line for line in outside if line.startswith("| model"))
    assert head.replace("\\|", "").count("|") == 2 + COLUMNS + 3  # two domains, overall, bytes


@pytest.mark.parametrize(("domains", "teachers"), [(1, 1), (10, 6)])
def test_summary_has_a_row_per_model_and_a_column_per_domain(domains: int, teachers: int) -> None:
    names = [f"t{i}" for i in range(teachers)]
    table = summary(evaluation(names, [f"d{i}" for i in range(domains)]))
    assert [r[0] for r in table.rows] == [
        *names, "fused ensemble", "student before",
        "student, fused teachers", "student, cross-entropy only",
    ]  # fmt: skip
    assert len(table.headers) == COLUMNS + domains + (domains > 1)  # overall
    assert {len(r) for r in table.rows} == {len(table.headers)}
    assert table.rows[0][1:] == ["12.18"] * (domains + (domains > 1)) + ["–", "–"]
    assert table.rows[-2][1:] == ["20.09"] * (domains + (domains > 1)) + ["1.234", "31.4"]


@pytest.mark.parametrize(
    ("fused", "baseline", "expected"),
    [
        (3.0, 3.2, ["beats", "20.09 against 24.53", "18.1 per cent lower", "40 steps each"]),
        (3.2, 3.0, ["does not beat", "24.53 against 20.09", "22.1 per cent higher"]),
        (3.0, 3.0, ["does not beat", "no difference"]),
        (3.0, 3.00002, ["beats", "0.002 per cent lower"]),
        (3.0, None, ["20.09, from 4.7e6 before", "no cross-entropy-only student"]),
    ],
)
def test_verdict(fused: float, baseline: float | None, expected: list[str]) -> None:
    verdict = summary(evaluation(fused=fused, baseline=baseline)).verdict
    assert all(part in verdict for part in expected), verdict


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        (
            [-0.25, -0.15],
            [
                "beats",
                "18.1 per cent lower (95\u00a0% interval over held-out blocks: 13.9 to 22.1).",
            ],
        ),
        ([-0.45, 0.05], ["is not told apart from", "blocks: 36.2 lower to 5.1 higher)."]),
        (None, ["beats", "18.1 per cent lower."]),
    ],
)
def test_verdict_by_the_paired_interval(interval: list[float] | None, expected: list[str]) -> None:
    measured = evaluation(fused=3.0, baseline=3.2)
    measured["fused_less_baseline"] = {"ce": -0.2, "interval": interval}
    verdict = summary(measured).verdict
    assert all(part in verdict for part in expected), verdict


def test_verdict_warns_where_one_teacher_is_better_than_the_ensemble() -> None:
    measured = evaluation()
    assert "alone" not in summary(measured).verdict.partition("cross-entropy alone")[2]
    name = next(iter(measured["teachers"]))
    measured["teachers"][name]["overall"]["perplexity"] = (
        0.9 * measured["fused"]["overall"]["perplexity"]
    )
    told = summary(measured).verdict
    assert f"is worse than the teacher {name} alone" in told and f"single:{name}" in told


def test_verdict_tells_of_unequal_steps() -> None:
    measured = evaluation()
    measured["training"]["cross_entropy"]["steps"] = 30
    assert "after 40 and 30 steps, which is no fair comparison" in summary(measured).verdict


def test_one_teacher_one_domain_no_baseline(tmp_path: Path) -> None:
    paths = write_report(write_run(tmp_path, evaluation(["solo"], ["text"], baseline=None)))
    page = paths["html"].read_text()
    assert "cross-entropy only" not in page and "cross-entropy only" not in paths["md"].read_text()
    assert json.loads(paths["json"].read_text())["comparison"]["difference_percent"] is None
    assert page.count("<svg") == 6  # ce, kd, total; held-out; bars; weights


def test_no_heldout_data(tmp_path: Path) -> None:
    measured = evaluation(heldout=False)
    assert summary(measured).rows == []
    paths = write_report(write_run(tmp_path, measured))
    for kind in ("html", "md"):
        text = paths[kind].read_text()
        assert "There was no held-out data" in text and "326.35" in text


def test_students_may_be_absent_without_heldout_data() -> None:
    assert "no held-out data" in summary(evaluation(heldout=False) | {"students": {}}).verdict


def test_unevaluated_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IncompleteCache, match="has not been evaluated") as caught:
        write_report(tmp_path)
    assert "scholiast evaluate" in str(caught.value)


def test_only_the_last_line_of_metrics_may_be_broken(tmp_path: Path) -> None:
    run = write_run(tmp_path, evaluation(), tail='{"step": 41\n{"step": 42}\n')
    with pytest.raises(CorruptShard, match=r"metrics\.jsonl:42"):
        write_report(run)


def test_values_that_are_no_numbers_do_not_stop_the_report(tmp_path: Path) -> None:
    measured = evaluation()
    measured["students"]["before"]["domains"]["code"]["perplexity"] = math.nan
    measured["students"]["cross_entropy"]["domains"]["code"] = row(700.0)
    paths = write_report(write_run(tmp_path, measured))
    before = json.loads(paths["json"].read_text())["students"]["before"]["domains"]
    assert before["code"]["perplexity"] is None
    assert "1.0e304" in paths["html"].read_text()


# -- curves and drawings


def test_curve_keeps_means_weighted_by_tokens() -> None:
    points = [(i + 1, float(i % 2), 3.0 if i % 2 else 1.0) for i in range(800)]
    thin = curves.curve(points)
    assert len(thin["step"]) == len(thin["smoothed"]) == 400 and thin["step"][-1] == 800
    assert thin["value"] == pytest.approx([0.75] * 400)


def test_smoothing_keeps_a_straight_line_but_for_its_end() -> None:
    line = [float(i) for i in range(100)]
    assert curves.smoothed(line, [1.0] * 100)[:95] == pytest.approx(line[:95])


def test_curve_of_nothing_is_empty() -> None:
    assert curves.curve([(1, math.nan, 1.0), (2, 1.0, 0.0)]) == {
        "step": [], "value": [], "smoothed": []
    }  # fmt: skip


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"), (math.nan, "–"), (math.inf, "∞"), (1.0, "1.00"), (12.345, "12.35"),
        (99.996, "100.0"), (123.44, "123.4"), (999.96, "1,000"), (12345.0, "12,345"),
        (99_999.6, "1.0e5"), (4.7e6, "4.7e6"), (1e304, "1.0e304"),
    ],
)  # fmt: skip
def test_perplexity_is_written_sensibly(value: float | None, shown: str) -> None:
    assert plots.perplexity(value) == shown


def test_drawings_are_well_formed_and_the_same_each_time() -> None:
    models = [(Line(f"{EVIL}$_x", "teacher-1"), {"d": 12.0}), (Line("m", "fused"), {"d": 1.0})]
    first, second = (plots.bar_panels(models, ["d", "absent"]) for _ in range(2))
    assert first == second and len(first) == 1
    text = "".join(ElementTree.fromstring(first[0].svg).itertext())
    assert f"{EVIL}$_x" in text and "12.00" in text and "var(--teacher-1)" in first[0].svg
