"""Imports point one way, and the library needs little: the contract of pyproject.toml, and proof that it bites."""

import ast
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGES = ("jaxmodels", "pallas_kernels", "train", "eval")
# What flax itself imports and is therefore there whenever flax is.
FLAX_BRINGS = {
    "optax",
    "orbax",
    "absl",
    "rich",
    "yaml",
    "msgpack",
    "tensorstore",
    "treescope",
    "typing_extensions",
}

LIBRARY_ALONE = """
import importlib, importlib.abc, pkgutil, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r} (blocked by the test)", name=name)

ABSENT = set(sys.argv[1].split(","))
sys.meta_path.insert(0, Absent())
import jaxmodels, pallas_kernels
for package in (jaxmodels, pallas_kernels):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
from jaxmodels.mixers.registry import MIXERS
print(len(MIXERS))
"""


def imports_of(file: pathlib.Path) -> set[str]:
    """The modules that a file imports anywhere, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module or "")
    return names


def lint(directory: pathlib.Path) -> subprocess.CompletedProcess:
    """import-linter's verdict on a copy of the tree; the copy comes first on the path."""
    return subprocess.run(
        [
            sys.executable,
            "-c",
            "from importlinter.cli import lint_imports_command as m; m()",
            "--no-cache",
        ],
        cwd=directory,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def copy(tmp_path):
    """The four packages and their contract, to spoil."""
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_library_imports_with_nothing_but_jax_flax_numpy_jaxtyping():
    ours = {"jax", "jaxlib", "flax", "numpy", "jaxtyping"}
    used = {
        name.partition(".")[0]
        for p in PACKAGES
        for f in (ROOT / p).rglob("*.py")
        for name in imports_of(f)
    }
    absent = (
        used - ours - FLAX_BRINGS - set(sys.stdlib_module_names) - {"jaxmodels", "pallas_kernels"}
    )
    absent |= {
        "train",
        "eval",
        "grain",
        "matplotlib",
        "ml_collections",
        "scipy.signal",
        "tensorboardX",
        "torch",
    }
    result = subprocess.run(
        [sys.executable, "-c", LIBRARY_ALONE, ",".join(sorted(absent))],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert int(result.stdout) >= 5


def test_the_library_names_no_other_package():
    """Nor does it lean on what flax happens to bring, or hide an import in a function."""
    allowed = set(sys.stdlib_module_names) | {
        "jax",
        "flax",
        "numpy",
        "jaxtyping",
        "jaxmodels",
        "pallas_kernels",
    }
    for package in ("jaxmodels", "pallas_kernels"):
        for file in (ROOT / package).rglob("*.py"):
            foreign = {name.partition(".")[0] for name in imports_of(file)} - allowed
            assert not foreign, f"{file.relative_to(ROOT)} imports {foreign}"


def test_configs_import_only_config_builders():
    files = list((ROOT / "configs").rglob("*.py"))
    assert files
    for file in files:
        for name in imports_of(file):
            # mqar_mixes is a table of segments, which configs are made of
            builders = ("train.config", "train.data.mqar_mixes", "ml_collections", "configs.")
            allowed = name.startswith(builders)
            assert allowed or name.partition(".")[0] in sys.stdlib_module_names, (
                f"{file.relative_to(ROOT)} imports {name}"
            )


def test_the_contract_holds(copy):
    result = lint(copy)
    assert result.returncode == 0, result.stdout[-2000:]
    assert "0 broken" in result.stdout


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("pallas_kernels/turned.py", "import jaxmodels.typing"),
        ("jaxmodels/turned.py", "import train.config"),
        ("train/turned.py", "import eval"),
        ("jaxmodels/turned.py", "def f():\n    import ml_collections"),
    ],
)
def test_the_contract_bites_when_an_arrow_turns_round(copy, file, line):
    (copy / file).write_text(line + "\n")
    result = lint(copy)
    assert result.returncode == 1, result.stdout[-2000:] + result.stderr[-2000:]
    assert "turned" in result.stdout
