"""Where a student may come from and how it may be run: packed, random, with adapters, compiled."""

from __future__ import annotations

import functools
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Lab
from safetensors.torch import load_file

import stages.chunked_head
from stages.batches import BatchReader
from stages.chunked_head import chunked_loss
from stages.head import Head, HeadRule, product, run_decoder
from stages.loggers import open_loggers
from stages.lora import linear_maps, merged
from stages.losses import cross_entropy
from stages.metrics import MetricsLog
from stages.model_checks import check_model
from stages.parallel import compile_layers
from stages.student import build_student
from stages.train_options import LoraOptions, StudentOptions
from storage.errors import ConfigError, TeacherError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def cached(cached_parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(Path(shutil.copytree(cached_parts, tmp_path_factory.mktemp("options") / "lab")))


def open_lab(lab: Lab, name: str, **changes: Any) -> Any:
    folders = {"corpus_dir": f"{lab.root}/run/corpus", "cache_dir": f"{lab.root}/run/cache"}
    return lab.workspace(run_dir=f"{lab.root}/{name}", **folders, **changes)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents_are_as_if_alone(cached: Lab, attention: str) -> None:
    """Losses and gradients of a packed block are those of its documents run one by one."""
    work = cached.workspace(student__attention=attention)
    reader: BatchReader = work.batch_reader(teachers=False)
    blocks = [reader.read(np.array([i])) for i in reader.corpus.info.block_ids("train")]
    batch = max(blocks, key=lambda one: int((one.positions[one.present] == 0).sum()))
    positions, tokens = batch.positions[0], batch.inputs[0]
    present = int(batch.present[0].sum())
    starts = [i for i, p in enumerate(positions[:present].tolist()) if p == 0 or i == 0]
    assert len(starts) > 2, "a block of several documents"
    outcomes = []
    for spans in ([(0, present)], list(zip(starts, [*starts[1:], present], strict=True))):
        model = build_student(work.config.student, work.student_folder(), CPU)
        assert model.config._attn_implementation == attention
        states = [
            run_decoder(model, tokens[None, a:b], positions[None, a:b], ())[0][0] for a, b in spans
        ]
        hidden = torch.cat(states)
        loss = cross_entropy(model.lm_head(hidden[:-1]), tokens[1:present]).mean()
        loss.backward()
        outcomes.append((hidden.detach(), loss.item(), [p.grad for p in model.parameters()]))
    (packed, loss, gradients), (alone, loss_alone, others) = outcomes
    assert loss == pytest.approx(loss_alone, rel=1e-5)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(gradients, others, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_student_from_a_configuration_alone(cached: Lab) -> None:
    student = {"config": f"{cached.root}/a/config.json"}
    work = open_lab(cached, "scratch", student=student, train__seed=3)
    models = [build_student(work.config.student, work.student_folder(), CPU, s) for s in (3, 3, 4)]
    first, again, other = (m.state_dict() for m in models)
    assert all(torch.equal(first[name], again[name]) for name in first)
    embedding = "model.embed_tokens.weight"
    assert not torch.equal(first[embedding], other[embedding])
    run = work.train_students()["fused"]
    trained = load_file(run.model_folder / "model.safetensors")
    assert trained.keys() == {n for n in first if n != "lm_head.weight"}  # tied
    assert not torch.equal(trained[embedding], first[embedding])
    assert "config.json" in run.identity["student"]["files"]


def test_any_checkpoint_becomes_a_model(cached: Lab, cli: Any) -> None:
    work = open_lab(cached, "exported", train__steps=6, train__keep_checkpoints=9)
    final = load_file(work.train_students()["fused"].model_folder / "model.safetensors")
    config = cached.root / "run.yaml"
    models = {}
    for step in (2, 6):
        folder = cached.root / f"after-{step}"
        result = cli("export", config, folder, "--step", step)
        assert result.exit_code == 0 and f"after step {step}" in result.output
        models[step] = load_file(folder / "model.safetensors")
    assert all(torch.equal(value, final[name]) for name, value in models[6].items())
    assert any(not torch.equal(value, final[name]) for name, value in models[2].items())
    for arguments, said in (
        ((cached.root / "x", "--step", "3"), "one of [2, 4, 6]"),
        ((cached.root / "after-2",), "there already"),
        ((cached.root / "x", "--student", "y"), "no such student"),
    ):
        result = cli("export", config, *arguments)
        assert result.exit_code != 0 and said in result.output


@pytest.mark.parametrize(
    "options", [{}, {"model": "a", "config": "b"}, {"config": "b", "keep_layers": [0]}]
)
def test_a_student_has_one_origin(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"either `model` or `config`|go with `model`"):
        StudentOptions(**options)


def test_adapters_are_merged_into_plain_weights() -> None:
    options = LoraOptions(rank=2, alpha=6.0)
    generator = torch.Generator().manual_seed(0)
    w, a, b, norm = (
        torch.randn(shape, generator=generator) for shape in ((5, 4), (2, 4), (5, 2), (4,))
    )
    found = merged(
        {
            "layers.0.q_proj.base_layer.weight": w, "layers.0.q_proj.lora_A.default.weight": a,
            "layers.0.q_proj.lora_B.default.weight": b, "norm.weight": norm,
        },
        options,
    )  # fmt: skip
    assert found.keys() == {"layers.0.q_proj.weight", "norm.weight"}
    torch.testing.assert_close(found["layers.0.q_proj.weight"], w + 3.0 * b @ a)
    assert found["norm.weight"] is norm


def test_adapters_go_into_the_layers_only(cached: Lab) -> None:
    model = build_student(StudentOptions(model="a"), cached.root / "a", CPU)
    names = linear_maps(model, ())
    assert len(names) == 3 * 7 and not any("lm_head" in name for name in names)
    assert all(
        name.endswith(("q_proj", "v_proj")) for name in linear_maps(model, ("q_proj", "v_proj"))
    )
    with pytest.raises(ConfigError, match="no such linear map"):
        linear_maps(model, ("lm_head",))


def test_training_adapters_without_peft_is_refused(
    cached: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"scholiast\[lora\]"):
        open_lab(cached, "no-peft", student__lora={"rank": 2}).train_students()


def test_training_adapters_changes_their_maps_alone(cached: Lab) -> None:
    work = open_lab(cached, "lora", student__lora={"rank": 2, "targets": ["q_proj"]})
    before = build_student(work.config.student.model_copy(update={"lora": None}),
                           work.student_folder(), CPU).state_dict()  # fmt: skip
    run = work.train_students()["fused"]
    after = load_file(run.model_folder / "model.safetensors")
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)}
    for name in changed:
        assert torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-3) <= 2


