"""python -m tests.gates tpu cuda export run: compile the library for hardware that is not there, or run it here.

    tpu     real code for TPU v5e          export  StableHLO for both, without their compilers
    cuda    real code for H200             run     each program and a short training run, on this CPU

Prints a line per program and how many compiled per target; exit code 1 when one did not. `make compile-gates` sets up the
environment that this needs.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from tests.gates import targets
from tests.gates.programs import Program, mixer_programs, model_programs, train_step


def for_tpu() -> Iterator[tuple[Program, Callable[[], None]]]:
    devices = targets.tpu_devices()
    step = train_step(devices, data=2, fsdp=2)
    for program in (*mixer_programs(), *model_programs(), step):
        yield program, lambda p=program: targets.compile_for(p, devices[0])


def for_cuda() -> Iterator[tuple[Program, Callable[[], None]]]:
    devices = targets.cuda_devices()
    for program in (*mixer_programs(), *model_programs()):
        yield program, lambda p=program: targets.compile_for(p, devices[0])
    step = train_step(devices)
    yield step, lambda: targets.compile_for(step, devices[0])


def for_export() -> Iterator[tuple[Program, Callable[[], None]]]:
    for program in (*mixer_programs(), *model_programs()):
        yield program, lambda p=program: targets.export_for_both(p)


def for_run() -> Iterator[tuple[Program, Callable[[], None]]]:
    for program in (*mixer_programs(), *model_programs()):
        yield program, lambda p=program: run_here(p)
    yield Program("python -m train", train_a_little, ()), train_a_little


def run_here(program: Program) -> None:
    """The program on drawn parameters and inputs, one segment and empty states; its results must be finite."""
    rng = np.random.default_rng(0)

    def draw(x):
        if jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.asarray(rng.normal(size=x.shape, scale=0.1), x.dtype)
        return jnp.zeros(x.shape, x.dtype)

    params, inputs, *rest = program.arguments
    is_ids = bool(rest) and isinstance(rest[0], jax.ShapeDtypeStruct)
    fill = jnp.ones if is_ids else jnp.zeros
    rest = jax.tree.map(lambda x: fill(x.shape, x.dtype), rest)
    results = jax.jit(program.function)(*jax.tree.map(draw, (params, inputs)), *rest)
    for leaf in jax.tree.leaves(results):
        assert bool(jnp.isfinite(leaf.astype(jnp.float32)).all()), "a result is not finite"


def train_a_little() -> None:
    """Four steps of a small MQAR run through the loop, with its checkpoint and summary."""
    from train.config import base_config
    from train.loop import run

    config = base_config()
    with config.unlocked():
        config.steps = 4
        config.batch_size = 8
        config.model.vocab_size = 128
        config.model.d_model = 16
        config.data.test = ({"length": 64, "num_kv_pairs": 4, "num_examples": 16},)
    with tempfile.TemporaryDirectory() as workdir:
        summary = run(config, workdir)
    assert summary["steps"] == 4


TARGETS = {"tpu": for_tpu, "cuda": for_cuda, "export": for_export, "run": for_run}


def check(target: str) -> list[str]:
    """Compiles every program of a target; the names of those that failed."""
    started, failed, count = time.monotonic(), [], 0
    for program, attempt in TARGETS[target]():
        count += 1
        before = time.monotonic()
        try:
            attempt()
            verdict = "ok"
        except Exception as error:
            failed.append(program.name)
            verdict = f"FAILED: {type(error).__name__}: {error}"
        print(
            f"  {target:6s} {program.name:36s} {time.monotonic() - before:5.1f} s  {verdict}",
            flush=True,
        )
    seconds = time.monotonic() - started
    print(
        f"{target}: {count - len(failed)} of {count} programs in {seconds:.0f} s, jax {jax.__version__}"
    )
    return [f"{target}: {name}" for name in failed]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.gates",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("targets", nargs="+", choices=TARGETS)
    arguments = parser.parse_args()
    targets.prepare_environment()
    failed = [name for target in arguments.targets for name in check(target)]
    if failed:
        print("failed:\n  " + "\n  ".join(failed), file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
