"""docs/mixers.md: following the page word by word adds a mixer that obeys the law and trains."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

from jaxmodels.mixers.registry import MIXERS
from tests.jaxmodels.mixers.law import CHECKS

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "mixers.md").read_text()


def block_after(heading: str) -> str:
    """The first fenced block after a bold heading of the page."""
    _, _, rest = PAGE.partition(f"**{heading}")
    return re.search(r"```\w+\n(.*?)```", rest, re.DOTALL)[1]


def test_the_table_names_every_mixer():
    rows = re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)
    assert rows == list(MIXERS)


def test_following_the_page_word_by_word(tmp_path):
    """In a copy of the repository: the file, the line, the law's command and the training command."""
    ignore = shutil.ignore_patterns("__pycache__")
    for folder in ("jaxmodels", "pallas_kernels", "train", "eval", "configs", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "jaxmodels/mixers/moving_average.py").write_text(block_after("1. The file"))

    line_import, line_entry = block_after("2. The line").strip().split("\n\n")
    registry = tmp_path / "jaxmodels/mixers/registry.py"
    text = registry.read_text()
    text = text.replace(
        "from jaxmodels.mixers.based", f"{line_import}\nfrom jaxmodels.mixers.based", 1
    )
    text = text.replace("\n}", f"\n{line_entry}\n}}", 1)
    registry.write_text(text)

    def follow(heading: str, also: str = "") -> str:
        command = (
            block_after(heading).strip().replace(".venv/bin/python", shlex.quote(sys.executable))
            + also
        )
        result = subprocess.run(
            command,
            shell=True,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
        return result.stdout

    assert int(re.search(r"(\d+) passed", follow("3. The law"))[1]) > len(CHECKS)
    short = "steps=4 batch_size=8 model.vocab_size=128 optimizer.warmup_steps=0"
    follow("4. A run", "".join(f" --config.{setting}" for setting in short.split()))
    assert (tmp_path / "runs/moving_average/summary.json").is_file()


def test_the_readmes_snippet_runs():
    readme = (ROOT / "README.md").read_text()
    exec(re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1], {})  # it asserts what it shows
    assert readme.count("\n") < 100  # three screens
