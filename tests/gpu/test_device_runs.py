"""Whole runs of tiny models on the device: stage one, trainings, evaluation, plan, other trainers."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Lab, build_parts, digests
from device_under_test import CPU, DEVICE, ON_GPU, needs_device

from stages.decode import DeviceDecoder
from stages.fusion import rows_of
from stages.train_student import Trainer
from storage.errors import Stopped
from storage.reader import CacheReader

pytestmark = needs_device

Row = dict[str, Any]
STEPS = 6


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Float32 teachers, notes as computed, a student with dropout; one corpus and a cache by the CPU."""
    root: Path = tmp_path_factory.mktemp("device")
    build_parts(root)
    shutil.copytree(root / "a", root / "dropping")
    settings = json.loads((root / "a/config.json").read_text())
    (root / "dropping/config.json").write_text(json.dumps({**settings, "attention_dropout": 0.3}))
    lab = Lab(root)
    lab.config |= {
        "device": str(DEVICE), "corpus_dir": f"{root}/corpus", "cache_dir": f"{root}/cache-cpu",
        "store": {"preset": "exact", "k": 8, "draws": 4, "temperatures": [2.0], "chunk_tokens": 16},
    }  # fmt: skip
    for teacher in lab.config["teachers"].values():
        teacher["dtype"] = "float32"
    lab.config["corpus"]["blocks_per_part"] = 12  # few files to write
    lab.config["train"] |= {"steps": STEPS, "precision": "fp32"}
    lab.workspace(device="cpu").cache_teachers()
    return lab


def curve(lab: Lab, name: str, **changes: Any) -> list[Row]:
    """Trains in a folder of its own, or goes on there; returns the rows of its metrics."""
    lab.workspace(name=f"{name}.yaml", run_dir=f"{lab.root}/{name}", **changes).train_students()
    return rows(lab.root / name)


def rows(run: Path) -> list[Row]:
    text = (run / "students/fused/metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def apart(mine: list[Row], theirs: list[Row]) -> float:
    """Returns the largest difference of two curves, of terms and held-out losses."""
    assert [row["step"] for row in mine] == [row["step"] for row in theirs] == [*range(STEPS + 1)]
    far = [0.0]
    for a, b in zip(mine, theirs, strict=True):
        for key in ("total", "ce", "kd", "features", "grad_norm"):
            far.append(abs(a.get(key, 0.0) - b.get(key, 0.0)))
        for domain, values in b.get("heldout", {}).items():
            far += [abs(a["heldout"][domain][key] - values[key]) for key in ("ce", "kd")]
    return max(far)


@pytest.fixture(scope="module")
def plain(lab: Lab) -> list[Row]:
    return curve(lab, "plain")


def test_the_cache_has_the_same_bytes_twice(lab: Lab) -> None:
    """In bfloat16, with rounded notes."""
    changes: dict[str, Any] = {"store": {"k": 8, "draws": 4, "temperatures": [2.0]}}
    teachers = {n: {**t, "dtype": "bfloat16"} for n, t in lab.config["teachers"].items()}
    for name in ("first", "second"):
        lab.workspace(cache_dir=f"{lab.root}/{name}", teachers=teachers, **changes).cache_teachers()
    assert digests(lab.root / "first") == digests(lab.root / "second") != {}


def test_the_cache_is_the_cpus_up_to_rounding(lab: Lab) -> None:
    there = lab.workspace(cache_dir=f"{lab.root}/cache-device")
    there.cache_teachers()
    for name in ("one", "two"):
        mine, theirs = (
            CacheReader(lab.root / folder / name, name) for folder in ("cache-device", "cache-cpu")
        )
        ids = np.arange(mine.layout.blocks)
        found, expected = mine.read(ids), theirs.read(ids)
        assert (found.head.ids == expected.head.ids).mean() > 0.999
        assert found.draws is not None and expected.draws is not None
        assert (found.draws.ids == expected.draws.ids).mean() > 0.98
        for what in ("entropy", "log_tail_mass", "gold_logprob", "log_z"):
            a, b = getattr(found.stats, what), getattr(expected.stats, what)
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4, err_msg=f"{name}: {what}")
        np.testing.assert_allclose(
            found.head.logprobs, expected.head.logprobs, rtol=1e-4, atol=1e-4, err_msg=name
        )
    reader = there.batch_reader()
    batch = reader.read(np.array([0, 2]))
    assert batch.target is not None and batch.rows > 0


def test_notes_are_decoded_to_the_same_bits(lab: Lab) -> None:
    store = {"k": 8, "draws": 4, "temperatures": [2.0], "top_p": 0.9}
    work = lab.workspace(cache_dir=f"{lab.root}/rounded", store=store)
    work.cache_teachers()
    reader = work.batch_reader(on_device=True)
    ids = np.array([0, 2, 3])
    blocks = reader.corpus.read(ids)
    for name, cache in reader.caches.items():
        packed = {key: torch.from_numpy(a).to(DEVICE) for key, a in cache.packed(ids).items()}
        decoder = DeviceDecoder(cache.layout, cache.orders, DEVICE)
        found = decoder.rows(packed, torch.from_numpy(blocks.scored).to(DEVICE))
        expected = rows_of(cache.read(ids), blocks.scored)
        for key, value in vars(expected).items():
            mine = getattr(found, key)
            assert (mine is None) == (value is None), (name, key)
            assert value is None or torch.equal(mine.cpu(), value), (name, key)


def test_float32_has_the_cpus_curve(lab: Lab, plain: list[Row]) -> None:
    theirs = curve(lab, "cpu", device="cpu")
    assert plain[-1]["total"] < plain[1]["total"]
    assert apart(plain, theirs) < 2e-4
    decoded = curve(lab, "decoded", train__decode="device", train__workers=1)
    assert apart(decoded, theirs) < 2e-4
    if ON_GPU:
        assert 0 < plain[-1]["peak_bytes"] < torch.cuda.get_device_properties(0).total_memory


