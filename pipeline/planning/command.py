"""`scholiast plan`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import click

from pipeline.commands.options import json_option, open_workspace, run_options


@click.command()
@click.option("--measure", is_flag=True,
              help="First measure each model that is here, alone, for some seconds on this machine, and "
              "keep that in RUN_DIR/calibration.json.")  # fmt: skip
@click.option("--price-per-hour", type=click.FloatRange(0.0), metavar="X",
              help="Of a GPU (or of this machine without one), any currency: adds a column.")  # fmt: skip
@click.option("--flops", type=click.FloatRange(0.0, min_open=True), metavar="X",
              help="Plan for a GPU that is not here: its bf16 FLOP/s, e.g. 3e14.")  # fmt: skip
@click.option("--device-memory", type=click.FloatRange(0.0, min_open=True), metavar="GB",
              help="The device's memory in 10^9 bytes, in place of this machine's.")  # fmt: skip
@json_option
@run_options
def plan(
    config: Path, overrides: Sequence[str], quiet: bool, debug: bool, as_json: bool, measure: bool,
    price_per_hour: float | None, flops: float | None, device_memory: float | None,
) -> None:  # fmt: skip
    """Say what a run will take, what is already done, and what will not fit, before anything runs.

    Bytes on disk by array, hours and cost of teachers and student, peak memory of both stages by term,
    parts and array sizes. What does not fit is a warning, and the exit code stays 0.

    \b
    Example: scholiast plan my.yaml --set store.k=32
      scholiast plan my.yaml --measure --price-per-hour 2.5
      scholiast plan my.yaml --flops 3e14 --device-memory 80
    """
    from pipeline.planning.text import show_plan
    from pipeline.planning.whole import Asked, whole_plan

    work, console = open_workspace(config, overrides, quiet)
    notes: list[str] = []
    if measure:
        from pipeline.planning.measure import measure as measure_models

        notes = measure_models(work, console.say)
    memory = None if device_memory is None else round(device_memory * 1e9)
    found = whole_plan(work, Asked(flops, memory, price_per_hour), notes)
    if as_json:
        click.echo(json.dumps(found, indent=1))
    else:
        show_plan(console, found)
