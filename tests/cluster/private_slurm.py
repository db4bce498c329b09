"""A private Slurm of two virtual nodes on loopback: own folder, keys, ports and process ids.

No systemd, no cgroups, nothing in /etc or /run. Needs Debian's slurmctld, slurmd, slurm-client, munge.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

NODES = ("n1", "n2")
_CONF = """\
ClusterName=scholiast
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AuthType=auth/munge
AuthInfo=socket={root}/run/munge.socket,cred_expire=3
CredType=cred/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd-%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
JobRequeue=1
MinJobAge=3600
KillWait=5
InactiveLimit=0
SlurmctldTimeout=60
SlurmdTimeout=10
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=2000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[3]} CPUs=2 RealMemory=2000 State=UNKNOWN
PartitionName=scavenge Nodes=n1,n2 PriorityTier=1 PreemptMode=REQUEUE GraceTime=30 Default=YES State=UP
PartitionName=prod Nodes=n1,n2 PriorityTier=10 PreemptMode=OFF State=UP
"""


class PrivateSlurm:
    """The cluster; `start` and `stop` once each.

    Args:
        root: an empty folder; its path must be short enough for a socket's name.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        os.environ["SLURM_CONF"] = str(root / "etc/slurm.conf")

    def start(self) -> None:
        for name in ("etc", "state", "spool", "log", "run", "munge"):
            (self.root / name).mkdir(mode=0o755)
        (self.root / "munge").chmod(0o700)
        key = self.root / "munge/munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        host = socket.gethostname().split(".")[0]
        conf = _CONF.format(root=self.root, host=host, ports=_ports(4), user=getpass.getuser())
        (self.root / "etc/slurm.conf").write_text(conf)
        munge = self.root / "munge"
        self._daemon(
            "munged", f"--socket={self.root}/run/munge.socket", f"--key-file={key}",
            f"--pid-file={self.root}/run/munged.pid", f"--log-file={munge}/munged.log",
            f"--seed-file={munge}/munge.seed", "--force",
        )  # fmt: skip
        self._daemon("slurmctld", "-i")
        for node in NODES:
            self.start_node(node)
        self.wait_for(lambda: self.ask("sinfo", "-h", "-o", "%T").split() == ["idle"], 30)

    def start_node(self, node: str) -> None:
        self._daemon("slurmd", "-N", node)

    def _daemon(self, name: str, *arguments: str) -> None:
        program = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
        assert program, f"{name} is not installed: run `make test-cluster`"
        subprocess.run([program, *arguments], check=True, timeout=30, stdin=subprocess.DEVNULL)

    def stop(self) -> None:
        """Ends every job, then every daemon by its own process id, if that is still its."""
        with contextlib.suppress(Exception):
            self.cancel_all()
        for path in sorted((self.root / "run").glob("*.pid"), reverse=True):  # munged last but ctld
            name = path.stem.split("-")[0]
            pid = int(path.read_text() or 0)
            if _runs(pid, name):
                os.kill(pid, signal.SIGTERM)
                with contextlib.suppress(AssertionError):
                    self.wait_for(lambda pid=pid, name=name: not _runs(pid, name), 10)  # type: ignore[misc]
                if _runs(pid, name):
                    os.kill(pid, signal.SIGKILL)
        for pid in self._left():  # of jobs that nobody could cancel: slurmctld had died
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _left(self) -> list[int]:
        """Returns the processes that were started with this cluster's configuration."""
        ours = b"SLURM_CONF=" + os.fsencode(os.environ["SLURM_CONF"])
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if ours in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
        return found

    def cancel_all(self) -> None:
        self.ask("scancel", f"--user={getpass.getuser()}")
        self.wait_for(lambda: not self.queue(), 60)

    def ask(self, *words: str) -> str:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def queue(self) -> dict[str, str]:
        """Returns what is pending or at work: "7" or "7_3" → state."""
        rows = self.ask("squeue", "-h", "--array", "--format=%F_%K %T").splitlines()
        return {name.removesuffix("_N/A"): state for name, state in map(str.split, rows)}

    def states(self, job: str) -> list[str]:
        """Returns the states of a job, of an array of each task."""
        lines = self.ask("scontrol", "show", "job", job, "-o").splitlines()
        return [line.split("JobState=")[1].split()[0] for line in lines]

    def settle(self, timeout: float = 300.0) -> None:
        """Waits until the queue is empty; jobs that were requeued do not wait their two minutes."""

        hurried: set[str] = set()

        def empty() -> bool:
            rows = self.ask("squeue", "-h", "--array", "--format=%A %T %r").splitlines()
            waiting = {
                job
                for job, state, reason in (row.split(maxsplit=2) for row in rows)
                if (state, reason) == ("PENDING", "BeginTime")
            }
            for job in waiting - hurried:
                # Sooner, and Slurm takes the new job's credential for the old one's.
                words = ["scontrol", "update", f"JobId={job}", "StartTime=now+6seconds"]
                subprocess.run(words, capture_output=True, timeout=60, check=False)
            hurried.clear()
            hurried.update(waiting)
            return not rows

        self.wait_for(empty, timeout)

    def wait_for(self, condition: Callable[[], object], timeout: float = 120.0) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                logs = "".join(
                    p.read_text(errors="replace")[-1500:] for p in self.root.glob("log/*")
                )
                raise AssertionError(f"not within {timeout:.0f} s; {self.queue()}\n{logs}")
            time.sleep(0.3)

    def kill_node(self, node: str, worker: int) -> None:
        """Kills a node's daemon with -9, and the job of one of its processes, up to slurmstepd."""
        os.kill(int((self.root / f"run/slurmd-{node}.pid").read_text()), signal.SIGKILL)
        family = [worker]
        while _name(family[-1]) != "slurmstepd":
            family.append(_parent(family[-1]))
            assert family[-1] > 1
        for pid in reversed(family):
            os.kill(pid, signal.SIGKILL)


def _ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _runs(pid: int, name: str) -> bool:
    return pid > 1 and _name(pid).startswith(name)


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
