"""What is launched: batch scripts, manifests, a local pool; and what status makes of their logs."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Lab, digests
from jsonschema import Draft202012Validator

from pipeline.launch.logs import failed_tasks
from pipeline.launch.options import Resources

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
    assert "srun ${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK} " in made["train"]
    assert made["evaluate"].index(" evaluate ") < made["evaluate"].index(" report ")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("3", 180), ("2:30", 150), ("1:00:05", 3605), ("1-2", 93600), ("1-2:03", 93780), ("0", None)],
)
def test_time_is_read_as_slurm_reads_it(text: str, seconds: int | None) -> None:
    assert Resources(time=text).seconds == seconds


@pytest.mark.parametrize("restart", [1, 2])
def test_a_signal_during_the_setup_is_not_lost(
    lab: Lab, cli: Cli, tmp_path: Path, restart: int
) -> None:
    """The script itself, with a setup that is preempted: the work is told once there is any. It is
    requeued but for so often."""
    lab.workspace().prepare()
    fake = tmp_path / "scontrol"
    fake.write_text(
        '#!/bin/sh\necho "scontrol $*"; kill -9 $PPID\n'
    )  # as a requeue ends the script
    fake.chmod(0o755)
    command = "python3 -c 'import signal as s; s.sigtimedwait([s.SIGUSR1], 20); exit(75)'"
    cluster = {"tasks": 1, "restarts": 2, "setup": ["kill -USR1 $$"], "command": command}
    assert cli("launch", "slurm", lab.write(cluster=cluster), "--cache-only").exit_code == 0
    text = scripts(lab)["cache-one"]
    done = subprocess.run(
        ["bash", "-c", text], capture_output=True, text=True, timeout=15,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7",
             "SLURM_RESTART_COUNT": str(restart)},
    )  # fmt: skip
    assert "why=USR1" in done.stdout and ("scontrol requeue 7" in done.stdout) == (restart < 2)
    assert ("[scholiast] spent" in done.stdout and done.returncode == 75) == (restart == 2)


def test_paths_may_have_spaces_and_percent_signs(lab: Lab, cli: Cli) -> None:
    lab.workspace().prepare()
    folder = lab.root / "my 100% run"
    (lab.root / "run").rename(folder)
    config = lab.write(cluster={"tasks": 1}, run_dir=str(folder))
    assert cli("launch", "slurm", config, "--cache-only").exit_code == 0
    text = (folder / "launch/cache-one.sbatch").read_text()
    assert f"--output='{lab.root}/my 100%% run/launch/logs/cache-one-%A_%a.out'" in text


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
    result = cli("launch", "slurm", lab.write(cluster={"flops": 1.0, "defaults": {"time": "3"}}))
    assert "told to save before it has finished a part" in result.output
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
        ({"train": {"time": "2"}, "warning": 120}, "is not longer than warning"),
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


def test_nothing_is_submitted_after_a_job_that_has_failed_already(
    lab: Lab, cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One task of the queued array 7 has failed: what waits for it would be removed."""
    lab.workspace().prepare()
    queue = 'case "$*" in *%K*) echo 7_1;; *) echo 7;; esac'
    for name, body in (("sbatch", 'echo "8;x"; echo "$*" >> calls'), ("squeue", queue)):
        (tmp_path / name).write_text(f"#!/bin/sh\ncd {tmp_path}; {body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    logs = lab.root / "run/launch/logs"
    logs.mkdir(parents=True)
    (logs.parent / "jobs.json").write_text('{"cache-one": "7"}')
    config = lab.write(cluster={"tasks": 2})
    (logs / "cache-one-7_1.out").write_text("[scholiast] begin\n")
    result = cli("launch", "slurm", config, "--submit")
    assert "cache-one: job 7 is in the queue already" in result.output
    assert "evaluate: job 8 submitted" in result.output
    assert (tmp_path / "calls").read_text().count("afterok:7") == 1, "the training"
    (logs.parent / "jobs.json").write_text('{"cache-one": "7"}')
    (logs / "cache-one-7_0.out").write_text("[scholiast] begin\n[scholiast] end code=1\n")
    result = cli("launch", "slurm", config, "--submit")
    assert "cache-two: job 8 submitted" in result.output
    for step in ("train", "evaluate"):
        assert f"{step}: not submitted, for a task of job 7 has failed" in result.output


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


@pytest.mark.long
def test_a_local_pool_does_what_one_process_does(lab: Lab, cli: Cli) -> None:
    config = lab.write(corpus__blocks_per_part=8, store__chunk_tokens=256)
    result = cli("launch", "local", config, "--workers", 2)
    assert result.exit_code == 0, result.output
    alone = lab.workspace(
        cache_dir=f"{lab.root}/alone", corpus__blocks_per_part=8, store__chunk_tokens=256
    )
    alone.cache_teachers()
    assert digests(lab.root / "run/cache") == digests(lab.root / "alone")


def test_a_pool_that_leaves_parts_does_not_call_the_cache_complete(
    lab: Lab, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.launch.local.run_pool", lambda *_: None)
    result = cli("launch", "local", lab.write(), "--workers", 1)
    assert result.exit_code == 1 and "parts are not finished" in result.output


@pytest.mark.long
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
        ("[scholiast] begin\n[scholiast] end code=75 why=USR1\n[scholiast] spent: 50 times\n", 75,
         "cluster.restarts", "cluster.teachers.one.time"),
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


@pytest.mark.parametrize("end", ["", "[scholiast] end code=138 why=USR1\n"])
def test_what_is_queued_has_not_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    monkeypatch.setattr("pipeline.launch.logs._queued", lambda: {"7_3"})
    (tmp_path / "cache-one-7_3.out").write_text(f"[scholiast] begin\n{end}")
    (tmp_path / "local-0.out").write_text(end)  # a worker of a pool is in no queue
    assert failed_tasks(tmp_path, {"cache-one"}) == []
    monkeypatch.setattr("pipeline.launch.logs._queued", set)
    assert [one.task for one in failed_tasks(tmp_path, {"cache-one"})] == ["7_3"]


def test_the_evaluation_waits_for_the_caches_where_nothing_is_trained(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.launch import steps

    lab.workspace().prepare()
    real = steps.make_plan

    def trained(work: Any, flops: float) -> Any:
        rows, *rest = real(work, flops)
        return [row for row in rows if not row.step.startswith("train ")], *rest

    monkeypatch.setattr(steps, "make_plan", trained)
    lab.config["cluster"] = {"tasks": 1}
    *caches, evaluate = steps.missing_steps(lab.workspace())[0]
    assert evaluate.after == tuple(step.name for step in caches) != ()
