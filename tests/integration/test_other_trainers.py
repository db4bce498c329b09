"""Every block of pipeline/api/README.md, and other trainers' losses against those of our own loop."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import scholiast
import torch
import yaml
from conftest import Lab, build_parts, make_model
from peft import LoraConfig, get_peft_model
from readme_blocks import readme_blocks
from test_stream import same
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from pipeline.config import load_config
from pipeline.workspace import Workspace
from stages.batches import count_segments
from stages.progress import Silent

README = Path(__file__).resolve().parents[2] / "pipeline/api/README.md"
TRAIN = yaml.safe_load(readme_blocks(README, "yaml", "In other trainers")[0].text)["train"]
STEPS = TRAIN["steps"]
TOLERANCE = 1e-6  # relative; seen: 5e-8


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Caches with draws, a student of its own folder, and the README's training on them."""
    root: Path = tmp_path_factory.mktemp("trainers")
    build_parts(root)
    lab = Lab(root)
    make_model(root / "student", lab.vocab_size + 8, 3, layers=2)
    AutoTokenizer.from_pretrained(root / "a").save_pretrained(root / "student")
    lab.config |= {
        "corpus_dir": f"{root}/run/corpus", "cache_dir": f"{root}/run/cache",
        "student": {"model": f"{root}/student"}, "train": TRAIN,
        "store": {"k": 8, "draws": 4, "temperatures": [2.0]},
        "loss": {"alpha": 0.8, "temperature": 2.0, "chunk_tokens": 16},
    }  # fmt: skip
    lab.workspace().cache_teachers()
    lab.write()
    return lab


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what `init` writes as run.yaml, features aligned, its caches, and the student."""
    from click.testing import CliRunner

    from pipeline.cli import main

    root: Path = tmp_path_factory.mktemp("written")
    build_parts(root)
    make_model(root / "student", Lab(root).vocab_size + 8, 3, layers=2)
    AutoTokenizer.from_pretrained(root / "a").save_pretrained(root / "student")
    flags = ["--yes", "--device", "cpu", "--block-length", "32", "--teacher", f"one={root}/a",
             "--teacher", f"two={root}/b", "--student", f"{root}/student", "--run-dir", f"{root}/run",
             "--source", f"x={root}/x.jsonl", "--set", "threads=1", "--set", "loss.features.weight=0.1",
             "--set", f"train={json.dumps(TRAIN)}"]  # fmt: skip
    for words in (["init", f"{root}/run.yaml", *flags], ["cache-teachers", f"{root}/run.yaml"]):
        done = CliRunner().invoke(main, words)
        assert done.exit_code == 0, done.output
    return root


def student(folder: str | Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def trainer_of(distillation: Any, model: Any, folder: str | Path, **changes: Any) -> Any:
    """Returns a Trainer with the settings of the README's example.

    Args:
        folder: for what it writes.
        changes: of its arguments.
    """
    arguments = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2, "learning_rate": TRAIN["lr"], "lr_scheduler_type": "cosine",
        "adam_beta2": 0.95, "weight_decay": 0.01, "train_sampling_strategy": "sequential",
        "remove_unused_columns": False, "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "use_cpu": True, "disable_tqdm": True, **changes,
    }  # fmt: skip
    return scholiast.DistillationTrainer(
        model=model, args=TrainingArguments(**arguments), data_collator=scholiast.collate,
        train_dataset=distillation.cache.dataset(seed=0, samples=4 * STEPS),
        distillation=distillation,
    )  # fmt: skip


def logged(trainer: Any) -> list[dict[str, float]]:
    """Returns the rows that a finished trainer has logged of its steps."""
    return [row for row in trainer.state.log_history if "loss" in row]


def our_rows(lab: Lab, name: str, **changes: Any) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl of a training by our own loop, a row a step."""
    work = lab.workspace(name=f"{name}.yaml", run_dir=f"{lab.root}/{name}", **changes)
    text = (work.train_students()["fused"].folder / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()][1:]


def same_losses(logs: list[dict[str, float]], rows: list[dict[str, Any]]) -> None:
    assert len(logs) == len(rows) == STEPS >= 10
    for log, row in zip(logs, rows, strict=True):
        ours = {"loss": row["total"], "grad_norm": row["grad_norm"], "learning_rate": row["lr"]}
        ours |= {name: row[name] for name in ("ce", "kd", "accuracy", "agreement")}
        for name, value in ours.items():
            assert log[name] == pytest.approx(value, rel=TOLERANCE), (row["step"], name)


