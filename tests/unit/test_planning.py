"""What `scholiast plan` says, what it measures, and how wide parts become."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
import threading
import weakref
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Lab

from pipeline.append import append_sources
from pipeline.planning import calibration, measure, parts
from pipeline.planning.memory import RUNTIME, student_peak, teacher_peak
from pipeline.planning.pace import Device, Pace
from pipeline.planning.shapes import student_shape, teacher_shape
from pipeline.planning.sizes import bytes_by_array
from pipeline.start import machine
from stages.device import resident_bytes
from storage.corpus_info import load_begun
from storage.errors import StaleCache
from storage.layout import Layout

Cli = Callable[..., Any]


@pytest.fixture(autouse=True)
def _known_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """No matrix products for each plan; in bf16 as slow as where it is emulated."""
    monkeypatch.setattr(machine, "rate", lambda _, bf16: 2e7 if bf16 else 1e9)


def planned(cli: Cli, lab: Lab, *arguments: object, **changes: Any) -> dict[str, Any]:
    result = cli("plan", lab.write(**changes), "--json", "--quiet", *arguments)
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


def step(plan: dict[str, Any], name: str) -> dict[str, Any]:
    return next(row for row in plan["steps"] if row["step"] == name)


def test_a_plan_adds_up(lab: Lab, cli: Cli) -> None:
    """Of a run of which nothing is there: bytes by array, hours, money, memory, parts."""
    plan = planned(cli, lab, "--flops", 1e6, "--price-per-hour", 2.5)
    assert plan["estimated"] and plan["blocks_per_part"] == 3 and plan["warnings"] == []
    assert plan["blocks"] == -(-plan["tokens"] // 32) and plan["parts"] == -(-plan["blocks"] // 3)
    one = step(plan, "cache one")
    assert sum(one["arrays"].values()) == pytest.approx(one["size_bytes"])
    assert {"head_ids", "head_logprobs", "log_z", "feature_2"} <= set(one["arrays"])
    assert one["hours"] == pytest.approx(one["seconds"] / 3600) and one["hours"] > 0
    assert one["cost"] == pytest.approx(2.5 * one["hours"])
    hours = sum(row["hours"] or 0.0 for row in plan["steps"])
    assert plan["totals"]["cost"] == pytest.approx(2.5 * hours)
    assert plan["teachers"]["one"]["parts_left"] == plan["parts"]
    assert [peak["what"] for peak in plan["memory"]] == ["teachers.one", "teachers.two", "student"]
    for peak in plan["memory"]:
        assert peak["bytes"] == sum(peak["terms"].values()) and peak["measured"] is None


def test_time_is_told_in_the_precision_that_is_computed_in(lab: Lab, cli: Cli) -> None:
    """Where bf16 is emulated, a plan in float32 was fifty times too long."""
    slow, fast = (
        planned(cli, lab, teachers__one__dtype=dtype, train__precision=precision, device="cpu")
        for dtype, precision in (("bfloat16", "bf16"), ("float32", "fp32"))
    )
    for name in ("cache one", "train fused"):
        assert step(slow, name)["seconds"] == pytest.approx(50 * step(fast, name)["seconds"])


def totals(rows: list[dict[str, Any]]) -> dict[str, tuple[int, bool]]:
    return {row["step"]: (row["total"], row["estimated"]) for row in rows}


def test_plan_and_status_count_alike(lab: Lab, cli: Cli) -> None:
    """About, until the corpus is packed; then exactly, and what the training will do."""
    changes = {"train__steps": None, "train__epochs": 3, "train__baseline": True}
    steps = ("prepare corpus", "cache one", "cache two", "train fused", "train cross_entropy")

    def counted() -> tuple[dict[str, tuple[int, bool]], str, str]:
        plan = totals(planned(cli, lab, **changes)["steps"])
        path = lab.write(**changes)
        status = totals(json.loads(cli("status", path, "--json").stdout))
        assert {name: status[name] for name in steps} == plan and tuple(plan) == steps
        return plan, cli("plan", path).stdout, cli("status", path).stdout

    before, plan, status = counted()
    counts = r"about [\d,]+ tokens in about [\d,]+ blocks of 32, about [\d,]+ parts of 3 blocks\n"
    assert re.match(counts, plan), plan
    for name, (total, estimated) in before.items():
        assert estimated and total > 0
        for shown in (plan, status):
            assert re.search(rf"^{name} .*\b0 +about {total:,} ", shown, re.M), shown
    work = lab.workspace(**changes)
    jobs = work.cache_teachers()
    after, plan, status = counted()
    assert not any(estimated for _, estimated in after.values()) and before != after
    exact = work.runs(work.prepared(), jobs)["fused"].steps
    assert after["train fused"] == (exact, False)
    for shown in (plan, status):
        assert "about" not in shown and re.search(rf"^train fused .*\b0 +{exact} ", shown, re.M)


def test_what_is_held_out_is_not_counted_as_trained_on(lab: Lab, cli: Cli) -> None:
    changes = {"train__steps": None, "train__epochs": 8}
    whole = totals(planned(cli, lab, **changes)["steps"])["train fused"][0]
    lab.config["corpus"]["sources"][0]["heldout"] = 0.5
    lab.config["corpus"]["sources"][1]["heldout"] = 0.5
    half = totals(planned(cli, lab, **changes)["steps"])["train fused"][0]
    assert abs(half - whole / 2) <= 4 and whole > 16
    given = totals(planned(cli, lab)["steps"])
    assert given["train fused"] == (6, False) and given["cache one"][1]


def test_a_student_without_its_export_is_not_done(lab: Lab, cli: Cli) -> None:
    folder = lab.root / "run/students/fused/checkpoints"
    folder.mkdir(parents=True)
    (folder / "latest").write_text("step-00000006")
    rows = json.loads(cli("status", lab.write(), "--json").stdout)
    row = next(row for row in rows if row["step"] == "train fused")
    assert row["state"] == "partial" and row["done"] == row["total"] == 6


def test_memory_is_told_by_term_and_stage(lab: Lab, cli: Cli) -> None:
    """A table a stage, a row a term: first the process itself, with models as small as these."""
    shown = cli("plan", lab.write(device="cpu")).stdout
    plan = planned(cli, lab, device="cpu")
    table = shown.partition("peak memory on cpu")[2].partition("\nparts left")[0]
    one, _, two = table.partition("stage two")
    assert re.search(r"^stage one +one +two$", one, re.M) and re.match(r" +student$", two, re.M)
    assert re.search(r"^interpreter, torch and libraries +524.3 MB +524.3 MB$", one, re.M)
    assert re.search(r"^in all, estimated +\d", two, re.M) and "measured" not in table
    for told, peaks in ((one, plan["memory"][:2]), (two, plan["memory"][2:])):
        for term in (term for peak in peaks for term in peak["terms"]):
            assert re.search(rf"^{term} +\S+ .B", told, re.M), term
    assert max(map(len, table.splitlines())) < 80 and "at its largest" not in table
    shown = cli("plan", lab.write(), "--flops", 1e6).stdout
    assert "context and libraries" in shown and re.search(r"^at its largest +\w", shown, re.M)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's allocator")
def test_what_was_measured_before_is_not_the_next_models() -> None:
    """Of two models measured in one process the second had 450 MB of the first in its peak."""
    cpu, kept = torch.device("cpu"), []

    def load() -> None:  # as transformers does: in threads, whose arenas keep what they free
        several = [torch.ones(25_000) for _ in range(3_000)]
        kept.append(several[-1])

    thread = threading.Thread(target=load)
    thread.start()
    thread.join()
    before = resident_bytes(cpu)
    measure._give_back()
    assert before - resident_bytes(cpu) > 150_000_000


@pytest.mark.long
@pytest.mark.skipif(torch.version.cuda is not None, reason="of torch's build for CPUs")
def test_the_process_itself_is_as_large_as_a_plan_says() -> None:
    code = (
        "import torch\nfrom transformers import LlamaForCausalLM\nimport datasets\n"
        "import stages.train_student, stages.annotate, stages.corpus, storage.writer\n"
        "from stages.device import resident_bytes\nprint(resident_bytes(torch.device('cpu')))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.6 * RUNTIME[False] < int(shown.stdout) < 1.4 * RUNTIME[False]


def test_finished_parts_say_what_they_take(lab: Lab, cli: Cli) -> None:
    del lab.config["teachers"]["two"]
    work = lab.workspace(corpus__blocks_per_part=16)
    costs = work.cache_costs(work.cache_teachers())
    plan = planned(cli, lab, corpus__blocks_per_part=16)
    assert step(plan, "cache one")["basis"] == "done"
    for name, each in costs["one"]["arrays"].items():
        there = each * costs["one"]["tokens"]
        assert step(plan, "cache one")["arrays"][name] == pytest.approx(there, abs=1)
    assert plan["teachers"]["one"]["tasks"] == 0 and not plan["estimated"]
    text = cli("plan", lab.write(corpus__blocks_per_part=16)).output
    for told in (
        "on disk by array",
        "peak memory on cpu",
        "optimizer states",
        "hours of this machine",
    ):
        assert told in text
    assert "parts left" not in text


@pytest.mark.parametrize("preset", ["exact", "balanced", "compact"])
def test_every_array_of_a_layout_has_an_expected_size(preset: str) -> None:
    layout = Layout(
        4, 2, 32, 400, preset, 8, (2.0,), (2,), 1, 16, draws=4, pooling=("mean", "last")
    )
    expected = bytes_by_array(layout)
    assert set(expected) == set(layout.arrays()) and min(expected.values()) > 0
    grown = bytes_by_array(Layout(4, 2, 32, 400, preset, 16, (2.0,), (2,), 1, 16, draws=4))
    assert grown["head_ids"] > expected["head_ids"] and grown["entropy"] == expected["entropy"]


def test_memory_follows_the_options(lab: Lab) -> None:
    def terms(ranks: int = 1, gpu: bool = True, **changes: Any) -> dict[str, int]:
        work = lab.workspace(train__precision="bf16", **changes)
        shape = student_shape(work)
        assert shape is not None
        return dict(student_peak(work, shape, gpu, ranks).terms)

    def total(**changes: Any) -> int:
        return sum(terms(**changes).values())

    one = terms()
    shape = student_shape(lab.workspace())
    assert shape is not None and shape.layers == 2 and shape.checkpoint > shape.parameters
    projections = 32 * 33 + 64 * 33  # to D = 32 and to D = 64, with biases
    assert one["weights"] == 4 * (shape.parameters + projections)
    assert one["optimizer states"] == 2 * one["weights"]
    assert "gathered weights" not in one
    sharded = terms(ranks=4, train__parallel="fsdp")
    assert sharded["weights"] == one["weights"] // 4 and sharded["gathered weights"] > 0
    big: dict[str, Any] = {"train__batch_blocks": 64, "train__accumulate": 1}
    assert total(train__gradient_checkpointing=True, **big) < total(**big)
    work = lab.workspace()
    teacher = teacher_shape(work, "one")
    assert teacher is not None
    on_cpu, on_gpu = (
        dict(teacher_peak(work, "one", teacher, g, 3, 1).terms) for g in (False, True)
    )
    assert on_cpu["weights"] == on_gpu["weights"] == 2 * teacher.parameters
    assert on_cpu["head in float32"] == 4 * teacher.head and "head in float32" not in on_gpu


@pytest.mark.parametrize("loss", [{"divergence": "reverse_kl"}, {"target": "bucket"}])
def test_a_bucket_beside_a_head_made_for_draws_is_a_warning(
    lab: Lab, cli: Cli, loss: dict[str, str]
) -> None:
    lab.config["loss"] |= loss
    lab.config["store"] = {"temperatures": []}
    [told] = planned(cli, lab)["warnings"]
    assert "but 16 entries a token, and the 16 draws are not used; set store.preset: bal" in told
    checks = json.loads(cli("doctor", lab.write(), "--json").stdout)["checks"]
    [check] = [one for one in checks if one["area"] == "loss"]
    assert check["state"] == "warn" and check["todo"].endswith("it keeps 64")
    for store in ({"preset": "balanced"}, {"k": 64}):
        assert planned(cli, lab, store={"temperatures": [], **store})["warnings"] == []
    lab.config["loss"] = {"chunk_tokens": 16}
    assert planned(cli, lab)["warnings"] == [], "draws serve forward_kl"


def test_what_does_not_fit_is_a_warning(
    lab: Lab, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(cli, lab, "--device-memory", 0.01)
    assert len(plan["warnings"]) == 3 and "student does not fit" in plan["warnings"][2]
    usage = namedtuple("usage", "total used free")(9, 8, 1)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: usage)
        [told] = [w for w in planned(cli, lab)["warnings"] if w.startswith("disk: ")]
        assert "(store.preset: compact, a smaller store.k, store.temperatures: [], no " in told
        store = {"preset": "compact", "temperatures": []}
        changes = {"store": store, "teachers__two__feature_layers": []}
        lab.config["loss"] = {"chunk_tokens": 16}
        lab.config["teachers"]["one"]["feature_layers"] = []
        [told] = [w for w in planned(cli, lab, **changes)["warnings"] if w.startswith("disk: ")]
        assert told.endswith("or store less (fewer store.draws, less text)")
    longest = "blocks are longer than the context of"
    told = planned(cli, lab, corpus__block_length=512)["warnings"]
    assert len(told) == 3 and all(longest in one for one in told)
    refused = cli("launch", "slurm", lab.write(corpus__block_length=512))
    assert refused.exit_code == 2 and longest in refused.output
    [told] = planned(cli, lab, cluster={"train": {"nodes": 3}})["warnings"]
    assert "cannot be shared out evenly among the ranks; where: train.accumulate" in told
    cluster = {"max_array": 2, "task_minutes": 1, "defaults": {"time": "3"}}
    told = planned(cli, lab, "--flops", 1e4, cluster=cluster)["warnings"]
    assert "an array has at most 2 (cluster.max_array)" in told[0]
    assert "a part of one takes about" in told[1]


def test_measured_is_kept_while_it_holds(
    lab: Lab, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each model alone, never two at once; used while the options that decide it are the same."""
    from stages import student, teacher

    loaded: list[Any] = []
    real = teacher.load_causal_lm

    def load(*arguments: Any, **options: Any) -> Any:
        assert not [model for model in loaded if model() is not None], (
            "an earlier model is still there"
        )
        model = real(*arguments, **options)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(teacher, "load_causal_lm", load)
    monkeypatch.setattr(student, "load_causal_lm", load)
    for module in ("measure", "measure_student"):
        monkeypatch.setattr(f"pipeline.planning.{module}.SECONDS", 0.0)
    plan = planned(cli, lab, "--measure")
    assert len(loaded) == 3 and plan["warnings"] == []
    kept = calibration.load(lab.workspace())
    assert set(kept) == {"teachers.one", "teachers.two", "student"}
    for key, row in (("teachers.one", "cache one"), ("student", "train fused")):
        assert step(plan, row)["basis"] == "measured here"
        assert step(plan, row)["seconds"] > 0 and kept[key].tokens_per_s > 0
    assert set(kept["teachers.two"].arrays) == set(step(plan, "cache two")["arrays"])
    assert all(peak["measured"] > 0 for peak in plan["memory"])
    assert step(planned(cli, lab), "cache one")["basis"] == "measured here"
    other = planned(cli, lab, teachers__one__batch_blocks=2)
    assert step(other, "cache one")["basis"] == "estimate from parameters"
    assert step(other, "cache two")["basis"] == "measured here"
    assert step(planned(cli, lab, threads=2), "cache two")["basis"] == "estimate from parameters"
    (lab.root / "run/calibration.json").write_text("{")
    assert step(planned(cli, lab), "cache one")["basis"] == "estimate from parameters"


