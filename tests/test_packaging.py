"""The wheel, installed outside the checkout: packages, configs and commands are all there."""

import os
import pathlib
import subprocess
import sys
import tomllib
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGES = ("jaxmodels", "pallas_kernels", "train", "eval")


def run(*command: str | pathlib.Path, cwd: pathlib.Path, **env: str) -> str:
    """Output of a command that must succeed."""
    result = subprocess.run(
        command, cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, f"{command}:\n{result.stdout[-1000:]}\n{result.stderr[-3000:]}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", out, cwd=ROOT)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory) -> pathlib.Path:
    """A directory that holds the installed wheel and nothing else."""
    site = tmp_path_factory.mktemp("site")
    pip = (
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--no-compile",
    )
    run(*pip, "--target", site, wheel, cwd=site)
    return site


def test_the_wheel_holds_every_module_and_config_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            assert str(file.relative_to(ROOT)) in names
    configs = list((ROOT / "configs").rglob("*.py"))
    assert configs
    for file in configs:
        assert f"train/_configs/{file.relative_to(ROOT / 'configs')}" in names
    roots = {name.partition("/")[0] for name in names}
    assert roots == {*PACKAGES, next(root for root in roots if root.endswith(".dist-info"))}
    assert not [name for name in names if "__pycache__" in name]
    assert [name for name in names if name.endswith("licenses/LICENSE")]


def test_commands_and_configs_work_outside_the_checkout(site, tmp_path):
    where = {"PYTHONPATH": str(site)}
    script = """
import pathlib, sys, train
from train.config_files import available, load_config
assert pathlib.Path(sys.argv[1]) in pathlib.Path(train.__file__).resolve().parents, train.__file__
print(*available())
for name in available():
    load_config(name)
"""
    names = run(sys.executable, "-c", script, site.resolve(), cwd=tmp_path, **where).split()
    expected = {
        f"mqar/{name}"
        for name in ("attention", "sliding_window", "based", "base_conv", "hyena", "demo")
    }
    assert expected <= set(names)
    for command in ((sys.executable, "-m", "train"), (site / "bin" / "jaxmodels-train",)):
        assert "--workdir" in run(*command, "--help", cwd=tmp_path, **where)
    for command in ((sys.executable, "-m", "eval"), (site / "bin" / "jaxmodels-eval",)):
        assert "usage" in run(*command, "--help", cwd=tmp_path, **where)
    assert not list(tmp_path.iterdir()), "asking for help wrote something"


def test_every_requirement_has_a_tested_version():
    """constraints.txt pins what pyproject.toml names: plain pins, so that they are read by any pip anywhere."""
    lines = [
        x for x in (ROOT / "constraints.txt").read_text().splitlines() if not x.startswith("#")
    ]
    pins = dict(line.split("==") for line in lines)
    assert all(version[0].isdigit() and " " not in version for version in pins.values())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    canonical = {name.lower().replace("_", "-") for name in pins}
    wanted = [
        *project["dependencies"],
        *(r for extra in ("test", "gates", "data") for r in extras[extra]),
    ]
    for requirement in wanted:
        name = requirement.split(">=")[0].split("[")[0]
        if name == project["name"]:  # an extra that takes in another
            continue
        assert name.lower().replace("_", "-") in canonical, f"{name} has no pin"