@pytest.fixture(scope="module")
def plain_rows(lab: Lab) -> list[dict[str, Any]]:
    return our_rows(lab, "ours")


@pytest.fixture
def here(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(lab.root)
    monkeypatch.setenv("TQDM_DISABLE", "1")


@pytest.mark.usefixtures("here")
def test_the_first_sections_run(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    for heading in ("Look at a cache", "Batches and targets", "A loop of your own"):
        for block in readme_blocks(README, "python", heading):
            block.run(names)
    assert "<Cache of one, two: " in capsys.readouterr().out
    assert names["batch"]["state"]["consumed"] == 12
    following = next(iter(names["stream"]))
    expected = names["cache"].dataset(seed=0, samples=16).block_ids[12:]
    assert following["block_id"].tolist() == expected.tolist()


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("heading", ["transformers' Trainer", "TRL's SFTTrainer"])
def test_a_trainer_has_the_losses_of_our_own_loop(
    lab: Lab, plain_rows: list[dict[str, Any]], heading: str
) -> None:
    names: dict[str, Any] = {}
    for block in readme_blocks(README, "python", heading):
        block.run(names)
    same_losses(logged(names["trainer"]), plain_rows)
    ours = AutoModelForCausalLM.from_pretrained(lab.root / "ours/students/fused/model")
    for mine, theirs in zip(names["model"].parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("heading", ["transformers' Trainer", "TRL's SFTTrainer"])
def test_the_examples_train_on_what_init_writes(
    written: Path, heading: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As the README says: what is trained with `--set loss.features.weight=0`."""
    config = yaml.safe_load((written / "run.yaml").read_text())
    assert config["loss"]["features"]["weight"] > 0 and config["store"] == {"preset": "compact"}
    monkeypatch.chdir(written)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    names: dict[str, Any] = {}
    for block in readme_blocks(README, "python", heading):
        block.run(names)
    overrides = ["loss.features.weight=0", f"cache_dir={written}/run/cache",
                 f"corpus_dir={written}/run/corpus", f"run_dir={tmp_path}"]  # fmt: skip
    work = Workspace(load_config(written / "run.yaml", overrides), Silent())
    text = (work.train_students()["fused"].folder / "metrics.jsonl").read_text()
    same_losses(logged(names["trainer"]), [json.loads(line) for line in text.splitlines()][1:])


def test_the_ways_out_that_a_refusal_of_features_names_are_ways_out(
    written: Path, tmp_path: Path
) -> None:
    def opened(*overrides: str) -> scholiast.Cache:
        return scholiast.open_cache(written / "run.yaml", overrides=overrides)

    model = student(written / "student")
    with pytest.raises(scholiast.ScholiastError, match="student is not known") as unknown:
        scholiast.DistillationLoss(opened())
    whole = scholiast.DistillationLoss(opened(), student=model)
    with pytest.raises(scholiast.ScholiastError, match="projections of its own") as own:
        trainer_of(whole, model, tmp_path)
    without, frozen = "loss.features.weight=0", "loss.features.projection=random"
    for told in (unknown, own):
        assert without in told.value.todo and frozen in told.value.todo
    losses = (
        scholiast.DistillationLoss(opened(without)),
        scholiast.DistillationLoss(opened(frozen), student=model),
        scholiast.DistillationLoss(opened("loss.features.kind=gram"), student=model),
    )
    for loss in losses:
        trainer_of(loss, model, tmp_path, max_steps=1).train()
    batch = scholiast.collate([whole.cache.dataset()[0]])  # a loop of one's own
    whole(model, batch).total.backward()
    trained = list(whole.parameters())
    assert trained and all(one.grad is not None and one.grad.any() for one in trained)
    with pytest.raises(scholiast.ScholiastError, match="last hidden states alone") as alone:
        whole.of_hidden(torch.zeros(1), model.lm_head, batch)
    assert without in alone.value.todo and "loss(model, batch)" in alone.value.todo


def test_fewer_entries_of_a_cache_with_draws_are_refused_with_a_way_out(written: Path) -> None:
    with pytest.raises(scholiast.ScholiastError, match="its draws stand for") as told:
        scholiast.open_cache(written / "run.yaml", k=8)
    assert told.value.expected == "k = 16" and "leave k (fusion.k) out" in told.value.todo
    assert "store.preset: balanced" in told.value.todo
    with pytest.raises(scholiast.ScholiastError, match=r"leave it out, or .*store.draws: 0"):
        scholiast.open_cache(written / "run.yaml", overrides=["fusion.k=8"])
    assert scholiast.open_cache(written / "run.yaml", k=16).k == 16


def test_every_block_is_run_by_one_of_these() -> None:
    headings = {block.headings[-1] for block in readme_blocks(README, "python")}
    assert headings == {
        "Look at a cache", "Batches and targets", "A loop of your own", "transformers' Trainer",
        "TRL's SFTTrainer",
    }  # fmt: skip
    assert {block.language for block in readme_blocks(README)} <= {"python", "yaml", "text"}


@pytest.mark.long
def test_schedules_features_checkpointing_and_bf16_are_ours_too(lab: Lab) -> None:
    """α falls, the weights ramp from uniform to EM's, features are aligned, bf16 by autocast."""
    changes = {
        "fusion": {"weights": "em", "ramp": 0.5, "floor": 0.1},
        "loss": {
            "alpha": 0.9, "alpha_schedule": "linear", "alpha_end": 0.2, "chunk_tokens": 16,
            "features": {"weight": 0.5, "projection": "random", "pairs": "auto"},
        },
        "train": TRAIN | {"precision": "bf16"},
    }  # fmt: skip
    rows = our_rows(lab, "more", **changes)
    cache = scholiast.open_cache(lab.write("more.yaml", **changes))
    model = student(lab.root / "student")
    distillation = scholiast.DistillationLoss(cache, student=model)
    trainer = trainer_of(
        distillation, model, lab.root / "other", bf16=True, gradient_checkpointing=True,
        dataloader_num_workers=1,
    )  # fmt: skip
    trainer.train()
    same_losses(logged(trainer), rows)
    logs = [log["features"] for log in logged(trainer)]
    assert logs == pytest.approx([row["features"] for row in rows], rel=TOLERANCE)
    assert logs[-1] < logs[0]


def test_adapters_alone_are_trained_and_a_resumed_trainer_goes_on_as_it_would_have(
    lab: Lab,
) -> None:
    loss = scholiast.DistillationLoss(scholiast.open_cache(lab.write()))

    def adapted() -> Any:
        torch.manual_seed(0)
        chosen = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        return get_peft_model(student(lab.root / "student"), chosen)

    batch, model = scholiast.collate([loss.cache.dataset()[0]]), adapted()
    plain = float(loss(student(lab.root / "student"), batch).total.detach())
    assert float(loss(model, batch).total.detach()) == plain  # an adapter begins at 0
    out = lab.root / "adapted"
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 8}
    whole, resumed = (trainer_of(loss, one, out, **saving) for one in (model, adapted()))
    whole.train()
    assert float(loss(model, batch).total.detach()) != plain
    resumed.train(resume_from_checkpoint=str(out / "checkpoint-8"))
    assert logged(whole)[8:] == logged(resumed)[8:] and len(logged(resumed)) == STEPS


def test_evaluation_is_the_batches_own_mean_and_keeps_the_model_as_it_is(lab: Lab) -> None:
    cache = scholiast.open_cache(lab.write())
    distillation, model = scholiast.DistillationLoss(cache), student(lab.root / "student")
    trainer = trainer_of(distillation, model, lab.root / "other", per_device_eval_batch_size=100)
    heldout = cache.dataset("heldout")
    found = trainer.evaluate(heldout)["eval_loss"]
    with torch.no_grad():
        batch = scholiast.collate(list(heldout))
        expected = distillation.eval()(student(lab.root / "student"), batch).total
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
    assert found == pytest.approx(float(expected), rel=1e-6)
    assert logits.shape[-1] == lab.vocab_size + 8  # its forward still is what it was
    assert (
        len(model.generate(torch.tensor([[1, 2, 3]]), min_new_tokens=2, max_new_tokens=2)[0]) == 5
    )


def test_two_processes_would_have_the_gradient_of_one(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The arithmetic alone: the other process's counts stand in for the exchange, and DDP's mean is taken
    here. Two processes with a batch each have what one has of both batches."""
    cache = scholiast.open_cache(lab.write())
    batches = [scholiast.collate([one]) for one in cache.dataset(seed=0, samples=4)]

    def gradient(of: list[Any], others: list[Any]) -> torch.Tensor:
        """Returns one process's gradient of a step, before any is averaged."""
        trainer = trainer_of(
            scholiast.DistillationLoss(cache), student(lab.root / "student"), tmp_path
        )
        theirs, spans = [batch["loss_mask"] for batch in others], cache.segments
        counts = [sum(int(m.sum()) for m in theirs), sum(count_segments(m, spans) for m in theirs)]
        if others:
            monkeypatch.setattr(type(trainer), "_processes", 2)
            monkeypatch.setattr(
                trainer.accelerator, "reduce", lambda ours, _: ours + torch.tensor(counts)
            )
        _, rows = trainer.get_batch_samples(iter(of), len(of), torch.device("cpu"))
        trainer.model.train()
        for batch in of:
            trainer.compute_loss(trainer.model, batch, num_items_in_batch=rows).backward()
        monkeypatch.undo()
        return torch.cat([p.grad.flatten() for p in trainer.model.parameters()])

    whole = gradient(batches, [])
    averaged = (gradient(batches[:1], batches[1:]) + gradient(batches[1:], batches[:1])) / 2
    assert torch.allclose(averaged, whole, rtol=1e-5, atol=1e-8) and whole.norm() > 0.01


def test_hidden_states_give_the_models_losses_and_gradients(lab: Lab) -> None:
    cache = scholiast.open_cache(lab.write())
    loss = scholiast.DistillationLoss(cache)
    batch = scholiast.collate(cache.dataset().__getitems__([0, 1, 2]))
    one, other = student(lab.root / "student"), student(lab.root / "student")
    whole = loss(one, batch)
    hidden = other.get_decoder()(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
    ).last_hidden_state
    parts = loss.of_hidden(hidden, other.lm_head, batch)
    for terms in (whole, parts):
        terms.total.backward()
    torch.testing.assert_close(parts.total, whole.total, rtol=0, atol=0)
    torch.testing.assert_close(one.lm_head.weight.grad, other.lm_head.weight.grad, rtol=0, atol=0)
    halves = [scholiast.collate([item]) for item in cache.dataset().__getitems__([0, 1, 2])]
    rows = int(batch["loss_mask"].sum())
    total = sum(float(loss(one, half, rows=rows).total.detach()) for half in halves)
    assert total == pytest.approx(float(whole.total.detach()), rel=1e-6)


def test_draws_stand_for_the_tail_in_training_and_the_bucket_in_evaluation(lab: Lab) -> None:
    work = lab.workspace()
    loss = scholiast.DistillationLoss(scholiast.open_cache(work.config))
    batch = scholiast.collate([loss.cache.dataset()[0]])
    for training, reader in ((True, work.batch_reader()), (False, work.heldout_reader())):
        expected = reader.read(batch["block_id"].numpy())
        found = replace(loss.train(training).joined(batch), features={})  # our engine left them out
        assert same(found, expected)
        assert bool((expected.target.tail == 0).all()) == training


@pytest.mark.parametrize(
    ("changes", "loss", "match"),
    [
        ({"remove_unused_columns": True}, {}, "would remove the notes"),
        ({}, {"features": {"weight": 1.0, "pairs": [{"student": 1, "teacher": 2}]}},
         "projections of its own"),
    ],
)  # fmt: skip
def test_what_would_be_another_loss_is_refused(
    lab: Lab, changes: dict[str, Any], loss: dict[str, Any], match: str
) -> None:
    cache, model = scholiast.open_cache(lab.root / "run"), student(lab.root / "student")
    options = scholiast.LossOptions.model_validate(loss)
    distillation = scholiast.DistillationLoss(cache, options, student=model)
    with pytest.raises(scholiast.ScholiastError, match=match):
        trainer_of(distillation, model, lab.root / "other", **changes)


def test_float16_is_refused(lab: Lab) -> None:
    cache = scholiast.open_cache(lab.root / "run")
    batch = scholiast.collate([cache.dataset()[0]])
    with (
        torch.autocast("cpu", torch.float16),
        pytest.raises(scholiast.ScholiastError, match="fp16"),
    ):
        scholiast.DistillationLoss(cache)(student(lab.root / "student"), batch)
