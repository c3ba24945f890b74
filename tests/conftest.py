"""Set up for every test: the platform, checked annotations, and a table of where the time went.

Imported before any test module, so the environment is set before jax reads it and the import hook is in place before
the library is imported.
"""

import os
import pathlib
import tempfile
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Correctness tests compile many small programs and run each once: unoptimised code halves the time that takes. A test
# that needs the real compiler, or several devices, starts a process of its own.
if "xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
    ).strip()
# The GPU interpreter blocks one thread of the CPU client per warpgroup that waits; on two cores it would wait for ever.
os.environ.setdefault("NPROC", "8")
# Figures are drawn, never shown.
os.environ.setdefault("MPLBACKEND", "agg")

import hypothesis
import jax
import jaxtyping
import pytest

# Compiled programs are kept between runs, which halves a rerun and changes no cold run (measured on the law tests): by this
# process in one folder, by the training runs that tests start, and kill, in another, away from the user's own. An entry
# that a kill left half-written costs a warning and a compilation.
CACHE = pathlib.Path(tempfile.gettempdir(), f"jaxmodels-test-cache-{os.getuid()}")
os.environ["XDG_CACHE_HOME"] = str(CACHE)
if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    jax.config.update("jax_compilation_cache_dir", str(CACHE / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)

jaxtyping.install_import_hook(["jaxmodels", "pallas_kernels", "train", "eval"], "beartype.beartype")

# The same examples every time, and no limit per example: the first one compiles.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable")

# area -> (test folders, minutes of the default suite on 2 cores); a file in none of them belongs to "rest"
BUDGETS = {
    "ops": (("tests/pallas_kernels/",), 3.0),
    "mixers": (("tests/jaxmodels/mixers/",), 3.0),
    "train": (("tests/train/",), 2.0),
    "rest": ((), 2.0),
}


def area_of(nodeid: str) -> str:
    """The budget that a test's time is charged to."""
    for area, (folders, _) in BUDGETS.items():
        if nodeid.startswith(folders):
            return area
    return "rest"


def pytest_addoption(parser):
    parser.addoption(
        "--suite-limit",
        type=float,
        default=None,
        metavar="SECONDS",
        help="fail when the whole run takes longer than this",
    )


STARTED = pytest.StashKey[float]()


def pytest_sessionstart(session):
    session.config.stash[STARTED] = time.monotonic()


def is_worker(config) -> bool:
    """Whether this process is one of xdist's workers (the controller and a plain run are not)."""
    return hasattr(config, "workerinput")


def over_limit(config) -> float | None:
    """Seconds past --suite-limit, None within it."""
    limit = config.getoption("--suite-limit")
    elapsed = time.monotonic() - config.stash[STARTED]
    return elapsed - limit if limit is not None and elapsed > limit else None


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    if not is_worker(session.config) and exitstatus == 0 and over_limit(session.config) is not None:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    """Seconds per area, summed over tests and divided by the workers that shared them."""
    excess = over_limit(config)
    if excess is not None:
        message = f"the suite took {excess:.0f} s more than --suite-limit allows"
        terminalreporter.line(message, red=True)
    reports = [r for rs in terminalreporter.stats.values() for r in rs if hasattr(r, "duration")]
    if len(reports) < 50:  # a run of a few tests has no budget to speak of
        return
    workers = config.getoption("numprocesses", None) or 1
    terminalreporter.section("time per area (seconds of test / workers, against the budget)")
    for area, (_, minutes) in BUDGETS.items():
        mine = [r for r in reports if area_of(r.nodeid) == area]
        tests = len({r.nodeid for r in mine})
        seconds = sum(r.duration for r in mine) / workers
        over = "   OVER" if seconds > 60 * minutes else ""
        terminalreporter.line(
            f"{area:8s}{tests:6d} tests {seconds:8.1f} s of {60 * minutes:.0f} s{over}"
        )
