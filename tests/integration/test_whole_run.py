"""The main job on tiny models, through the commands a user types."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from conftest import Lab
from safetensors.torch import load_file


def test_from_nothing_to_report(lab: Lab, cli: Callable[..., Any]) -> None:
    config = lab.write(train__baseline=True)
    for command in ("plan", "cache-teachers", "train-student", "evaluate", "report", "status"):
        result = cli(command, config, "--debug", catch_exceptions=False)
        assert result.exit_code == 0, result.output
    run = lab.root / "run"
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert set(evaluation["teachers"]) == {"one", "two"}
    assert set(evaluation["students"]) == {"before", "fused", "cross_entropy"}
    [passage] = evaluation["tokens"]["passages"]
    assert set(passage["teachers"]) == {"one", "two"}
    assert set(passage["students"]) == {"fused", "cross_entropy"}
    assert (run / "report" / "report.html").stat().st_size > 10_000
    assert "fused" in (run / "report" / "report.md").read_text()
    states = json.loads(cli("status", config, "--json").output)
    assert all(row["state"] == "done" for row in states)
    again = cli("cache-teachers", config)
    assert again.exit_code == 0 and "cache complete" in again.output


def test_student_is_an_ordinary_checkpoint(lab: Lab, cli: Callable[..., Any]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = lab.write()
    for command in ("cache-teachers", "train-student"):
        assert cli(command, config).exit_code == 0
    folder = lab.root / "run/students/fused/model"
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.num_hidden_layers == 2 and type(model).__name__ == "LlamaForCausalLM"
    assert (folder / "generation_config.json").exists()
    stored = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in stored, "a tied head is stored once"
    dtypes = {value.dtype for value in stored.values()}
    told = json.loads((folder / "config.json").read_text())["dtype"]
    assert dtypes == {getattr(torch, told)}
    count = sum(value.numel() for value in stored.values())
    assert (
        count == model.num_parameters()
        and f"{count:,} parameters" in (folder / "README.md").read_text()
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("the quick", return_tensors="pt")
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=ids["input_ids"]).logits).all()
    shown = cli("generate", config, "-p", "the quick", "--new-tokens", "5")
    assert shown.exit_code == 0 and shown.output.startswith("the quick")