def test_bfloat16_trains(lab: Lab, plain: list[Row]) -> None:
    lean = curve(
        lab, "bf16", train__precision="bf16", train__gradient_checkpointing=True,
        train__async_checkpoint=True,
    )  # fmt: skip
    assert lean[-1]["total"] < lean[1]["total"]
    assert 0.0 < apart(lean, plain) < 0.3


def test_a_stopped_training_goes_on_as_it_would_have(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout: what the device draws has to go on, too."""
    changes: dict[str, Any] = {"student": {"model": f"{lab.root}/dropping", "keep_layers": [0, 2]}}
    whole = curve(lab, "whole", **changes)
    other = curve(lab, "other-seed", **changes, train__seed=1)
    optimize = Trainer._optimize

    def told(self: Trainer, *arguments: Any, **named: Any) -> Any:
        if self.step + 1 == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        return optimize(self, *arguments, **named)

    with monkeypatch.context() as patch, pytest.raises(Stopped, match="after step 3 of 6"):
        patch.setattr(Trainer, "_optimize", told)
        curve(lab, "stopped", **changes)
    torch.manual_seed(12345)
    if ON_GPU:
        torch.cuda.manual_seed(54321)
    resumed = curve(lab, "stopped", **changes)
    assert apart(resumed, whole) < 1e-4
    assert apart(other, whole) > 1e-3


def test_evaluation_and_report(lab: Lab, plain: list[Row], cli: Callable[..., Any]) -> None:
    config = lab.root / "plain.yaml"
    done = cli("evaluate", "--quiet", config)
    assert done.exit_code == 0, done.output
    found = json.loads((lab.root / "plain/evaluation.json").read_text())
    heldout = found["students"]["fused"]["domains"]["overall"]
    assert heldout["ce"] == pytest.approx(plain[-1]["heldout"]["overall"]["ce"], abs=2e-3)
    done = cli("report", config)
    assert done.exit_code == 0, done.output
    assert list((lab.root / "plain").glob("report*"))


def test_greedy_text_is_the_cpus(lab: Lab) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from stages.generation import continue_prompts

    tokenizer = AutoTokenizer.from_pretrained(lab.root / "a")
    prompts = [[i + j for j in range(20, 28)] for i in range(5)]
    written = []
    for device in (DEVICE, CPU):
        model: Any = AutoModelForCausalLM.from_pretrained(lab.root / "a", dtype=torch.float32)
        written.append(continue_prompts(model.to(device), tokenizer, prompts, 12, 0.0, 0))
    assert written[0] == written[1] and all(written[0])


def test_plan_and_doctor_name_the_device(lab: Lab, cli: Callable[..., Any]) -> None:
    config = lab.write("plan.yaml", run_dir=f"{lab.root}/planned")
    done = cli("plan", "--measure", "--json", "--quiet", config)
    assert done.exit_code == 0, done.output
    kept = json.loads((lab.root / "planned/calibration.json").read_text())
    text = json.dumps(kept)
    name = torch.cuda.get_device_name(DEVICE) if ON_GPU else "cpu: "
    assert name in text and "student" in text and "teachers.two" in text, text
    doctor = cli("doctor", "--json", config)
    checks = json.loads(doctor.stdout)["checks"]
    devices = {check["name"]: check for check in checks if check["area"] == "devices"}
    assert devices["bf16"]["state"] in ("ok", "warn"), devices
    if ON_GPU:
        gpu = devices["GPU 0"]["found"]
        assert torch.cuda.get_device_name(0) in gpu and "GB free of" in gpu, gpu


def test_transformers_trainer_has_our_losses(lab: Lab) -> None:
    import scholiast
    from transformers import AutoModelForCausalLM, TrainingArguments

    changes: dict[str, Any] = {
        "student": {"model": f"{lab.root}/a"}, "loss": {"alpha": 0.8, "temperature": 2.0},
        "train": {"steps": STEPS, "batch_blocks": 2, "accumulate": 2, "lr": 1e-3, "warmup": 0.0,
                  "weight_decay": 0.01, "clip": 1.0, "precision": "fp32"},
    }  # fmt: skip
    ours = curve(lab, "ours", **changes)[1:]
    cache = scholiast.open_cache(lab.write("ours.yaml", run_dir=f"{lab.root}/ours", **changes))
    distillation = scholiast.DistillationLoss(cache)
    arguments = TrainingArguments(
        output_dir=f"{lab.root}/trainer", max_steps=STEPS, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, learning_rate=1e-3, lr_scheduler_type="cosine",
        adam_beta2=0.95, weight_decay=0.01, train_sampling_strategy="sequential",
        remove_unused_columns=False, logging_steps=1, save_strategy="no", report_to="none",
        use_cpu=not ON_GPU, disable_tqdm=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(lab.root / "a", dtype=torch.float32)
    trainer = scholiast.DistillationTrainer(
        model=model, args=arguments, data_collator=scholiast.collate,
        train_dataset=cache.dataset(seed=0, samples=4 * STEPS), distillation=distillation,
    )  # fmt: skip
    trainer.train()
    assert next(model.parameters()).device.type == DEVICE.type
    logs = [row for row in trainer.state.log_history if "loss" in row]
    for name, other in (("total", "loss"), ("ce", "ce"), ("kd", "kd"), ("lr", "learning_rate")):
        mine, theirs = [row[name] for row in ours], [log[other] for log in logs]
        assert theirs == pytest.approx(mine, rel=1e-4), name
