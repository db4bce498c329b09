"""What every command promises: dry runs change nothing, JSON parses, no terminal means plain text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import huggingface_hub.constants
import pytest
from capture_files import documents, topk_lines, write_lines
from conftest import Lab, tree
from hub_server import TOKEN, Hub, served

from pipeline.cli import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs a command as a process without a terminal sees it: (exit code, output, errors)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(one) for one in arguments], "scholiast")
        shown = capfd.readouterr()
        return int(ended.value.code or 0), shown.out, shown.err

    return call


READERS: list[list[object]] = [
    ["plan"], ["status"], ["append"], ["inspect"], ["verify"], ["repair"], ["launch", "slurm"],
    ["launch", "local", "--workers", 1], ["generate", "-p", "the", "--new-tokens", 2],
    ["launch", "kubernetes", "--dry-run", "--set", "cluster.defaults.image=i"],
]  # fmt: skip
"""Commands with --json that a finished run leaves nothing to do for."""


def test_each_command_dry_then_for_good_then_done(
    lab: Lab, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, plain = lab.write(), []
    (lab.root / "a" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    store, out = f"file://{tmp_path}/store", lab.root / "models"

    def step(words: list[object], writes: str, key: str) -> dict[str, Any]:
        """Runs a command dry, dry as JSON, for good, and looks at what each did and said."""
        before = tree(tmp_path)
        code, shown, errors = run(*words, "--dry-run")
        assert code == 0 and "would: " in shown and writes in shown, shown + errors
        plain.extend([shown, errors])
        code, shown, errors = run(*words, "--dry-run", "--json")
        told = json.loads(shown)
        assert code == 0 and told["dry_run"] and any(not one["done"] for one in told["actions"])
        assert tree(tmp_path) == before
        code, shown, errors = run(*words, "--json")
        assert code == 0, errors
        plain.append(errors)
        assert tree(tmp_path) != before
        result: dict[str, Any] = json.loads(shown)
        assert key in result
        return result

    step(["launch", "slurm", config, "--set", "cluster.tasks=2"], "cache-one.sbatch", "steps")
    step(["prepare", config], f"{lab.root}/run/corpus", "fingerprint")
    assert (
        "would: keep the tasks' output"
        in run("launch", "local", config, "--workers", 2, "--dry-run")[1]
    )
    cached = step(["cache-teachers", config], f"{lab.root}/run/cache/two", "teachers")
    assert set(cached["teachers"]) == {"one", "two"}
    step(["push", config, store], f"{store}/cache/one", "bytes_sent")
    step(["train-student", config], f"{lab.root}/run/students/fused/model", "students")
    card = lab.root / "run/students/fused/model/README.md"
    assert "has not measured this student" in card.read_text()
    exported = step(["export", config, out / "early", "--step", 4], f"{out}/early", "gguf")
    assert exported["step"] == 4 and "convert_hf_to_gguf.py" in exported["gguf"]
    step(["evaluate", config], "evaluation.json", "students")
    step(["export", config, out / "last"], f"{out}/last", "gguf")
    step(["report", config], "report.html", "files")

    for words in (["prepare"], ["cache-teachers"], ["append"], ["train-student"]):
        code, shown, _ = run(*words, config, "--dry-run")
        assert code == 0 and "done already: " in shown and "would" not in shown
    for words in READERS:
        code, shown, errors = run(*words, config, "--json")
        assert code == 0, errors
        json.loads(shown)
        plain.append(errors)
        plain.extend(run(*words, config)[1:])
    for shown in plain:
        assert "\x1b" not in shown and "\r" not in shown
    the_cards(lab)
    with served() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        to_the_hub(lab, config, run, hub)


def with_dry_run(group: click.Group, prefix: str = "") -> Iterator[str]:
    for name, one in group.commands.items():
        if isinstance(one, click.Group):
            yield from with_dry_run(one, f"{prefix}{name} ")
        elif any("--dry-run" in option.opts for option in one.params):
            yield prefix + name


def dry_runs(lab: Lab, config: Path) -> dict[str, list[object]]:
    """Every command that takes --dry-run, as it is called in a run whose students are trained."""
    cache, out = lab.root / "run/cache/one", lab.root / "out"
    capture = lab.root / "capture.jsonl"
    return {
        "init": [lab.root / "new.yaml", "--yes", "--teacher", f"a={lab.root}/a", "--keep-layers", 1,
                 "--source", f"x={lab.root}/x.jsonl"],
        "prepare": [config], "cache-teachers": [config], "append": [config],
        "train-student": [config], "evaluate": [config], "report": [config],
        "export": [config, out], "push": [config, f"file://{out}"],
        "launch slurm": [config], "launch local": [config, "--workers", 2],
        "launch kubernetes": [config, "--set", "cluster.defaults.image=i"],
        "reproduce": [config, "--folder", out],
        "import": [config, "--set", "teachers.big.model=nowhere", "--teacher", "big", "--from", capture,
                   "--format", "topk-jsonl", "--set", f"cache_dir={out}", "--set", "loss.features={}"],
        "export-cache": [cache, out, "--format", "parquet", "--corpus", lab.root / "run/corpus"],
        "repair": [config, "--clean", "--deep"],
    }  # fmt: skip


@pytest.mark.after("train-student")
def test_no_dry_run_writes(lab: Lab, run: Run) -> None:
    """Not even remembered hashes: the training's are deleted, so that every command hashes anew."""
    config = lab.write()
    write_lines(lab.root / "capture.jsonl", topk_lines(documents(lab.root / "run/corpus")))
    assert run("evaluate", config, "-q")[0] == 0
    (lab.root / "run/hashes.json").unlink()
    (lab.root / "run/cache/one/.part.tmp").write_text("left behind")
    calls = dry_runs(lab, config)
    assert set(calls) == set(with_dry_run(main))
    before = tree(lab.root)
    for name, words in calls.items():
        code, shown, errors = run(*name.split(), *words, "--dry-run")
        assert code == 0, (name, shown, errors)
        assert tree(lab.root) == before, name


