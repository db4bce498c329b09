"""The `cluster` section of a configuration: what jobs ask for, and how long tasks should take."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator

from stages.options import Count, Options, Positive


class Resources(Options):
    """What one job, or one task of an array, asks for. What is not given is left to the scheduler."""

    partition: str | None = Field(None, description="Slurm partition (or several, by commas).")
    account: str | None = Field(None, description="Slurm account.")
    qos: str | None = Field(None, description="Slurm quality of service.")
    constraint: str | None = Field(None, description="Slurm features of the nodes.")
    gpus: Annotated[int, Field(ge=0)] | None = Field(None, description="GPUs (of a node).")
    cpus: Count | None = Field(None, description="CPU cores of a task or rank.")
    memory: str | None = Field(
        None, pattern=r"^\d+[KMGT]?$", description="Memory of a node, e.g. 64G; without a unit MB."
    )
    time: str | None = Field(
        None, pattern=r"^(\d+-)?\d+(:\d+){0,2}$",
        description="Time limit as Slurm writes it: minutes, hours:minutes:seconds, days-hours.",
    )  # fmt: skip
    image: str | None = Field(
        None, description="Container image: a file for Apptainer, a name for Kubernetes."
    )
    extra: tuple[str, ...] = Field((), description="More #SBATCH options, e.g. --reservation=x.")

    @property
    def seconds(self) -> int | None:
        """`time` in seconds; None where there is no limit (Slurm takes 0 for none)."""
        if self.time is None:
            return None
        days, dash, rest = self.time.rpartition("-")
        numbers = [int(one) for one in rest.split(":")]
        units = (3600, 60, 1) if dash or len(numbers) == 3 else (60, 1)
        first = sum(a * b for a, b in zip(numbers, units, strict=False))
        return int(days or 0) * 86400 + first or None

    def over(self, other: Resources) -> Resources:
        """Returns these laid over others: what is given here wins."""
        return other.model_copy(update=self.model_dump(exclude_unset=True))


class TrainResources(Resources):
    """What stage two asks for."""

    nodes: Count = Field(1, description="Nodes.")
    ranks: Count | None = Field(None, description="Ranks of a node; its GPUs, or 1, if not given.")


class ClusterOptions(Options):
    """How a run is laid out on a cluster; decides nothing about its results."""

    defaults: Resources = Resources()
    prepare: Resources = Resources()
    teachers: dict[str, Resources] = {}
    train: TrainResources = TrainResources()
    evaluate: Resources = Resources()
    setup: tuple[str, ...] = Field(
        (), description="Shell lines before each command, e.g. module load cuda."
    )
    command: str | None = Field(
        None, description="How a job calls scholiast; if not given, as the launching one runs."
    )
    tasks: Count | None = Field(None, description="Tasks of a teacher; from the plan if not given.")
    task_minutes: Positive = Field(
        60.0, description="How long a task should take, without `tasks`."
    )
    part_minutes: Positive = Field(
        5.0,
        description="How long a part should take the slowest teacher, where corpus.blocks_per_part is "
        "not given.",
    )
    flops: Positive = Field(
        3e14, description="bf16 FLOP/s of a task's GPUs, for plans before a part was measured."
    )
    concurrent: Count | None = Field(None, description="Tasks of an array that run at once.")
    max_array: Count = Field(1000, description="Most tasks of an array (Slurm's MaxArraySize - 1).")
    warning: Count = Field(
        120, description="Seconds before the time limit at which jobs are told to save."
    )
    restarts: Annotated[int, Field(ge=0)] = Field(
        50, description="How often a job requeues itself; more, and it is not getting on."
    )
    claim: str = Field(
        "scholiast", description="Kubernetes: the volume claim that all pods share, mounted at the "
        "folder of the launch.",
    )  # fmt: skip
    lease: Positive = Field(
        120.0, description="Seconds without a sign of life after which a task's parts are others'."
    )
    grace: Annotated[float, Field(ge=0.0)] = Field(
        30.0,
        description="Seconds a part may still take once a signal has come; else it is dropped.",
    )

    @model_validator(mode="after")
    def _saving_fits(self) -> Self:
        all_of_them = (
            self.defaults,
            self.prepare,
            *self.teachers.values(),
            self.train,
            self.evaluate,
        )
        for resources in all_of_them:
            if resources.seconds is not None and resources.seconds <= self.warning:
                raise ValueError(
                    f"time {resources.time} is not longer than warning ({self.warning} s): jobs would "
                    "only save and be requeued"
                )
        return self

    @field_validator("setup")
    @classmethod
    def _lines(cls, lines: tuple[str, ...]) -> tuple[str, ...]:
        if any("\n" in line for line in lines):
            raise ValueError("a line a list item")
        return lines
