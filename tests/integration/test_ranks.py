"""One training on any number of ranks: the same curve, through kills, signals and other numbers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import Lab, made_once
from safetensors.torch import load_file

STEPS = 20
SIGNALLED = 75
Ends = list[tuple[int, str]]


@pytest.fixture(scope="module")
def lab_of_caches(cached_parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Caches of two teachers, shared by the processes that pytest runs on; each trains elsewhere."""
    return Lab(made_once(tmp_path_factory, "ranks", partial(shutil.copytree, cached_parts)))


def configure(lab: Lab, name: str = "ranks.yaml", **changes: Any) -> Path:
    options: dict[str, Any] = {
        "corpus_dir": f"{lab.root}/run/corpus", "cache_dir": f"{lab.root}/run/cache",
        "train__steps": STEPS, "train__batch_blocks": 1, "train__accumulate": 4,
        "train__eval_every": 10, "train__checkpoint_every": 3, "train__precision": "fp32",
    }  # fmt: skip
    return lab.write(name, **{**options, **changes})


def played_once(lab: Lab, factory: pytest.TempPathFactory, which: str) -> dict[str, Any]:
    """What every training of rank_runs.py came to, all from one process."""

    def make(folder: Path) -> None:
        told = play(configure(lab), lab.root / "ranks", which)
        folder.mkdir()
        (folder / "played.json").write_text(told)

    text = (made_once(factory, f"played-{which}", make) / "played.json").read_text()
    found: dict[str, Any] = json.loads(text)
    return found


@pytest.fixture(scope="module")
def played(lab_of_caches: Lab, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return played_once(lab_of_caches, tmp_path_factory, "main")


@pytest.fixture(scope="module")
def played_more(lab_of_caches: Lab, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return played_once(lab_of_caches, tmp_path_factory, "more")


def play(config: Path, folder: Path, which: str) -> str:
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, here / "rank_runs.py", config, folder, which],
        capture_output=True, text=True, timeout=600, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(here)])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def folder(lab_of_caches: Lab) -> Path:
    return lab_of_caches.root / "ranks"


def curve(folder: Path) -> list[dict[str, Any]]:
    path = folder / "students/fused/metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def codes(ends: Ends) -> list[int]:
    return [code for code, _ in ends]


def require_same_curve(
    found: Path, expected: Path, tolerance: float = 1e-5, steps: int = STEPS
) -> None:
    """Every row of `found` is the other's, up to rounding."""
    mine, theirs = curve(found), curve(expected)
    assert [row["step"] for row in mine] == list(range(steps + 1))
    for a, b in zip(mine[1:], theirs[1:], strict=True):
        for key in ("total", "ce", "kd", "features", "grad_norm"):
            assert a[key] == pytest.approx(b[key], abs=tolerance), (found.name, a["step"], key)
        assert (a["rows"], a["tokens"], a["lr"]) == (b["rows"], b["tokens"], b["lr"])
        for domain, weights in b["weights"].items():
            assert a["weights"][domain] == pytest.approx(weights, abs=1e-6)
    for a, b in zip(mine, theirs, strict=True):
        assert ("heldout" in a) == ("heldout" in b) == (a["step"] in (0, 10, steps))
        for domain, values in b.get("heldout", {}).items():
            assert a["heldout"][domain]["rows"] == values["rows"]
            for key in ("ce", "kd"):
                assert a["heldout"][domain][key] == pytest.approx(values[key], abs=tolerance)


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_two_ranks_give_the_curve_of_one(played: dict[str, Any], folder: Path, name: str) -> None:
    """With accumulation, two teachers and feature alignment, in float32."""
    assert codes(played["one"]["all"]) == [0] and codes(played[name]["all"]) == [0, 0]
    rows = curve(folder / "one")
    assert rows[1]["features"] > 0.1 and rows[STEPS]["total"] < 0.95 * rows[1]["total"]
    require_same_curve(folder / name, folder / "one")


@pytest.mark.long
def test_gram_matrices_are_of_the_same_micro_batches(
    played_more: dict[str, Any], folder: Path
) -> None:
    assert codes(played_more["gram"]["all"]) == [0, 0] and codes(
        played_more["gram_one"]["all"]
    ) == [0]
    assert curve(folder / "gram_one")[1]["features"] > 1e-4
    require_same_curve(folder / "gram", folder / "gram_one", steps=4)
    assert codes(played_more["gram_cut"]["all"]) == [2, 2]
    assert all("take whole micro-batches" in text for _, text in played_more["gram_cut"]["all"])


@pytest.mark.long
def test_frozen_projections_are_the_same_on_all_ranks(
    played_more: dict[str, Any], folder: Path
) -> None:
    """Two ranks, sharded; one killed after a checkpoint; the rest by one process."""
    assert codes(played_more["frozen"]["killed"]) == [1, -signal.SIGKILL]
    assert "going on from step 3" in played_more["frozen"]["rest"][0][1]
    assert codes(played_more["frozen_one"]["all"]) == [0]
    require_same_curve(folder / "frozen", folder / "frozen_one", steps=4)


def test_what_is_exported_is_the_same_model(played: dict[str, Any], folder: Path) -> None:
    models = [
        load_file(folder / name / "students/fused/model/model.safetensors")
        for name in ("one", "ddp", "fsdp", "killed", "moved", "told")
    ]
    for other in models[1:]:
        assert other.keys() == models[0].keys()
        for name, value in models[0].items():
            assert other[name].shape == value.shape
            # AdamW divides by the root of small numbers: rounding grows there, but not far.
            assert float((other[name] - value).abs().max()) < 2e-3, name


