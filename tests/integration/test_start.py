"""`scholiast init` and `scholiast doctor`, as a newcomer uses them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Lab, make_model, make_tokenizer, sentences

from pipeline.config import load_config

Cli = Callable[..., Any]


@pytest.fixture
def home(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Lab:
    """The lab's folder as the one that commands run in, with a text of the user's own."""
    monkeypatch.chdir(lab.root)
    (lab.root / "book.txt").write_text("\n\n".join(sentences(120, 6)))
    return lab


FLAGS = ["--yes", "--device", "cpu", "--teacher", "one=a", "--teacher", "two=b", "--keep-layers", "2",
         "--source", "x=x.jsonl"]  # fmt: skip


def answered(cli: Cli, monkeypatch: pytest.MonkeyPatch, lines: list[str], *arguments: str) -> Any:
    """Runs `init` at what it takes for a terminal, with these lines typed."""
    monkeypatch.setattr("pipeline.start.answers.at_terminal", lambda: True)
    return cli("init", *arguments, input="\n".join(lines) + "\n")


def refused(result: Any, *parts: str, code: int = 2) -> None:
    assert result.exit_code == code, result.output
    assert "to do:" in result.output and "Traceback" not in result.output
    for part in parts:
        assert part in result.output, (part, result.output)


def test_what_it_writes_runs_as_it_is(home: Lab, cli: Cli) -> None:
    """A file of the user's own and two checkpoints → a measured student, in six commands."""
    short = [option for one in ("store.k=8", "threads=1", "train.epochs=null", "train.steps=3",
                                "evaluate.prompts=1", "evaluate.resamples=0", "train.eval_every=3")
             for option in ("--set", one)]  # fmt: skip
    result = cli(
        "init", "mine.yaml", *FLAGS, "--source", "book.txt", "--block-length", "64", *short
    )
    assert result.exit_code == 0, result.output
    assert (
        "written: mine.yaml" in result.stdout
        and "scholiast train-student mine.yaml" in result.stdout
    )
    run = load_config(Path("mine.yaml"))
    book = run.corpus.sources[1]
    assert book.path == "book.txt" and book.passage_chars == 1000 and 0 < book.heldout < 1
    for command in ("plan", "doctor", "cache-teachers", "train-student", "evaluate"):
        done = cli(command, "mine.yaml")
        assert done.exit_code == 0, (command, done.output)
    figures = json.loads(Path("runs/mine/evaluation.json").read_text())
    assert set(figures["domains"]) == {"x", "book"} and "fused" in figures["students"]
    with Path("book.txt").open("a") as file:
        file.write("A new end.")
    changed = cli("cache-teachers", "mine.yaml")
    assert changed.exit_code == 1 and "sources.001.files" in changed.output, changed.output


