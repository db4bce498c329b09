"""Kubernetes: an indexed batch/v1 Job for each teacher, one Job for each later step.

A pod that is told to end (SIGTERM) leaves the part it cannot finish and exits with 75, which counts as
no failure: its index is started again. Kubernetes itself knows no order of Jobs: apply the later ones
when the earlier are complete (`kubectl wait --for=condition=complete`). Run and model folders are on a
volume that all pods share (`cluster.claim`).
"""

from __future__ import annotations

import re
import shlex
from typing import Any

from pipeline.launch.options import Resources
from pipeline.launch.steps import Call, Step
from pipeline.workspace import Workspace
from storage.errors import ConfigError, Stopped

_TRIES = 3  # after a failure that is no signal's


def manifests(work: Workspace, steps: list[Step], call: Call) -> list[dict[str, Any]]:
    """Returns a Job for each step.

    Raises:
        ConfigError: a step has no image, or stage two has several nodes.
    """
    return [_job(work, step, call) for step in steps]


def _job(work: Workspace, step: Step, call: Call) -> dict[str, Any]:
    cluster, resources = work.config.cluster, step.resources
    if resources.image is None:
        raise ConfigError(
            "a pod needs an image", where="cluster.defaults.image",
            todo="build one from pipeline/launch/Dockerfile and name it",
        )  # fmt: skip
    if step.nodes > 1:
        raise ConfigError(
            "a training on several nodes needs more than a plain Job", where="cluster.train.nodes",
            expected=1, found=step.nodes,
            todo="train on one node, or write a JobSet or PyTorchJob that runs torchrun",
        )  # fmt: skip
    name = re.sub(r"[^a-z0-9-]+", "-", f"{work.config.name}-{step.name}".lower()).strip("-")[:52]
    container: dict[str, Any] = {
        "name": "scholiast", "image": resources.image, "workingDir": str(call.folder),
        "command": ["bash", "-c", _line(step, call, cluster.setup, cluster.command)],
        "env": [
            {"name": "SCHOLIAST_JOB", "value": name},
            {"name": "SCHOLIAST_TASKS", "value": str(max(1, step.tasks))},
        ],
        "resources": _resources(resources),
        "volumeMounts": [{"name": "shared", "mountPath": str(call.folder)}],
    }  # fmt: skip
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": cluster.warning,
        "containers": [container],
        "volumes": [{"name": "shared", "persistentVolumeClaim": {"claimName": cluster.claim}}],
    }
    again = {"containerName": "scholiast", "operator": "In", "values": [Stopped.exit_code]}
    rules = [
        {"action": "Ignore", "onExitCodes": again},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]
    spec: dict[str, Any] = {
        "podFailurePolicy": {"rules": rules},
        "template": {"metadata": {"labels": {"app": "scholiast"}}, "spec": pod},
    }
    if step.tasks:
        spec |= {
            "backoffLimitPerIndex": _TRIES,
            "completionMode": "Indexed", "completions": step.tasks,
            "parallelism": min(step.tasks, cluster.concurrent or step.tasks),
        }  # fmt: skip
    else:
        spec["backoffLimit"] = _TRIES
    labels = {"app": "scholiast", "step": step.name}
    return {
        "apiVersion": "batch/v1", "kind": "Job",
        "metadata": {"name": name, "labels": labels}, "spec": spec,
    }  # fmt: skip


def _line(step: Step, call: Call, setup: tuple[str, ...], command: str | None) -> str:
    own = command or "scholiast"
    if step.name == "train" and step.ranks > 1:
        own = (
            f"torchrun --standalone --nproc-per-node {step.ranks} "
            "--signals-to-handle SIGTERM,SIGINT,SIGUSR1 --shutdown-timeout 300 -m pipeline.cli"
        )
    calls = [f"{own} {shlex.join(call.arguments(one))}" for one in step.command]
    calls[-1] = f"exec {calls[-1]}"  # the signal must reach the work, not a shell
    return " && ".join([*setup, *calls])


def _resources(resources: Resources) -> dict[str, dict[str, str]]:
    asked: dict[str, str] = {}
    if resources.cpus:
        asked["cpu"] = str(resources.cpus)
    if resources.memory:  # Slurm's units are binary
        number, unit = re.fullmatch(r"(\d+)([KMGT]?)", resources.memory).groups()  # type: ignore[union-attr]
        asked["memory"] = f"{number}{unit or 'M'}i"
    if resources.gpus:
        asked["nvidia.com/gpu"] = str(resources.gpus)
    return {"requests": asked, "limits": dict(asked)}