def test_what_is_not_here_is_not_measured(
    lab: Lab, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.planning.measure.SECONDS", 0.0)
    monkeypatch.setattr("pipeline.planning.measure_student.SECONDS", 0.0)
    plan = planned(cli, lab, "--measure", teachers__two__model="nobody/nothing")
    assert plan["warnings"][0].startswith("teachers.two was not measured")
    assert step(plan, "cache one")["basis"] == "measured here"
    assert step(plan, "cache two")["basis"] == "model not here yet"


# -- how wide a part is


class Fixed(Pace):
    """Teachers that read so many tokens a second."""

    def __init__(self, work: Any, rate: float) -> None:
        super().__init__(work, Device(1.0))
        self._tokens = rate

    def tokens_per_s(self, key: str, flops_of_a_token: float) -> tuple[float, str]:
        return self._tokens, "told"


def test_a_part_takes_minutes_within_its_limits(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    work = lab.workspace(cluster={"part_minutes": 2})
    monkeypatch.setattr(parts, "estimate_tokens", lambda _: 32 * 10**6)

    def width(rate: float, minutes: float = 2, tasks: int | None = 10) -> int:
        cluster = {"part_minutes": minutes, "tasks": tasks}
        return parts.sized(lab.workspace(cluster=cluster), Fixed(work, rate))

    assert width(32.0) == 64, "120 blocks, as a power of 2"
    assert width(320.0) == 1024 and width(32.0, minutes=20) == 1024
    assert width(1e-3) == 1
    assert width(1e9) == 16384, "4 parts for each of 10 tasks: 25,000 blocks at most"
    monkeypatch.setattr(parts, "SHARD_BYTES", 32 * 8 * 2 * 256)
    assert width(1e9) == 256, "a shard of 8 entries of 2 bytes for 32 tokens"


def auto(lab: Lab, **changes: Any) -> Any:
    return lab.workspace(corpus__blocks_per_part=None, **changes)


def test_the_width_is_decided_once(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "sized", lambda *_: 4)
    info = auto(lab).prepare()
    assert info.blocks_per_part == 4 == info.identity["blocks_per_part"]
    monkeypatch.setattr(parts, "sized", lambda *_: 8)
    assert auto(lab).prepare() == info and auto(lab).prepared() == info
    assert lab.workspace(corpus__blocks_per_part=4).prepared() == info
    with pytest.raises(StaleCache, match="blocks_per_part"):
        lab.workspace(corpus__blocks_per_part=8).prepared()
    added = {"domain": "z", "format": "jsonl", "path": f"{lab.root}/held.jsonl"}
    lab.config["corpus"]["sources"].append(added)
    grown, more = append_sources(auto(lab))
    assert more and auto(lab).prepared() == grown
    assert grown.blocks_per_part == 4 and grown.blocks > info.blocks


def test_a_killed_preparation_keeps_its_width(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    from stages import packing

    monkeypatch.setattr(parts, "sized", lambda *_: 4)
    real, count = packing.write_part, 0

    def killed(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(packing, "write_part", killed)
    with pytest.raises(KeyboardInterrupt):
        auto(lab).prepare()
    begun = load_begun(lab.root / "run/corpus")
    assert begun is not None and begun[0]["blocks_per_part"] == 4
    monkeypatch.setattr(packing, "write_part", real)
    monkeypatch.setattr(parts, "sized", lambda *_: 16)
    assert auto(lab).prepare().blocks_per_part == 4
    whole = lab.workspace(corpus__blocks_per_part=4, corpus_dir=f"{lab.root}/whole").prepare()
    assert auto(lab).prepared().fingerprint == whole.fingerprint


def test_a_calibration_of_another_device_sizes_the_parts(lab: Lab) -> None:
    """The machine that prepares may have no GPU; a plan of this machine does not take it."""
    work = auto(lab, cluster={"part_minutes": 1, "tasks": 1})
    entries = {
        f"teachers.{name}": calibration.Measured(
            calibration.teacher_identity(work, name), "a fast GPU", True, 1, rate, 1, 0, {}
        )
        for name, rate in (("one", 100.0), ("two", 2.2))
    }
    calibration.save(work, entries)
    assert Pace(work, Device()).measured("teachers.two") is None
    assert work.prepare().blocks_per_part == 4, "132 tokens"


def test_a_launch_tells_the_job_that_prepares(lab: Lab, cli: Cli) -> None:
    """It is sized for the cluster's GPUs; parts that were sized are nobody's fault."""
    cluster = {"flops": 3e4, "task_minutes": 1e6, "part_minutes": 0.1}
    config = lab.write(cluster=cluster, corpus__blocks_per_part=None)
    result = cli("launch", "slurm", config, "--cache-only")
    assert result.exit_code == 0, result.output
    script = (lab.root / "run/launch/prepare.sbatch").read_text()
    assert "prepare --set corpus.blocks_per_part=1 " in script
    auto(lab, cluster=cluster).prepare()
    result = cli("launch", "slurm", config, "--cache-only")
    assert "parts of about" in result.output and "blocks_per_part" not in result.output