def test_compiled_layers_keep_names_hooks_and_values(
    cached: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced by dynamo, run without a C++ compiler."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    outcomes = []
    for compiled in (False, True):
        model = build_student(StudentOptions(model="a"), cached.root / "a", CPU).train()
        if compiled:
            compile_layers(model)
        tokens = torch.arange(12).view(1, 12)
        last, found = run_decoder(model, tokens, tokens % 5, (1, 2))
        (last.square().mean() + found[1].mean()).backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        outcomes.append((last.detach(), found, grads))
    (last, found, grads), (other, found_too, grads_too) = outcomes
    torch.testing.assert_close(last, other)
    assert found.keys() == found_too.keys() == {1, 2} and grads.keys() == grads_too.keys()
    for name, value in grads.items():
        torch.testing.assert_close(value, grads_too[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("frozen", ["head", "hidden", "neither"])
def test_only_the_gradients_that_are_wanted_are_computed(
    monkeypatch: pytest.MonkeyPatch, frozen: str
) -> None:
    """With adapters the head is frozen: its gradient, the largest of all, would be thrown away."""
    seen: list[tuple[int, ...]] = []

    def spy(a: Any, b: Any, *rest: Any, **named: Any) -> Any:
        found = product(a, b, *rest, **named)
        seen.append(tuple(found.shape))
        return found

    monkeypatch.setattr(stages.chunked_head, "product", spy)
    hidden = torch.randn(6, 3, requires_grad=frozen != "hidden")
    weight = torch.randn(7, 3, requires_grad=frozen != "head")
    gold, leaves = torch.arange(6), [x for x in (hidden, weight) if x.requires_grad]
    loss = chunked_loss(hidden, Head(weight, None, HeadRule(), False), gold, None, 1.0, 0.0, 6)
    found = torch.autograd.grad(loss.total, leaves)
    assert ((7, 3) in seen) == (frozen != "head") and ((6, 3) in seen) == (frozen != "hidden")
    plain = torch.autograd.grad(cross_entropy(hidden @ weight.t(), gold).sum(), leaves)
    for mine, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_head_that_is_not_reproduced_is_refused(cached: Lab) -> None:
    model = build_student(StudentOptions(model="a"), cached.root / "a", CPU).train()
    weight = model.get_output_embeddings().weight
    check_model(model, Head.of(model, False), "student.model", "student.attention")
    assert model.training
    for rule in (HeadRule(scale=0.5), HeadRule(softcap=3.0)):
        with pytest.raises(TeacherError, match="not one that this version reproduces"):
            check_model(model, Head(weight, None, rule, False), "student.model", "")


class FakeTracker(types.ModuleType):
    """What wandb and trackio have in common."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.began: dict[str, Any] = {}
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.finished = 0

    def init(self, **settings: Any) -> None:
        self.began = settings

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.rows.append((step, numbers))

    def finish(self) -> None:
        self.finished += 1


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_loggers_get_the_numbers_of_every_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    tracker, folder = FakeTracker(), tmp_path / "mine/students/fused"
    monkeypatch.setitem(sys.modules, name, tracker)
    metrics = MetricsLog(folder / "metrics.jsonl", open_loggers((name,), folder, {"seed": 1}))
    metrics.write({"step": 4, "total": 1.5, "weights": {"x": {"a": 0.25}}}, flush=False)
    metrics.close()
    assert tracker.began == {"project": "scholiast", "name": "mine-fused", "config": {"seed": 1}}
    assert tracker.rows == [(4, {"total": 1.5, "weights.x.a": 0.25})] and tracker.finished == 1


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_logger_that_is_not_installed_is_named(
    cached: Lab, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for module in (name, "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"scholiast\[{name}\]"):
        open_lab(cached, f"no-{name}", train__loggers=[name]).train_students()


def test_tensorboard_drops_what_a_killed_run_logged(
    cached: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run writes those steps again."""
    purged: list[int] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            purged.append(purge_step)

        def add_scalar(self, name: str, value: float, step: int) -> None: ...

        def close(self) -> None: ...

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", Writer)
    options = {"train__loggers": ["tensorboard"], "train__checkpoint_every": 6}
    run = open_lab(cached, "purged", **options).train_students()["fused"]
    (run.model_folder / "scholiast.json").unlink()
    open_lab(cached, "purged", **options).train_students()
    assert purged == [0, 7]


def test_tensorboard_writes_events(tmp_path: Path) -> None:
    folder = tmp_path / "run/students/fused"
    metrics = MetricsLog(folder / "metrics.jsonl", open_loggers(("tensorboard",), folder, {}))
    metrics.write({"step": 1, "total": 1.5}, flush=False)
    metrics.close()
    assert b"total" in next((folder / "tensorboard").iterdir()).read_bytes()
