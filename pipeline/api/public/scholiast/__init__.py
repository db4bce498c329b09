"""The Python API: a few names for notebooks and other trainers.

The code lies in `pipeline/api`; this package is its name to the outside, and the only one that is
installed for it. A name is imported when it is first asked for, so `import scholiast` loads neither
torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.api.blocks import BlockDataset, BlockStream, collate
    from pipeline.api.cache import Cache, open_cache
    from pipeline.api.loss import DistillationLoss
    from pipeline.api.trainer import DistillationMixin, DistillationTrainer
    from stages.fusion import FusedTarget
    from stages.step_loss import StepLoss
    from stages.target_options import FeatureOptions, FusionOptions, LossOptions
    from storage.errors import ScholiastError

__all__ = [
    "BlockDataset", "BlockStream", "Cache", "DistillationLoss", "DistillationMixin",
    "DistillationTrainer", "FeatureOptions", "FusedTarget", "FusionOptions", "LossOptions",
    "ScholiastError", "StepLoss", "collate", "open_cache",
]  # fmt: skip

_HOMES = {
    "pipeline.api.blocks": ("BlockDataset", "BlockStream", "collate"),
    "pipeline.api.cache": ("Cache", "open_cache"),
    "pipeline.api.loss": ("DistillationLoss",),
    "pipeline.api.trainer": ("DistillationMixin", "DistillationTrainer"),
    "stages.fusion": ("FusedTarget",),
    "stages.step_loss": ("StepLoss",),
    "stages.target_options": ("FeatureOptions", "FusionOptions", "LossOptions"),
    "storage.errors": ("ScholiastError",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module 'scholiast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