def the_cards(lab: Lab) -> None:
    """Cards as the hub's own client reads them."""
    from huggingface_hub import ModelCard

    measured = json.loads((lab.root / "run/evaluation.json").read_text())["students"]["fused"][
        "domains"
    ]
    own = lab.root / "run/students/fused/model/README.md"
    assert own.read_text() == (lab.root / "models/last/README.md").read_text()
    card = ModelCard.load(own)
    assert card.data.library_name == "transformers" and "license" not in card.data.to_dict()
    figures = {
        (one.dataset_name, one.metric_type): one.metric_value for one in card.data.eval_results
    }
    assert figures["held-out blocks, x", "perplexity"] == pytest.approx(
        measured["x"]["perplexity"], abs=1e-6
    )
    assert "different licences: apache-2.0; not stated." in card.text
    assert str(lab.root) not in card.text
    early = (lab.root / "models/early/README.md").read_text()
    assert "has not measured this student as it was after 4 steps" in early


def to_the_hub(lab: Lab, config: Path, run: Run, hub: Hub) -> None:
    """What the hub needs is asked for before anything is written; then all files arrive."""
    folder = lab.root / "out"
    words = ["export", config, folder, "--push-to-hub", "me/mine", "--private"]
    before = tree(lab.root)
    code, shown, _ = run(*words, "--dry-run")
    assert code == 0 and f"writes {hub.endpoint}/me/mine" in shown and hub.repositories == {}
    hub.repositories["me/mine"] = {}
    code, _, errors = run(*words)
    assert code == 2 and "has a repository of this name already" in errors
    assert tree(lab.root) == before
    hub.repositories.clear()
    code, shown, errors = run(*words)
    assert code == 0 and f"uploaded: {hub.endpoint}/me/mine" in shown
    assert shown.splitlines()[-1].startswith("GGUF") and "\r" not in errors
    sent = hub.repositories["me/mine"]
    assert sent == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {"README.md", "model.safetensors", "scholiast.json", "tokenizer.json"} <= set(sent)
    assert run("export", config, folder / "x", "--private")[0] == 2
