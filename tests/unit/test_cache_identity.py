"""A cache's identity names what decides its bytes, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import Lab


@pytest.mark.parametrize(("pooled", "same"), [([], True), ([2], False)])
def test_segments_count_where_layers_are_pooled(lab: Lab, pooled: list[int], same: bool) -> None:
    """Without pooled layers they change nothing, so no cache is refused for them."""
    teachers = {"one": {"model": f"{lab.root}/a", "feature_layers": pooled}}
    options: dict[str, Any] = {"teachers": teachers, "loss": {}}
    info = lab.workspace(**options).prepare()
    one, four = (lab.workspace(**options, store__segments=n).jobs(info)[0].identity for n in (1, 4))
    assert (one == four) == same
    assert four["store"]["segments"] == (1 if same else 4)