def test_questions_are_asked_and_wrong_answers_again(
    home: Lab, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tokenizer(home.root / "c", texts=[text[::-1] for text in sentences(200, 9)])
    make_model(home.root / "c", 400, 3)
    lines = [
        "nowhere/at/all", "a", "c", "b", "", "", "9", "0,2", "x=x.docx", "x=x.jsonl", "",
        "", "1000", "64", "y",
    ]  # fmt: skip
    result = answered(cli, monkeypatch, lines, "mine.yaml", "--device", "cpu")
    assert result.exit_code == 0, result.output
    for told in ("no such model folder", "has another tokenizer than",
                 "so many layers cannot be kept", "format of a source cannot be told",
                 "longer than a model's context", "Write mine.yaml?"):  # fmt: skip
        assert told in result.stderr, told
    run = load_config(Path("mine.yaml"))
    assert list(run.teachers) == ["a", "b"] and run.student.keep_layers == (0, 2)
    assert run.corpus.block_length == 64 and run.run_dir == "runs/mine"


def test_a_refusal_at_the_end_writes_nothing(
    home: Lab, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [flag for flag in FLAGS if flag != "--yes"]
    result = answered(cli, monkeypatch, ["", "", "n"], "mine.yaml", *flags)
    assert result.exit_code == 1 and not Path("mine.yaml").exists() and not Path("runs").exists()


def test_a_column_is_named_by_the_domain_of_the_message(home: Lab, cli: Cli) -> None:
    """A source without a domain has its file's name, and so --field has it too."""
    Path("data").mkdir()
    rows = [{"title": f"n {i}", "body": text} for i, text in enumerate(sentences(60, 4))]
    Path("data/docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [*FLAGS[:-2], "--source", "data/docs.jsonl", "--dry-run", "-q"]
    refused(cli("init", *flags), "title (text), body (text)", "--field docs=COLUMN")
    made = cli("init", *flags, "--field", "docs=body")
    assert made.exit_code == 0, made.output
    (source,) = yaml.safe_load(made.stdout)["corpus"]["sources"]
    assert (source["domain"], source["text_field"]) == ("docs", "body")
    wrong = [*flags, "--field", "docs=body", "--source", "x=x.jsonl"]
    refused(cli("init", *wrong, "--field", "data/docs.jsonl=body"),
            "no source has this domain", "--field data/docs.jsonl=body", "one of docs, x")  # fmt: skip


def test_a_column_that_cannot_be_told_is_asked_for(
    home: Lab, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"title": f"n {i}", "body": text} for i, text in enumerate(sentences(60, 4))]
    Path("docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [flag for flag in FLAGS[:-2] if flag != "--yes"]
    lines = ["docs.jsonl", "text", "body", "", "", "", "y"]
    result = answered(cli, monkeypatch, lines, "mine.yaml", *flags)
    assert result.exit_code == 0, result.output
    for told in ("cannot be told which column", "Column with the text of docs",
                 "'text' holds neither", "60 documents in docs.jsonl, column body"):  # fmt: skip
        assert told in result.stderr, told
    (source,) = load_config(Path("mine.yaml")).corpus.sources
    assert source.text_field == "body"


@pytest.mark.parametrize("left_out", ["--teacher", "--keep-layers", "--source"])
def test_without_a_terminal_a_missing_answer_names_its_flag(
    home: Lab, cli: Cli, left_out: str
) -> None:
    flags = [
        x for f, v in zip(FLAGS[1::2], FLAGS[2::2], strict=True) if f != left_out for x in (f, v)
    ]
    refused(cli("init", *flags), "must be given", left_out)


def test_all_wrong_flags_are_told_at_once(home: Lab, cli: Cli) -> None:
    result = cli("init", "mine.yaml", "--yes", "--teacher", "one=nowhere/at/all", "--teacher", "two=b",
                 "--student", "b", "--keep-layers", "99", "--source", "x=x.docx",
                 "--heldout", "x=none.jsonl")  # fmt: skip
    refused(result, "no such model folder", "so many layers cannot be kept", "cannot be told",
            "none.jsonl", code=1)  # fmt: skip
    assert result.output.count("error: ") == 4 and not Path("mine.yaml").exists()
    result = cli("init", "mine.yaml", "--yes", "--teacher", "nowhere/at/all", "--keep-layers", "2")
    refused(result, "no such model folder", "the text must be given")
    assert result.output.count("error: ") == 2
    (home.root / "random.json").write_text((home.root / "a/config.json").read_text())
    for student in (["--keep-layers", "99"], ["--student", "random.json"]):
        result = cli("init", "mine.yaml", "--yes", "--teacher", "one=typo", "--teacher", "two=b",
                     "--source", "x=x.jsonl", *student)  # fmt: skip
        refused(result, "no such model folder", code=1)
        assert result.output.count("error: ") == 1, "of the student nothing can be said yet"
    result = cli("init", "mine.yaml", "--yes", "--teacher", "typo", "--source", "x=x.jsonl",
                 "--student", "random.json")  # fmt: skip
    refused(result, "no such model folder", code=1)


def test_a_wrong_setting_is_named_as_it_was_typed(home: Lab, cli: Cli) -> None:
    refused(cli("init", "mine.yaml", *FLAGS, "--set", "train.lrr=3"), "--set train.lrr=3")


def test_nothing_is_overwritten(home: Lab, cli: Cli) -> None:
    Path("mine.yaml").write_text("mine")
    refused(cli("init", "mine.yaml", *FLAGS), "there already", "--force")
    assert Path("mine.yaml").read_text() == "mine"
    assert cli("init", "mine.yaml", *FLAGS, "--force").exit_code == 0
    assert load_config(Path("mine.yaml")).name == "mine"


def test_dry_run_prints_and_json_tells(home: Lab, cli: Cli) -> None:
    result = cli("init", *FLAGS, "--source", "book.txt", "--dry-run", "--quiet")
    assert result.exit_code == 0 and result.stderr == "", result.output
    printed = yaml.safe_load(result.stdout)
    told = cli("init", *FLAGS, "--source", "book.txt", "--dry-run", "--json")
    facts = json.loads(told.stdout)
    assert facts["config"] == printed and facts["written"] is False
    assert facts["file"] == "scholiast.yaml" and not Path("runs").exists()
    assert "head of 361 rows" in facts["models"]["teachers.two"]
    assert not Path("scholiast.yaml").exists() and not Path("runs").exists()


def test_a_family_lends_its_models_and_settings(
    home: Lab, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(cli("init", "--family", "gpt", "--yes"), "no ready configuration", "smollm2")
    Path("configs").mkdir()
    ready = home.write("configs/mine.yaml")
    monkeypatch.setattr("pipeline.start.families.FOLDER", ready.parent)
    result = cli("init", "--family", "mine", "--yes", "--source", "x=x.jsonl", "--dry-run", "-q",
                 "--device", "cpu")  # fmt: skip
    assert result.exit_code == 0, result.output
    made = yaml.safe_load(result.stdout)
    assert list(made["teachers"]) == ["one", "two"] and made["student"]["keep_layers"] == [0, 2]
    assert made["store"]["k"] == 8 and made["loss"]["features"]["weight"] == 0.1
    assert made["train"]["lr"] == 3e-3 and "the ready configuration mine" in result.stdout


def test_a_student_of_random_weights_and_one_of_its_own(home: Lab, cli: Cli) -> None:
    flags = [x for f, v in zip(FLAGS[1::2], FLAGS[2::2], strict=True) if f != "--keep-layers"
             for x in (f, v)] + ["--yes", "--dry-run", "-q"]  # fmt: skip
    random = yaml.safe_load(cli("init", *flags, "--student", "a/config.json").stdout)
    assert random["student"] == {"config": "a/config.json"} and random["train"]["lr"] == 1e-3
    whole = yaml.safe_load(cli("init", *flags, "--student", "b").stdout)
    assert whole["student"] == {"model": "b"} and whole["train"]["lr"] == 5e-4
    refused(
        cli("init", *flags, "--student", "a/config.json", "--keep-layers", "1"), "random weights"
    )
    refused(cli("init", *flags, "--student", "a", "--keep-layers", "0,7"), "no layers to keep")


def test_what_cannot_be_held_out_is_refused(home: Lab, cli: Cli) -> None:
    Path("one.jsonl").write_text(json.dumps({"text": "just this"}) + "\n")
    flags = FLAGS[:-2]
    refused(cli("init", *flags, "--source", "o=one.jsonl"), "can be held out", "--heldout o=PATH")
    result = cli(
        "init", *flags, "--source", "o=one.jsonl", "--heldout", "o=held.jsonl", "--dry-run", "-q"
    )
    sources = yaml.safe_load(result.stdout)["corpus"]["sources"]
    assert [one.get("split", "train") for one in sources] == ["train", "heldout"]
    assert not any("heldout" in one for one in sources)


def test_models_that_cannot_be_used_are_refused(home: Lab, cli: Cli) -> None:
    make_tokenizer(home.root / "c", texts=[text[::-1] for text in sentences(200, 9)])
    make_model(home.root / "c", 400, 3)
    refused(cli("init", *FLAGS, "--teacher", "c"), "another tokenizer", "token id", code=1)
    make_model(home.root / "b", home.vocab_size - 1, 3)
    refused(cli("init", *FLAGS), "fewer logits than the tokenizer has ids", code=1)
    config = json.loads((home.root / "a/config.json").read_text())
    (home.root / "a/config.json").write_text(json.dumps({**config, "model_type": "t5"}))
    refused(cli("init", *FLAGS), "no causal language model", "t5", code=1)


def test_it_can_be_for_another_machine(home: Lab, cli: Cli) -> None:
    flags = [*FLAGS, "--dry-run"]
    flags[flags.index("cpu")] = "cuda"
    refused(cli("init", *flags), "no GPU is visible")
    large = cli("init", *flags, "--device-memory", "80")
    assert large.exit_code == 0 and "Will not fit" not in large.stderr, large.output
    made = yaml.safe_load(large.stdout)
    assert made["device"] == "cuda" and made["train"]["precision"] == "bf16"
    small = cli("init", *flags, "--device-memory", "0.0001")
    assert (
        "Will not fit: teacher two takes" in small.stderr and "training the student" in small.stderr
    )


def test_a_data_set_by_name_is_read_as_a_stream(home: Lab, cli: Cli) -> None:
    Path("set").mkdir()
    Path("x.jsonl").rename("set/train.jsonl")
    flags = [*FLAGS[:-2], "--dry-run", "-q"]
    made = cli("init", *flags, "--source", f"d=hub:{home.root}/set@main")
    assert made.exit_code == 0, made.output
    (source,) = yaml.safe_load(made.stdout)["corpus"]["sources"]
    assert (source["format"], source["revision"], source["path"]) == (
        "hub",
        "main",
        f"{home.root}/set",
    )
    assert source["heldout"] > 0
    refused(cli("init", *flags, "--source", "d=hub:org/none"), "revision cannot be had", code=1)


def states(result: Any) -> dict[str, str]:
    return {one["name"]: one["state"] for one in json.loads(result.stdout)["checks"]}


def test_doctor_tells_what_is_wrong_with_a_run(home: Lab, cli: Cli) -> None:
    good = cli("doctor", home.write(), "--json")
    assert good.exit_code == 0 and set(states(good).values()) <= {"ok", "warn"}, good.output
    assert not (home.root / "run").exists() and not list(home.root.glob(".scholiast-doctor-*"))
    make_tokenizer(home.root / "b", texts=[text[::-1] for text in sentences(200, 9)])
    chats = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    Path("y.jsonl").write_text(json.dumps({"text": chats}) + "\n")
    config = home.write(
        corpus__block_length=512, teachers__one__feature_layers=[9], student__keep_layers=[7],
        train__loggers=["trackio"], corpus__sources=[
            {"domain": "x", "format": "jsonl", "path": "none.jsonl"},
            {"domain": "y", "format": "jsonl", "path": "y.jsonl"},
            {"domain": "z", "format": "jsonl", "path": "x.jsonl", "heldout": 1e-9},
        ], loss__features__weight=0.0,
    )  # fmt: skip
    result = cli("doctor", config)
    assert result.exit_code == 1, result.output
    for told in ("longer than its context, 256", "no layers [9]: they go from 1 to 3",
                 "no layers [7]: they go from 0 to 2", "teachers.two has another tokenizer",
                 "the source has no files", "the column holds chats", "leaves nothing held out",
                 "trackio"):  # fmt: skip
        assert told in result.output, told
    short = cli("doctor", config, "--quiet")
    assert "  ok " not in short.output and "  bad " in short.output
    assert "\x1b" not in result.output, "plain without a terminal"


def test_doctor_loads_models_when_asked(home: Lab, cli: Cli) -> None:
    result = cli("doctor", home.write(), "--load", "--json")
    found = states(result)
    assert found["teachers.two, loaded"] == found["student, loaded"] == "ok", result.output
    (home.root / "b/model.safetensors").write_bytes(b"")
    broken = cli("doctor", home.write(teachers__one__model="b"), "--json")
    assert broken.exit_code == 1 and states(broken)["teachers.one"] == "bad", broken.output
    assert "no safetensors file" in broken.output


def test_doctor_without_a_run_and_before_the_demonstration(home: Lab, cli: Cli) -> None:
    result = cli("doctor", "--json")
    assert result.exit_code == 0 and "this folder: locks" in states(result)
    config = home.write(assets="demo", teachers={"one": {"model": "runs/none"}},
                        loss__features__weight=0.0)  # fmt: skip
    assert states(cli("doctor", config, "--json"))["assets"] == "warn"
    for key in ("device=cuda", "cache_dir=gopher://nowhere/x"):
        assert cli("doctor", home.write(), "--set", key).exit_code == 1, key


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_a_source_without_text_is_refused(home: Lab, cli: Cli, text: str) -> None:
    (home.root / "empty.txt").write_text(text)
    result = cli("init", home.root / "e.yaml", "--yes", "--teacher", f"a={home.root}/a",
                 "--keep-layers", 2, "--source", f"e={home.root}/empty.txt")  # fmt: skip
    assert result.exit_code == 2 and "the source holds no text" in result.output, result.output
    assert not (home.root / "e.yaml").exists()
