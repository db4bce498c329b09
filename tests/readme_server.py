"""A warm process that does what the sandbox's programs ask: imports are paid once, a call is a fork.

What it runs is `pipeline.cli.main` itself, in the caller's folder and environment and on its streams.

Usage: readme_server.py SOCKET
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import datasets  # noqa: F401  (this and what follows it: paid for before the fork)
import matplotlib.pyplot
import sacrebleu  # noqa: F401
import torch
import zarr.codecs.numcodecs  # noqa: F401
from torch.distributed.run import parse_args
from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

import stages.cache_teachers
import stages.corpus
import stages.train_student  # noqa: F401
from pipeline.cli import main
from pipeline.config import load_config

MOST = 2**20
"""Bytes of a request."""


def serve(path: str) -> None:
    """Answers requests, one fork each, until it is killed."""
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        print("ready", flush=True)
        while True:
            caller, _ = listening.accept()
            with caller:
                if os.fork() == 0:
                    listening.close()
                    answer(caller)


def answer(caller: socket.socket) -> None:
    """Does what one caller asks and sends the exit code, in a process that then ends."""
    code = 1
    try:
        request, streams, _, _ = socket.recv_fds(caller, MOST, 3)
        become(json.loads(request), streams)
        code = call(json.loads(request))
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    caller.sendall(bytes([code]))
    os._exit(0)


def become(request: dict[str, Any], streams: Sequence[int]) -> None:
    """Takes over the caller's streams, folder and environment."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for own, theirs in enumerate(streams):
        os.dup2(theirs, own)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    torch.set_num_threads(1)


def call(request: dict[str, Any]) -> int:
    """Runs a command, or only parses it; returns its exit code."""
    program, words = request["program"], request["words"]
    parse = "READMES_PARSE" in os.environ
    if Path(program).name == "torchrun":
        options = parse_args(words)
        assert options.module and options.training_script == "pipeline.cli", words
        words, parse = options.training_script_args, True
    if parse:
        only_parse(main)
    sys.argv = [program, *words]
    try:
        main(words, "scholiast")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def only_parse(command: click.Command) -> None:
    """Has a command end when its words are parsed and its configuration is loaded."""

    def load(config: Path | None = None, overrides: Sequence[str] = (), **_: object) -> None:
        if config is not None:
            load_config(config, overrides)

    command.callback = load
    for inner in getattr(command, "commands", {}).values():
        only_parse(inner)


if __name__ == "__main__":
    matplotlib.use("agg")
    serve(sys.argv[1])
