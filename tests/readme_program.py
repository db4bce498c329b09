"""The programs that a README's commands find in the sandbox, each under its own name.

`scholiast` and `torchrun` are asked of the warm process (readme_server.py); torchrun's options are
parsed by torch's own parser. `make` runs the real `make -n` on the real Makefile, then the commands of
ours that it lists: for good if they are stage one and two here, else parsed alone. What cannot run here
(schedulers, containers, downloads) does nothing but have every command of ours in its words parsed.

Usage: python -IS readme_program.py PROGRAM WORDS...
"""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

MADE_HERE = ("train-student", "cache-teachers")
CARRIERS = ("srun", "apptainer", "sbatch")
"""Programs that run a command: given a script's path, or a command of ours in their words."""


def ask(program: str, words: list[str]) -> int:
    """Has the warm process run a command of ours; returns its exit code."""
    request = {
        "program": program, "words": words, "folder": os.getcwd(), "environment": dict(os.environ),
    }  # fmt: skip
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(os.environ["READMES_SOCKET"])
        socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2])
        code = server.recv(1)
    return code[0] if code else 1


def parse(line: str) -> int:
    """Runs a line of shell, as Slurm would, in which commands of ours are only parsed."""
    rank = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"}
    environment = {**os.environ, **rank, "READMES_PARSE": "1"}
    return subprocess.run(["bash", "-euc", line], env=environment, check=False).returncode


def make(words: list[str]) -> int:
    """Runs what `make -n` lists of ours."""
    places = os.environ["PATH"].split(os.pathsep)[1:]
    real = shutil.which("make", path=os.pathsep.join(places)) or "make"
    top = os.environ["READMES_TOP"]
    listed = subprocess.run(
        [real, "-n", "-C", top, "--no-print-directory", *words],
        stdout=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    here = any(word in MADE_HERE for word in words) and "LAUNCH=slurm" not in words
    for line in listed.stdout.replace("\\\n", " ").splitlines():
        if line.startswith(".venv/bin/scholiast "):
            code = (
                subprocess.run(["bash", "-euc", line], check=False).returncode
                if here
                else parse(line)
            )
            if code:
                return code
    return listed.returncode


def carry(program: str, words: list[str]) -> int:
    """Has the command in a scheduler's or a container's words parsed, the script's syntax checked."""
    if program == "sbatch":
        print(1)  # the job's number, as of --parsable
        script = Path(words[-1])
        if script.is_file():
            return subprocess.run(["bash", "-n", str(script)], check=False).returncode
    if program == "apptainer" and words[0] != "exec":
        return 0
    for i, word in enumerate(words):
        if Path(word).name == "scholiast":
            return parse(shlex.join(words[i:]))
        if re.search(r"\bscholiast\s", word):
            return parse(word)
    print(f"{program} runs no command of ours: {words}", file=sys.stderr)
    return 2


def run(program: str, words: list[str]) -> int:
    name = Path(program).name
    if name in ("scholiast", "torchrun"):
        return ask(program, words)
    if name == "make":
        return make(words)
    return carry(name, words) if name in CARRIERS else 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], sys.argv[2:]))
