"""The examples of the README run as they stand."""

import re
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"


def test_bgmv_example_runs_and_is_short():
    example = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[0]
    assert "lk.bgmv(" in example and "assert torch.allclose" in example
    assert len(example.strip().splitlines()) <= 15
    exec(compile(example, "README.md", "exec"), {})
