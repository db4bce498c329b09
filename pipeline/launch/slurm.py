"""Slurm: one readable batch script a step, an array for each teacher, dependencies at submission.

Signals, in every script: USR1 (ahead of the time limit, or a polite preemption) is passed to the work,
which saves and ends with 75, and the job requeues itself. TERM (scancel, or preemption without a
warning) is passed on too, but the script then waits to be killed: so Slurm requeues a preempted job,
and a cancelled one stays cancelled.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from pathlib import Path

from pipeline.launch.logs import failed_tasks
from pipeline.launch.options import Resources
from pipeline.launch.steps import Call, Step, launch_folder
from pipeline.workspace import Workspace
from storage import durable
from storage.errors import ConfigError, ScholiastError

_FLAGS = {
    "partition": "partition", "account": "account", "qos": "qos", "constraint": "constraint",
    "gpus": "gpus-per-node", "cpus": "cpus-per-task", "memory": "mem", "time": "time",
}  # fmt: skip

_CORES = "${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK}"
"""srun does not take over the job's number of cores since Slurm 22.05."""

_SIGNALS = """\
# USR1: the limit is near, or a polite preemption: save, then requeue. TERM: cancelled or preempted: save,
# then wait to be killed, so that Slurm itself says which of the two it was.
why= pid=
trap 'why=${why:-USR1}; kill -USR1 "$pid" 2>/dev/null' USR1
trap 'why=TERM; kill -USR1 "$pid" 2>/dev/null' TERM

job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
echo "[scholiast] begin job=$job\
 restart=${SLURM_RESTART_COUNT:-0} node=${SLURMD_NODENAME:-?} at $(date +%FT%T)"
"""

_ENDING = """\
pid=$!
# It came during the setup; not at once, for a fork that is no work yet would lose it.
[ -z "$why" ] || { sleep 1; kill -USR1 "$pid" 2>/dev/null; }
while :; do wait "$pid"; code=$?; kill -0 "$pid" 2>/dev/null || break; done
wait "$pid" 2>/dev/null; code=$?
[ "$code" = 0 ] || [ -n "$why" ] || sleep 1  # for a signal that reached the work first
echo "[scholiast] end code=$code why=${why:-none} at $(date +%FT%T)"
case "$code:$why" in
  0:*) exit 0 ;;
  75:USR1 | 138:USR1 | 143:USR1)
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "$restarts" ]; then
      echo "[scholiast] spent: restarted ${SLURM_RESTART_COUNT:-0} times (cluster.restarts)"
      exit 75
    fi
    scontrol requeue "$SLURM_JOB_ID"; sleep 600 & wait $! ;;
  75:TERM | 138:TERM | 143:TERM) while :; do sleep 1; done ;;
esac
exit "$code"
"""


def write_scripts(work: Workspace, steps: list[Step], call: Call) -> dict[str, Path]:
    """Writes a batch script for each step into RUN_DIR/launch; returns their paths by step."""
    folder, paths = launch_folder(work), {}
    for step in steps:
        paths[step.name] = folder / f"{step.name}.sbatch"
        durable.write_bytes(paths[step.name], script(work, step, call, folder).encode())
    return paths


def script(work: Workspace, step: Step, call: Call, folder: Path) -> str:
    """Returns a step's batch script."""
    cluster = work.config.cluster
    what = f"an array of {step.tasks} tasks" if step.tasks else "one job"
    array = "%A_%a" if step.tasks else "%j"
    logs = str(folder / "logs").replace("%", "%%")  # Slurm's own patterns begin so
    head = [
        "#!/bin/bash", f"# {step.name}: {what}. Made by `scholiast launch slurm`; edit and submit it by "
        "hand as you like.",
        f"#SBATCH --job-name={shlex.quote(f'{work.config.name}-{step.name}')}",
        f"#SBATCH --output={shlex.quote(f'{logs}/{step.name}-{array}.out')}",
        "#SBATCH --open-mode=append --requeue --kill-on-invalid-dep=yes",
        f"#SBATCH --signal=B:USR1@{cluster.warning}",
        f"#SBATCH --chdir={shlex.quote(str(call.folder))}",
    ]  # fmt: skip
    if step.tasks:
        limit = f"%{cluster.concurrent}" if cluster.concurrent else ""
        head.append(f"#SBATCH --array=0-{step.tasks - 1}{limit}")
    if step.name == "train":
        head.append(f"#SBATCH --nodes={step.nodes} --ntasks-per-node={step.ranks}")
    head += [f"#SBATCH {flag}" for flag in flags(step.resources)]
    lines = [*head, "", _SIGNALS]
    if step.name == "train":
        lines.append(
            "unset MASTER_ADDR MASTER_PORT  # the submitting shell's; the setup may set them"
        )
    lines += [*cluster.setup, *([""] if cluster.setup else [])]
    calls = [call.text(work, step, command) for command in step.command]
    lines += _ranks(calls[0]) if step.name == "train" else [f"{_in_one(calls)} &"]
    lines.append(f"restarts={cluster.restarts}")
    return "\n".join(lines) + "\n" + _ENDING