@pytest.mark.long
def test_sharded_bf16_with_checkpointed_layers(played_more: dict[str, Any], folder: Path) -> None:
    """Layers gathered as bfloat16 follow autocast in one process, up to bfloat16's rounding."""
    assert codes(played_more["lean"]["all"]) == [0, 0] and codes(
        played_more["lean_one"]["all"]
    ) == [0]
    require_same_curve(folder / "lean", folder / "lean_one", tolerance=2e-2, steps=4)


def test_killed_and_resumed_on_other_numbers_of_ranks(played: dict[str, Any], folder: Path) -> None:
    """1 (killed) → 2 sharded (one rank killed) → 2 replicated; 2 (one killed) → 1."""
    killed, moved = played["killed"], played["moved"]
    assert codes(killed["one"]) == [-signal.SIGKILL]
    (code, text), (other, _) = killed["fsdp"]
    assert other == -signal.SIGKILL and code == 1, "the rank that was left ends, too"
    assert "another rank is gone" in text and "going on from step" in text
    assert codes(killed["ddp"]) == [0, 0] and "going on from step" in killed["ddp"][0][1]
    assert codes(moved["ddp"]) == [1, -signal.SIGKILL] and codes(moved["one"]) == [0]
    assert "going on from step" in moved["one"][0][1]
    for name in ("killed", "moved"):
        require_same_curve(folder / name, folder / "one")


def test_signals_save_and_end_all_ranks_together(played: dict[str, Any], folder: Path) -> None:
    """SIGUSR1 to one rank of two, SIGTERM to both, SIGTERM to one process; then to the end."""
    told = played["told"]
    for name, ranks, wanted in (
        ("usr1", 2, "stopped by SIGUSR1 after step 5 of 20"),
        ("term", 2, "stopped by SIGTERM after step 9 of 20"),
        ("alone", 1, "stopped by SIGTERM after step 12 of 20"),
    ):
        assert codes(told[name]) == [SIGNALLED] * ranks
        assert wanted in told[name][0][1] and "run the same command again" in told[name][0][1]
        assert all(text == "" for _, text in told[name][1:]), "one rank speaks for all"
    assert told["saved"] == "step-00000005"
    assert "going on from step 12" in told["rest"][0][1] and codes(told["rest"]) == [0]
    require_same_curve(folder / "told", folder / "one")


def test_a_damaged_checkpoint_is_refused_by_all(played: dict[str, Any]) -> None:
    for name, ranks in (("two", 2), ("one", 1)):
        ends = played["damaged"][name]
        assert codes(ends) == [1] * ranks
        assert all("bytes that were not written there" in text for _, text in ends)
        assert all("rank-00001.safetensors" in text for _, text in ends)


@pytest.mark.long
def test_an_error_on_one_rank_ends_all_with_its_text(played_more: dict[str, Any]) -> None:
    ends = played_more["corrupt"]["two"]
    assert codes(ends) == [1, 1] and all("sha256 is not the one" in text for _, text in ends)
    assert sum("failed: a shard" in text for _, text in ends) == 1, "only one rank reads that shard"


@pytest.mark.long
@pytest.mark.parametrize("name", ["first", "second"])
def test_a_computation_that_fails_ends_all_with_its_text(
    played_more: dict[str, Any], name: str
) -> None:
    """The other rank waits in a collective, finds the connection closed and is told why."""
    ends = played_more["failed"][name]
    assert codes(ends) == [1, 1]
    failing = name == "second"
    assert "MemoryError: nothing is left" in ends[failing][1]
    assert f"rank {int(failing)} failed: MemoryError: nothing is left" in ends[not failing][1]


@pytest.mark.long
def test_a_disk_full_on_one_rank_leaves_the_earlier_checkpoint(played_more: dict[str, Any]) -> None:
    ends = played_more["full"]["two"]
    assert codes(ends) == [1, 1] and all("the disk is full" in text for _, text in ends)
    assert played_more["full"]["latest"] == "step-00000003"


def test_steps_that_do_not_come_out_even_are_refused(played: dict[str, Any]) -> None:
    ends = played["uneven"]["three"]
    assert codes(ends) == [2, 2, 2]
    assert all("set train.accumulate to a multiple of 3" in text for _, text in ends)


def test_rows_tell_speed_wait_and_memory(played: dict[str, Any], folder: Path) -> None:
    for name in ("one", "ddp"):
        for row in curve(folder / name)[1:]:
            assert 0.0 <= row["data_wait"] < 1.0 and row["peak_bytes"] > 10_000_000
            assert row["tokens_per_s"] > 0


@pytest.mark.long
def test_torchrun_passes_the_signal_on(lab_of_caches: Lab) -> None:
    """The documented command: torchrun, told by SIGUSR1, lets its ranks save."""
    root = lab_of_caches.root
    config = configure(lab_of_caches, "torchrun.yaml", run_dir=f"{root}/run2", train__steps=100_000)
    process = subprocess.Popen(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            "--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1", "-m", "pipeline.cli", "train-student",
            config,
        ],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    metrics, deadline = root / "run2/students/fused/metrics.jsonl", time.monotonic() + 180
    try:
        while not (metrics.exists() and len(metrics.read_text().splitlines()) > 2):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGUSR1)
        output, _ = process.communicate(timeout=120)
    finally:
        process.terminate()
    assert "stopped by SIGUSR1 after step" in output
    latest = (root / "run2/students/fused/checkpoints/latest").read_text()
    assert f"after step {int(latest.rsplit('-', 1)[1])} of" in output
    assert process.returncode == 1  # torchrun's own
