"""Which of how many tasks this process is: from the command line, or from what started it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from storage.errors import ConfigError


@dataclass(frozen=True)
class Task:
    """A task's place.

    Attributes:
        index, count: the I-th of N, from 0.
        source: what told so.
        job: the scheduler's name of this task, the same after a requeue; None without a scheduler.
    """

    index: int
    count: int
    source: str
    job: str | None


def find_task(task: int | None, tasks: int | None, env: Mapping[str, str]) -> Task | None:
    """Returns this process's task; None if neither option nor environment tells of any.

    Explicit options win. A missing one is taken from the environment: a Slurm array
    (SLURM_ARRAY_TASK_ID, _MIN, _STEP, _COUNT), a Kubernetes indexed Job (JOB_COMPLETION_INDEX, with
    --tasks or SCHOLIAST_TASKS), torchrun (RANK, WORLD_SIZE > 1); in this order.

    Raises:
        ConfigError: no such task, or only half of what is needed is known.
    """
    index, count, source = _of_environment(env)
    if task is not None or tasks is not None:
        source = "--task and --tasks" if None not in (task, tasks) else f"options and {source}"
    index = index if task is None else task
    count = count if tasks is None else tasks
    if index is None and count is None:
        return None
    if index is None or count is None:
        raise ConfigError(
            "the task is only half known", where="--task, --tasks",
            expected="which of how many tasks this is", found=f"task {index} of {count}",
            todo="give both options, or run under a scheduler that sets them",
        )  # fmt: skip
    if not 0 <= index < count:
        raise ConfigError(
            "there is no such task", where="--task", expected=f"0 to {count - 1}", found=index,
            todo="count from 0",
        )  # fmt: skip
    job = job_name(env)  # several tasks may run in one job
    return Task(index, count, source, job and f"{job}.{index}of{count}")


def _of_environment(env: Mapping[str, str]) -> tuple[int | None, int | None, str]:
    array = _number(env, "SLURM_ARRAY_TASK_ID")
    if array is not None:
        first, step = _number(env, "SLURM_ARRAY_TASK_MIN"), _number(env, "SLURM_ARRAY_TASK_STEP")
        count = _number(env, "SLURM_ARRAY_TASK_COUNT")
        return (array - (first or 0)) // (step or 1), count, "the Slurm array"
    pod = _number(env, "JOB_COMPLETION_INDEX")
    if pod is not None:
        return pod, _number(env, "SCHOLIAST_TASKS"), "the Kubernetes Job"
    rank, world = _number(env, "RANK"), _number(env, "WORLD_SIZE")
    if rank is not None and world is not None and world > 1:
        return rank, world, "torchrun"
    return None, None, "the environment"


def job_name(env: Mapping[str, str]) -> str | None:
    """Returns the scheduler's name of this task: a requeued one, or a pod's successor, has the same."""
    name = env.get("SCHOLIAST_JOB") or env.get("SLURM_ARRAY_JOB_ID") or env.get("SLURM_JOB_ID")
    if not name:
        return None
    inner = ("SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX", "SLURM_PROCID", "RANK")
    return ".".join([name, *(env.get(key, "-") for key in inner)])


def _number(env: Mapping[str, str], key: str) -> int | None:
    text = env.get(key, "")
    return int(text) if text.isdecimal() else None
