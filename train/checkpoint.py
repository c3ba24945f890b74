"""Checkpoints of a run: written by Orbax in the background, each whole or not there at all, and read back with care.

    workdir/checkpoints/<step>/state/      the train state (parameters, optimiser, step, metric sums), any mesh can read it
    workdir/checkpoints/<step>/meta/       JSON: config, the evaluation made at this step, time spent so far
    workdir/checkpoints/<step>/files.json  size and CRC-32 of every file above

files.json is written before the directory gets its final name, so that a checkpoint that was cut short or damaged later
is recognised without trusting a byte of it.
"""

import contextlib
import errno
import json
import logging
import re
import shutil
import sys
import time
import warnings
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from ml_collections import ConfigDict
from orbax.checkpoint import checkpoint_managers as policies

from train.errors import UserError
from train.sharding import path_name
from train.state import TrainState

FOLDER = "checkpoints"
FILES = "files.json"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Restored(NamedTuple):
    """A checkpoint that was read: `tree` is the train state, or only the parameters."""

    tree: Any
    meta: dict[str, Any]
    step: int


class Checkpoints:
    """Writes the checkpoints of one run; `best` is (metric, "max" or "min"), which picks those kept beside the newest."""

    def __init__(self, workdir: str | Path, config: ConfigDict, best: tuple[str, str]):
        quieten()
        self.folder = Path(workdir).absolute() / FOLDER
        self.saved_step: int | None = None  # the newest step asked to be saved
        self._metric, mode = best
        keep = [policies.LatestN(max(int(config.checkpoint.keep_latest), 1))]
        if config.checkpoint.keep_best:
            keep.append(
                policies.BestN(
                    get_metric_fn=lambda metrics: metrics[self._metric],
                    reverse=mode == "min",
                    n=int(config.checkpoint.keep_best),
                    keep_checkpoints_without_metrics=False,
                )
            )
        with disk_errors(self.folder):
            remove_unfinished(self.folder)
            self._manager = ocp.CheckpointManager(
                self.folder,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=policies.AnyPreservationPolicy(keep),
                    async_options=ocp.AsyncOptions(post_finalization_callback=self._sign),
                ),
            )

    def save(
        self, step: int, state: TrainState, meta: Mapping[str, Any], metrics: Mapping[str, float]
    ) -> None:
        """Copies the state to the host and returns; a thread writes it. Waits for the save before it, if any.

        metrics: those of an evaluation of exactly this state, or none.

        Raises:
          UserError: the disk is full (of this save or of the one before it).
        """
        with self._writing():
            self._manager.wait_until_finished()
            self.saved_step = step
            ranked = (
                {self._metric: float(metrics[self._metric])} if self._metric in metrics else None
            )
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(dict(meta))
                ),
                metrics=ranked,
                force=True,
            )

    @property
    def busy(self) -> bool:
        """Whether a save is still being written. Raises UserError if it ran into a full disk."""
        with self._writing():
            self._manager.check_for_errors()
            return self._manager.is_saving_in_progress()

    def close(self) -> None:
        """Waits for the last save. Raises UserError if it ran into a full disk."""
        with self._writing():
            self._manager.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Gives back the space of a save that found too little."""
        try:
            with disk_errors(self.folder):
                yield
        except UserError:
            for _ in range(5):  # other threads of that save may write a little longer
                remove_unfinished(self.folder)
                time.sleep(0.1)
            raise

    def _sign(self) -> None:
        """Called by Orbax when all files of a save are written and the directory still has its temporary name."""
        for folder in self.folder.glob(f"{self.saved_step}.orbax-checkpoint-tmp*"):
            (folder / FILES).write_text(json.dumps(_file_sums(folder)))


# --- reading ---------------------------------------------------------------------------------------------------------


def steps(workdir: str | Path) -> list[int]:
    """Steps that have a checkpoint, oldest first."""
    folder = Path(workdir) / FOLDER
    return sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit() and p.is_dir())


def restore_newest(workdir: str | Path, abstract: TrainState) -> Restored | None:
    """The newest checkpoint that is whole, laid out as `abstract` says (on any mesh); None if there is none at all.

    A damaged one is reported in one line on stderr and put aside as checkpoints/damaged-<step>, so that the run can
    write that step again.

    Raises:
      UserError: every checkpoint is damaged, or the newest whole one is of another architecture.
    """
    damaged: dict[int, str] = {}
    for step in reversed(steps(workdir)):
        restored = _read(workdir, step, abstract)
        if isinstance(restored, Restored):
            for bad, reason in damaged.items():
                _put_aside(workdir, bad)
                print(
                    f"checkpoint {bad} is damaged ({reason}); going on from {step}", file=sys.stderr
                )
            return restored
        damaged[step] = restored
    _raise_if_damaged(workdir, damaged)
    return None


def load_params(
    workdir: str | Path, which: int | str = "best", abstract_params: Any = None
) -> Restored:
    """Parameters (on the default device unless `abstract_params` has shardings), metadata and step of a checkpoint.

    which: "best" by the task's metric (the newest where no evaluation was saved), "latest", or a step. A damaged one is
    passed over for the next in line, with one line on stderr; nothing is changed on disk.
    abstract_params: shapes (and shardings) the parameters must have.

    Raises:
      UserError: no checkpoint, none that is whole, no such step, another architecture.
    """
    candidates = list(reversed(steps(workdir)))
    if not candidates:
        raise UserError(
            f"no checkpoint in {Path(workdir) / FOLDER}; train one with python -m train --config ... --workdir {workdir}"
        )
    if isinstance(which, int):
        if which not in candidates:
            raise UserError(
                f"no checkpoint of step {which} in {workdir}; there are {candidates[::-1]}"
            )
        candidates = [which]
    elif which == "best":
        candidates = _best_first(workdir, candidates)
    elif which != "latest":
        raise UserError(f"checkpoint {which!r} is neither best, latest nor a step")
    damaged: dict[int, str] = {}
    for step in candidates:
        expected = None if abstract_params is None else {"params": abstract_params}
        restored = _read(workdir, step, expected)
        if isinstance(restored, Restored):
            for bad, reason in damaged.items():
                print(f"checkpoint {bad} is damaged ({reason}); using {step}", file=sys.stderr)
            return restored._replace(tree=restored.tree["params"])
        damaged[step] = restored
    _raise_if_damaged(workdir, damaged)
    raise AssertionError("unreachable: there was a candidate")


def _read(workdir: str | Path, step: int, abstract: Any) -> Restored | str:
    """One checkpoint, or why it cannot be read. `abstract` None or a dict takes only the parameters."""
    quieten()
    folder = Path(workdir).absolute() / FOLDER / str(step)
    try:
        if damage := _damage(folder):
            return damage
        meta = json.loads((folder / "meta" / "metadata").read_text())
        with ocp.PyTreeCheckpointer() as reader:
            saved = _saved_leaves(reader, folder / "state")
            if not any(name.startswith("params/") for name in saved):
                return "its list of arrays cannot be read"
            if abstract is None:
                abstract = {"params": _unflatten_params(saved)}
            check_fits(saved, abstract, folder)
            tree = reader.restore(
                folder / "state",
                args=ocp.args.PyTreeRestore(
                    abstract,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
                    partial_restore=isinstance(abstract, dict),
                ),
            )
    except UserError:
        raise
    except Exception as error:  # whatever a damaged file makes a reader raise
        return f"{type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"
    return Restored(tree, meta, step)


def check_fits(saved: Mapping[str, Any], abstract: Any, where: Path) -> None:
    """UserError naming the first parameter (or else optimiser array) that is missing, unexpected or of another shape."""
    wanted = {path_name(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(abstract)}
    part = "params/" if isinstance(abstract, dict) else ""
    for name in sorted({*wanted, *saved}, key=lambda n: (not n.startswith("params/"), n)):
        if not name.startswith(part):
            continue
        ours, theirs = wanted.get(name), saved.get(name)
        if theirs is None:
            problem = f"it lacks {name} {tuple(ours)}"
        elif ours is None:
            problem = f"it has {name} {tuple(theirs.shape)}, which this model does not"
        elif tuple(ours) != tuple(theirs.shape):
            problem = f"{name} is {tuple(theirs.shape)} in it, and {tuple(ours)} in this model"
        else:
            continue
        raise UserError(f"checkpoint {where} is of another architecture: {problem}")


def _saved_leaves(reader: ocp.Checkpointer, folder: Path) -> dict[str, Any]:
    metadata = reader.metadata(folder)
    tree = getattr(metadata, "item_metadata", metadata)
    tree = getattr(tree, "tree", tree)
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {path_name(path): leaf for path, leaf in leaves if hasattr(leaf, "shape")}


def _unflatten_params(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The parameter tree as the checkpoint itself describes it, for the default device."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params: dict[str, Any] = {}
    for name, leaf in saved.items():
        first, *path = name.split("/")
        if first == "params":
            node = params
            for part in path[:-1]:
                node = node.setdefault(part, {})
            node[path[-1]] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return params


def _best_first(workdir: str | Path, candidates: list[int]) -> list[int]:
    """Steps that were evaluated, best first, then the others."""
    scores = {}
    for step in candidates:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            meta = json.loads(
                (Path(workdir) / FOLDER / str(step) / "meta" / "metadata").read_text()
            )
            if meta["evaluated_step"] == step:
                metric, mode = meta["metric"]
                scores[step] = meta["evaluation"][metric] * (-1 if mode == "min" else 1)
    ranked = sorted(scores, key=lambda step: (scores[step], step), reverse=True)
    return ranked + [step for step in candidates if step not in scores]


def _raise_if_damaged(workdir: str | Path, damaged: Mapping[int, str]) -> None:
    if damaged:
        newest = max(damaged)
        raise UserError(
            f"no checkpoint in {Path(workdir) / FOLDER} is whole (newest: {newest}, {damaged[newest]}); "
            "remove that directory to start over"
        )


# --- damage ----------------------------------------------------------------------------------------------------------


def _file_sums(folder: Path) -> dict[str, list[int]]:
    """name -> [size, CRC-32], but for Orbax's own notes about the directory, which it may still touch."""
    return {
        str(path.relative_to(folder)): _sum(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (FILES, "_CHECKPOINT_METADATA")
    }


def _sum(path: Path) -> list[int]:
    size = crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


def _damage(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint, or None. One without files.json is judged by the reader."""
    if not (folder / FILES).exists():
        return None if (folder / "meta" / "metadata").exists() else "not completely written"
    expected = json.loads((folder / FILES).read_text())
    found = _file_sums(folder)
    for name, (size, crc) in expected.items():
        if name not in found:
            return f"{name} is missing"
        if found[name][0] != size:
            return f"{name} has {found[name][0]} bytes instead of {size}"
        if found[name][1] != crc:
            return f"{name} has other contents"
    return None


def _put_aside(workdir: str | Path, step: int) -> None:
    folder = Path(workdir) / FOLDER
    target = folder / f"damaged-{step}"
    shutil.rmtree(target, ignore_errors=True)
    (folder / str(step)).rename(target)


def remove_unfinished(folder: Path) -> None:
    """What a killed process, or a save that failed, left half-written."""
    for path in folder.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(path, ignore_errors=True)


# --- errors ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def disk_errors(where: str | Path) -> Iterator[None]:
    """Turns a full disk, an exceeded quota or a file-size limit, however it is reported, into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        code = _errno(error)
        if code in DISK_FULL:
            raise UserError(
                f"no space to write {where} ({errno.errorcode[code]}); earlier checkpoints are intact: make room and "
                "run the same command again"
            ) from error
        if code in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(f"cannot write {where} ({errno.errorcode[code]})") from error
        raise


def _errno(error: BaseException | None) -> int | None:
    """The errno of an OSError, or of TensorStore's text, of the error or of what caused it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error.errno
        if match := re.search(r"os_error_code='(\d+)'", str(error)):
            return int(match[1])
        error = error.__cause__
    return None


def quieten() -> None:
    """Orbax logs the traceback of an error that it also raises; one line is enough, and we print that."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    previous = sys.unraisablehook
    if getattr(previous, "drops_closed_loops", False):
        return

    def hook(unraisable: Any) -> None:
        # TensorStore reports to an event loop that Orbax has already closed after the first error.
        if "Event loop is closed" not in str(unraisable.exc_value):
            previous(unraisable)

    hook.drops_closed_loops = True
    sys.unraisablehook = hook