def _in_one(calls: list[str]) -> str:
    return calls[0] if len(calls) == 1 else "( " + " && \\\n  ".join(calls) + " )"


def _ranks(call: str) -> list[str]:
    """Returns the lines that start a process a rank: srun passes signals on and exit codes back."""
    ranks = "export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID; exec "
    return [
        'export MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}',
        "export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 12000))}",  # below those for clients
        f"srun {_CORES} --wait=300 bash -c {shlex.quote(ranks + call)} &",
    ]


def flags(resources: Resources) -> list[str]:
    """Returns the sbatch options of what is asked for."""
    values = {flag: getattr(resources, key) for key, flag in _FLAGS.items()}
    named = [f"--{flag}={shlex.quote(str(v))}" for flag, v in values.items() if v is not None]
    return [*named, *resources.extra]


def submit(work: Workspace, steps: list[Step], paths: dict[str, Path]) -> dict[str, str]:
    """Submits what is not queued already, each step after those that it needs.

    What would wait for a job that has a failed task already is not submitted: it would be removed.

    Returns:
        step → what was done, for people.

    Raises:
        ConfigError: there is no Slurm here.
        ScholiastError: Slurm refuses, with its own words.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "there is no sbatch here", where="--submit",
            todo="run this where jobs are submitted, or submit the scripts there by hand",
        )  # fmt: skip
    queued, told = queued_jobs(work), {}
    jobs: dict[str, str] = {}
    doomed = _with_failed_tasks(work, queued)  # step → the job that has failed before it
    for step in steps:
        bad = next((doomed[name] for name in step.after if name in doomed), None)
        if step.name in queued:
            jobs[step.name] = queued[step.name]
            told[step.name] = f"job {jobs[step.name]} is in the queue already"
        elif bad is not None:
            doomed[step.name] = bad
            told[step.name] = (
                f"not submitted, for a task of job {bad} has failed: launch again when it has ended"
            )
        else:
            jobs[step.name] = _submit(step, paths[step.name], jobs)
            told[step.name] = f"job {jobs[step.name]} submitted"
            _remember(work, step.name, jobs[step.name])
    return told


def _submit(step: Step, path: Path, jobs: dict[str, str]) -> str:
    needed = [jobs[name] for name in step.after if name in jobs]
    after = [f"--dependency=afterok:{':'.join(needed)}"] if needed else []
    return _run(["sbatch", "--parsable", *after, str(path)], path).split(";")[0].strip()


def _with_failed_tasks(work: Workspace, queued: dict[str, str]) -> dict[str, str]:
    """Returns which queued jobs have a failed task, by their logs: step → job id."""
    ended = failed_tasks(work.config.run / "launch" / "logs", set(queued))
    failed = {(one.step, one.task.split("_")[0]) for one in ended}
    return {step: job for step, job in queued.items() if (step, job) in failed}


def queued_jobs(work: Workspace) -> dict[str, str]:
    """Returns the steps whose job is still in Slurm's queue: step → job id."""
    known = submitted(work)
    if not known or shutil.which("squeue") is None:
        return {}
    text = _run(["squeue", "--noheader", "--me", "--format=%F"], "squeue")
    waiting = set(text.split())
    return {step: job for step, job in known.items() if job in waiting}


def submitted(work: Workspace) -> dict[str, str]:
    """Returns what was submitted last: step → job id."""
    path = work.config.run / "launch" / "jobs.json"
    try:
        return {str(step): str(job) for step, job in json.loads(path.read_text()).items()}
    except FileNotFoundError:
        return {}


def _remember(work: Workspace, step: str, job: str) -> None:
    path = work.config.run / "launch" / "jobs.json"
    durable.write_bytes(path, json.dumps({**submitted(work), step: job}, indent=1).encode())


def _run(words: list[str], where: object) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ScholiastError(
            f"{words[0]} failed: {done.stderr.strip() or done.stdout.strip()}", where=where,
            todo="mend the `cluster` section or the script, and launch again",
        )  # fmt: skip
    return done.stdout
