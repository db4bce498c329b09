"""What is launched: batch scripts, manifests, a local pool; and what status makes of their logs."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Lab, digests
from jsonschema import Draft202012Validator

from pipeline.launch.logs import failed_tasks

Cli = Callable[..., Any]

CLUSTER = {
    "defaults": {"partition": "gpu", "account": "lab", "time": "8:00:00", "gpus": 1},
    "teachers": {"two": {"partition": "large", "gpus": 4, "memory": "200G", "extra": ["--exclusive"]}},
    "train": {"nodes": 2, "ranks": 4, "gpus": 4, "constraint": "h100"},
    "setup": ["module load cuda"], "tasks": 5, "concurrent": 2, "claim": "runs",
}  # fmt: skip


def problems(job: dict[str, Any]) -> list[str]:
    """Returns what Kubernetes' own schema of a Job finds wrong."""
    schema = json.loads(Path(__file__).with_name("job_schema.json").read_text())
    return [error.message for error in Draft202012Validator(schema).iter_errors(job)]


def scripts(lab: Lab) -> dict[str, str]:
    return {p.stem: p.read_text() for p in (lab.root / "run/launch").glob("*.sbatch")}


def test_scripts_ask_for_what_is_configured(lab: Lab, cli: Cli) -> None:
    lab.workspace().prepare()
    config = lab.write(cluster=CLUSTER)
    result = cli("launch", "slurm", config, "--set", "train.lr=1e-3")
    assert result.exit_code == 0, result.output
    made = scripts(lab)
    assert list(made) and set(made) == {"cache-one", "cache-two", "train", "evaluate"}
    for text in made.values():
        assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
        assert "#SBATCH --account=lab" in text and "module load cuda" in text
        assert "--set train.lr=1e-3" in text and "--signal=B:USR1@120" in text
        assert text.index("trap ") < text.index("module load"), "a signal while it sets up is heard"
    one, two = made["cache-one"], made["cache-two"]
    assert "--array=0-4%2" in one and "--partition=gpu" in one and "--gpus-per-node=1" in one
    assert "--teacher one" in one and "--exclusive" not in one
    for flag in ("--partition=large", "--gpus-per-node=4", "--mem=200G", "--exclusive"):
        assert f"#SBATCH {flag}" in two
    assert "--nodes=2 --ntasks-per-node=4" in made["train"] and "--constraint=h100" in made["train"]
    assert "srun ${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK}" in made["train"]
    assert made["evaluate"].index(" evaluate ") < made["evaluate"].index(" report ")


def test_an_image_is_entered_by_apptainer(lab: Lab, cli: Cli) -> None:
    lab.workspace().prepare()
    cluster = {"defaults": {"image": "scholiast.sif", "gpus": 1}, "tasks": 1}
    assert cli("launch", "slurm", lab.write(cluster=cluster), "--cache-only").exit_code == 0
    assert "apptainer exec --nv --bind " in scripts(lab)["cache-one"]
    assert "scholiast.sif scholiast cache-teachers" in scripts(lab)["cache-one"]


def test_tasks_come_from_the_plan(lab: Lab, cli: Cli) -> None:
    """A teacher of known parameters at a known rate; never more tasks than parts or the array allows."""
    lab.workspace().prepare()
    parts = lab.workspace().looked_at()[0].parts

    def tasks(**cluster: object) -> int:
        result = cli("launch", "slurm", lab.write(cluster=cluster), "--cache-only")
        assert result.exit_code == 0 and f"{parts} parts of about" in result.output
        array = scripts(lab)["cache-one"].split("--array=0-")[1].split()[0]
        return int(array) + 1

    assert tasks() == 1
    assert tasks(flops=1.0) == parts
    assert tasks(flops=1.0, max_array=3) == 3
    some = tasks(flops=1e4)
    assert 1 < some < parts and tasks(flops=1e4, task_minutes=120) < some


def test_unprepared_a_job_prepares_first(lab: Lab, cli: Cli) -> None:
    result = cli("launch", "slurm", lab.write(cluster={"tasks": 2}))
    assert result.exit_code == 0
    assert set(scripts(lab)) == {"prepare", "cache-one", "cache-two", "train", "evaluate"}


@pytest.mark.parametrize(
    ("cluster", "told"),
    [
        ({"teachers": {"three": {}}}, "names no teacher"),
        ({"partitoin": "x"}, "unknown key"),
        ({"defaults": {"time": "soon"}}, "cluster.defaults.time"),
    ],
)
def test_the_section_is_strict(lab: Lab, cli: Cli, cluster: dict[str, Any], told: str) -> None:
    result = cli("launch", "slurm", lab.write(cluster=cluster))
    assert result.exit_code == 2 and told in result.output


