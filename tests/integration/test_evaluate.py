"""`scholiast evaluate` as a whole, further students, and lm-eval on an exported one."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Lab, make_model, make_tokenizer

Cli = Callable[..., Any]
TEXT_KEYS = {"bleu", "chrf", "rouge_l", "distinct_1", "distinct_2", "intervals"}
LOSS_KEYS = {"rows", "ce", "perplexity", "bits_per_byte", "accuracy", "ece", "intervals"}
INTERVALS = {"perplexity", "bits_per_byte", "accuracy", "ece"}


@pytest.fixture(scope="module")
def trained(cached_parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    lab = Lab(Path(shutil.copytree(cached_parts, tmp_path_factory.mktemp("evaluate") / "lab")))
    lab.config["train"]["steps"] = 2
    lab.config["evaluate"] |= {"prompts": 3, "resamples": 20}
    work = lab.workspace()
    work.train_students()
    return lab


def test_every_model_is_measured_alike(trained: Lab, cli: Cli) -> None:
    folder = trained.root / "run/students/fused/model"
    result = cli("evaluate", trained.write(), "--model", f"copy={folder}")
    assert result.exit_code == 0, result.output
    assert "\nstudent copy " in result.output and "distinct-1" in result.output
    found = json.loads((trained.root / "run/evaluation.json").read_text())
    assert list(found["students"]) == ["before", "fused", "copy"]
    for student in found["students"].values():
        assert set(student["domains"]) == {"x", "overall"} == set(student["generation"])
        whole = student["domains"]["overall"]
        assert set(whole) == LOSS_KEYS | {"kd", "agreement"}
        assert set(whole["intervals"]) == INTERVALS | {"kd", "agreement"}
        assert student["tokens_per_s"] > 0
        for low, high in whole["intervals"].values():
            assert low <= high
    for name in ("domains", "generation", "parameters"):
        assert found["students"]["copy"][name] == found["students"]["fused"][name]
    assert set(found["fused"]["overall"]) == LOSS_KEYS
    assert set(found["teachers"]) == set(found["teacher_models"]) == {"one", "two"}
    for name in ("one", "two"):
        whole = found["teachers"][name]["overall"]
        assert set(whole) == LOSS_KEYS | {"agreement", "entropy", "weight"}
        assert set(whole["intervals"]) == INTERVALS | {"agreement"}
    models = [*found["teacher_models"].values(), *found["students"].values()]
    for model in models:
        greedy, sampled = (model["generation"]["overall"][k] for k in ("greedy", "sampled"))
        assert set(greedy) == set(sampled) == TEXT_KEYS and greedy != sampled
        assert set(greedy["intervals"]) == {"bleu", "chrf", "rouge_l"}
    [sample] = found["samples"]
    assert set(sample["continuations"]) == {"one", "two", "before", "fused", "copy"}
    assert sample["continuations"]["copy"] == sample["continuations"]["fused"]


def test_what_is_switched_off_is_left_out(trained: Lab) -> None:
    work = trained.workspace(evaluate__resamples=0, evaluate__prompts=0, evaluate__samples=0)
    found = work.evaluate()
    assert found["students"]["fused"]["domains"]["overall"]["intervals"] == {}
    assert found["students"]["fused"]["generation"] == {} and found["samples"] == []
    assert found["teacher_models"] == {}, "a teacher is loaded for its text alone"
    assert found["fused"]["overall"]["perplexity"] > 1


@pytest.mark.long
def test_a_training_without_evaluations_gives_the_same_student(trained: Lab, cli: Cli) -> None:
    folder = trained.root / "without"
    work = trained.workspace(
        run_dir=str(folder), corpus_dir=f"{trained.root}/run/corpus",
        cache_dir=f"{trained.root}/run/cache", train__eval_every=None, train__log_every=9,
    )  # fmt: skip
    work.train_students()
    model = "students/fused/model/model.safetensors"
    assert (folder / model).read_bytes() == (trained.root / "run" / model).read_bytes()
    [row] = (folder / "students/fused/metrics.jsonl").read_text().splitlines()
    assert "heldout" not in json.loads(row) and json.loads(row)["step"] == 2
    assert work.evaluate()["students"]["fused"]["domains"]["overall"]["perplexity"] > 1
    result = cli("report", folder)
    assert result.exit_code == 0, result.output


def test_further_students_that_cannot_be_measured_are_refused(trained: Lab, cli: Cli) -> None:
    config, folder = trained.write(), trained.root / "run/students/fused/model"

    def refused(model: str, *parts: str, code: int = 2) -> None:
        result = cli("evaluate", config, "--model", model)
        assert result.exit_code == code, result.output
        for part in parts:
            assert part in result.output

    refused("alone", "NAME=FOLDER")
    refused(f"before={folder}", "the run has a model of this name", "--model before=")
    refused(f"one={folder}", "the run has a model of this name")
    refused("other=nowhere", "no such model folder", "nowhere")
    other = trained.root / "other"
    vocabulary = make_tokenizer(other, 300)
    make_model(other, len(vocabulary), 1)
    refused(f"other={other}", "another tokenizer", "--model other=", code=1)
    make_tokenizer(other)
    refused(f"other={other}", "fewer logits", "student other", code=1)
    twice = cli("evaluate", config, "--model", f"a={folder}", "--model", f"a={folder}")
    assert twice.exit_code == 2 and "given twice" in twice.output


@pytest.mark.long
def test_lm_eval_runs_on_an_exported_student(trained: Lab) -> None:
    """Tasks in local files, without a network: a choice, and bits per byte of texts."""
    folder, student = trained.root / "tasks", trained.root / "run/students/fused/model"
    folder.mkdir()
    rows = [
        {"text": "the quick brown", "choices": [" fox jumps", " tea"], "answer": 0},
        {"text": "café owners drink 漢字", "choices": [" dog", " tea 🍵"], "answer": 1},
        {"text": "a lazy", "choices": [" noon", " dog"], "answer": 1},
    ]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    data = {
        "dataset_path": "json", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
    }  # fmt: skip
    choice = {
        "task": "local_choice", **data, "output_type": "multiple_choice", "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    text = {
        "task": "local_text", **data, "output_type": "loglikelihood_rolling", "doc_to_text": "",
        "doc_to_target": "{{text}}", "metric_list": [{"metric": "bits_per_byte"}],
    }  # fmt: skip
    for task in (choice, text):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu",
         "--model_args", f"pretrained={student},dtype=float32",
         "--tasks", "local_choice,local_text", "--include_path", str(folder),
         "--batch_size", "2", "--output_path", str(folder / "out")],
        env={**os.environ, **offline, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    [path] = (folder / "out").rglob("results_*.json")
    results = json.loads(path.read_text())["results"]
    told = results["local_choice"]["acc,none"], results["local_text"]["bits_per_byte,none"]
    assert told == pytest.approx(by_hand(student, rows), rel=1e-3)


def by_hand(student: Path, rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Returns (accuracy, bits per byte) by transformers alone; a text follows the end of another."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(student)

    def logprob(context: list[int], new: list[int]) -> float:
        ids = torch.tensor([context + new])
        with torch.no_grad():
            logp = model(input_ids=ids).logits[0].log_softmax(-1)
        return sum(float(logp[len(context) + i - 1, token]) for i, token in enumerate(new))

    right, nats, size = 0, 0.0, 0
    for row in rows:
        context = tokenizer(row["text"])["input_ids"]
        scores = [
            logprob(context, tokenizer(row["text"] + choice)["input_ids"][len(context) :])
            for choice in row["choices"]
        ]
        right += scores.index(max(scores)) == row["answer"]
        nats -= logprob([tokenizer.eos_token_id], context)
        size += len(row["text"].encode())
    return right / len(rows), nats / math.log(2) / size
