"""scholiast, with pauses from the environment, so that a fault can hit the middle of tiny work.

SLOW_BATCH, SLOW_STEP: seconds before each batch of stage one and step of stage two.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from pipeline.cli import main
from stages.annotate import PartAnnotator
from stages.train_student import Trainer


def after(seconds: float, real: Callable[..., Any]) -> Callable[..., Any]:
    def slowed(*arguments: Any, **named: Any) -> Any:
        time.sleep(seconds)
        return real(*arguments, **named)

    return slowed


if __name__ == "__main__":
    batch, step = (float(os.environ.get(key, "0")) for key in ("SLOW_BATCH", "SLOW_STEP"))
    PartAnnotator._batch = after(batch, PartAnnotator._batch)  # type: ignore[method-assign]
    Trainer._optimize = after(step, Trainer._optimize)  # type: ignore[method-assign]
    main()