def test_without_slurm_submitting_is_refused(
    lab: Lab, cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lab.workspace().prepare()
    monkeypatch.setenv("PATH", str(tmp_path))
    result = cli("launch", "slurm", lab.write(cluster={"tasks": 1}), "--submit")
    assert result.exit_code == 2 and "no sbatch here" in result.output


def test_manifests_are_jobs_as_kubernetes_wants_them(lab: Lab, cli: Cli) -> None:
    lab.workspace().prepare()
    cluster = {**CLUSTER, "train": {"ranks": 2}}
    cluster["defaults"] = {"image": "registry/scholiast:1", "gpus": 1, "memory": "64G", "cpus": 8}
    result = cli("launch", "kubernetes", lab.write(cluster=cluster), "--dry-run", "--quiet")
    assert result.exit_code == 0, result.output
    jobs = {job["metadata"]["labels"]["step"]: job for job in yaml.safe_load_all(result.stdout)}
    assert set(jobs) == {"cache-one", "cache-two", "train", "evaluate"}
    for job in jobs.values():
        assert problems(job) == []
    spec = jobs["cache-two"]["spec"]
    assert (spec["completions"], spec["parallelism"], spec["completionMode"]) == (5, 2, "Indexed")
    container = spec["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"] == {
        "cpu": "8", "memory": "200Gi", "nvidia.com/gpu": "4"
    }  # fmt: skip
    assert {"name": "SCHOLIAST_TASKS", "value": "5"} in container["env"]
    assert "torchrun --standalone --nproc-per-node 2" in str(jobs["train"])
    spec["completons"] = spec.pop("completions")
    assert problems(jobs["cache-two"]), "the schema refuses what is misspelt"


def test_a_pod_needs_an_image(lab: Lab, cli: Cli) -> None:
    lab.workspace().prepare()
    result = cli("launch", "kubernetes", lab.write(cluster={"tasks": 1}), "--dry-run")
    assert result.exit_code == 2 and "a pod needs an image" in result.output


def test_a_local_pool_does_what_one_process_does(lab: Lab, cli: Cli) -> None:
    config = lab.write(corpus__blocks_per_part=8, store__chunk_tokens=256)
    result = cli("launch", "local", config, "--workers", 2)
    assert result.exit_code == 0, result.output
    alone = lab.workspace(
        cache_dir=f"{lab.root}/alone", corpus__blocks_per_part=8, store__chunk_tokens=256
    )
    alone.cache_teachers()
    assert digests(lab.root / "run/cache") == digests(lab.root / "alone")


def test_a_failed_worker_is_shown_with_the_end_of_its_log(lab: Lab, cli: Cli) -> None:
    config = lab.write()
    lab.workspace().prepare()
    shard = next((lab.root / "run/corpus/blocks").glob("*.arrow"))
    shard.write_bytes(b"x" + shard.read_bytes()[1:])
    result = cli("launch", "local", config, "--workers", 1)
    assert result.exit_code == 1 and "1 of 1 tasks failed" in result.output
    assert "bytes that were not written there" in result.output
    rows = {row["step"]: row for row in json.loads(cli("status", config, "--json").output)}
    assert rows["cache one"]["failed"] == 1
    [ended] = rows["cache one"]["failed_tasks"]
    assert (ended["task"], ended["code"]) == ("local-0", 1)
    assert "bytes that were not written there" in cli("status", config).output


@pytest.mark.parametrize(
    ("text", "code", "reason", "todo"),
    [
        ("[scholiast] begin\n[scholiast] end code=0 why=none\n", None, None, None),
        ("[scholiast] begin\n[scholiast] end code=75 why=USR1\n", None, None, None),
        ("[scholiast] begin\n[scholiast] end code=1\n[scholiast] begin\n", None, "without a word",
         "again"),
        ("[scholiast] begin\n[scholiast] end code=137 why=none\n", 137, "signal 9", "batch_blocks"),
        ("[scholiast] begin\nslurmstepd: error: Detected 1 oom_kill event in StepId=7.batch.\n"
         "[scholiast] end code=137 why=none\n", 137, "out of memory", "cluster.teachers.one.memory"),
        ("[scholiast] begin\nslurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026-01-02T03:04:05 DUE"
         " TO TIME LIMIT ***\n", None, "due to time limit", "again"),
        ("[scholiast] begin\nerror: no GPU is visible\n[scholiast] end code=2 why=none\n", 2,
         "exit code 2", "mend"),
    ],
)  # fmt: skip
def test_logs_tell_why_a_task_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, code: int | None,
    reason: str | None, todo: str | None,
) -> None:  # fmt: skip
    monkeypatch.setattr("pipeline.launch.logs._queued", set)
    (tmp_path / "cache-one-6_0.out").write_text("[scholiast] end code=1\n")  # an earlier launch
    (tmp_path / "cache-one-7_3.out").write_text(text)
    (tmp_path / "train-5.out").write_text("[scholiast] end code=1\n")  # of a finished step
    found = failed_tasks(tmp_path, {"cache-one"})
    if reason is None:
        assert found == []
        return
    [ended] = found
    assert (ended.step, ended.task, ended.code) == ("cache-one", "7_3", code)
    assert reason in ended.reason and todo is not None and todo in ended.todo
    assert ended.tail == tuple(text[text.rfind("[scholiast] begin") :].splitlines())


def test_what_is_queued_has_not_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.launch.logs._queued", lambda: {"7_3"})
    (tmp_path / "cache-one-7_3.out").write_text("[scholiast] begin\n")
    assert failed_tasks(tmp_path, {"cache-one"}) == []
