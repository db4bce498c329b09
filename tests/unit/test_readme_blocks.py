"""The blocks of a README."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest
from readme_blocks import readme_blocks

TEXT = """# Top
```
plain
```
## One
~~~python
# not a heading
x = 1
~~~
### Deep ###
1. in a list
   ```python title
   y = x + 1
   ```
## Two
````markdown
```python
never = 0
```
````
```python
raise ValueError(y)
```
"""


def test_blocks_by_language_and_heading(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(TEXT)
    assert [(b.language, b.headings, b.line) for b in readme_blocks(path)] == [
        ("", ("Top",), 3), ("python", ("Top", "One"), 7), ("python", ("Top", "One", "Deep"), 13),
        ("markdown", ("Top", "Two"), 17), ("python", ("Top", "Two"), 22),
    ]  # fmt: skip
    assert [b.text for b in readme_blocks(path, "")] == ["plain\n"]
    one = readme_blocks(path, "python", "One")
    assert [b.text for b in one] == ["# not a heading\nx = 1\n", "y = x + 1\n"]
    names: dict[str, Any] = {}
    for block in one:
        block.run(names)
    assert names["y"] == 2
    with pytest.raises(ValueError, match="2") as error:
        readme_blocks(path, "python", "Two")[0].run(names)
    last = traceback.extract_tb(error.value.__traceback__)[-1]
    assert (last.filename, last.lineno) == (str(path), 22)


def test_a_fence_that_is_not_closed_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("```python\nx = 1\n``\n")
    with pytest.raises(ValueError, match="line 1 is never closed"):
        readme_blocks(tmp_path / "a.md")
