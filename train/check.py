"""Whether a config can be trained at all: everything that can be said without a device, before anything is
written. What depends on the devices (config.mesh) is checked by `train.sharding.make_mesh`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from train.config import base_config
from train.config_paths import Config, get_key, nearest
from train.errors import UserError
from train.sweep import Job, expand_jobs

CHOICES: dict[str, tuple[str, ...]] = {
    "data.mode": ("device", "zoology"),
    "model.dtype": ("float32", "bfloat16"),
    "plot": ("", "recall_memory", "based_fig2", "accuracy_width", "zoology_fig2"),
}
AT_LEAST: dict[str, float] = {
    **dict.fromkeys(("steps", "batch_size", "steps_per_call", "max_bad_steps"), 1),
    **dict.fromkeys(("model.vocab_size", "model.d_model", "model.num_layers"), 1),
    **dict.fromkeys(("data.num_passes", "data.test_batch_size", "data.power_a"), 0),
    **dict.fromkeys(("model.max_positions", "model.norm_epsilon", "model.initializer_range"), 0),
    **dict.fromkeys(("checkpoint.every_seconds", "checkpoint.every_steps"), 0),
    **dict.fromkeys(("checkpoint.keep_latest", "optimizer.accumulate"), 1),
    **dict.fromkeys(("checkpoint.keep_best", "learning_rate", "seed"), 0),
    **dict.fromkeys(("log.every_steps", "eval.every_steps"), 1),
}
FRACTIONS = ("model.embed_dropout", "model.resid_dropout", "optimizer.final_fraction")


def check(config: Config) -> None:
    """Raises UserError for the first value that cannot work. A suite or a sweep is checked run by run."""
    _check_known(config)
    if config.runs or config.sweep:
        for job in expand_jobs(config):
            _check_job(job)
        return
    _check_values(config)
    _check_optimizer(config)
    check_model(config)
    _check_task(config)


def _check_job(job: Job) -> None:
    """One point whole, and of the others what a learning rate or a seed can break."""
    first, *others = job.points
    for point, check_it in ((first, check), *((p, _check_numbers) for p in others)):
        try:
            check_it(point.config)
        except UserError as error:
            if not point.name:
                raise
            raise UserError(f"run {point.name!r}: {error}") from error
    if len(job.points) > 1 and job.config.log.wandb:
        raise UserError(
            "config.log.wandb=true cannot follow the points of a grid, which train at the same time; leave it out (every point "
            "has its metrics.jsonl and TensorBoard events)"
        )


def _check_numbers(config: Config) -> None:
    _check_values(config)
    _check_optimizer(config)


def _check_known(config: Config) -> None:
    """A config file that starts from something else than base_config() may lack keys or have others."""
    base = base_config()
    for group in base:
        if group not in config:
            raise UserError(
                f"the config has no config.{group}; start it from train.config.base_config()"
            )
        if hasattr(base[group], "keys"):
            lacking = [key for key in base[group] if key not in config[group]]
            if lacking:
                raise UserError(
                    f"the config has no config.{group}.{lacking[0]}; start it from base_config()"
                )


def _check_values(config: Config) -> None:
    for path, allowed in CHOICES.items():
        value = get_key(config, path)
        if value not in allowed:
            near = nearest(str(value), list(allowed))
            hint = f"; did you mean {near}?" if near else ""
            raise UserError(
                f"config.{path} must be one of {', '.join(a for a in allowed if a)}, got {value!r}{hint}"
            )
    for path, least in AT_LEAST.items():
        if get_key(config, path) < least:
            raise UserError(
                f"config.{path} must be at least {least:g}, got {get_key(config, path)}"
            )
    seed = config.data.seed
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or seed < 0):
        raise UserError(f"config.data.seed must be a number from 0 on or None, got {seed!r}")
    for path in FRACTIONS:
        if not 0 <= get_key(config, path) < 1:
            raise UserError(f"config.{path} must be in [0, 1), got {get_key(config, path)}")


def _check_optimizer(config: Config) -> None:
    from train.optimizer import make_optimizer, make_schedule

    make_optimizer(config)
    make_schedule(config)


def check_model(config: Config) -> None:
    """Builds the model, and its parameters as shapes only, so that an impossible shape is found here."""
    import jax
    import jax.numpy as jnp

    from jaxmodels.models.language_model import build_language_model

    mixers = config.model.mixers
    if not all(
        isinstance(mixer, Mapping) and isinstance(mixer.get("name"), str) for mixer in mixers
    ):
        raise UserError(
            "config.model.mixers must be a list of {'name': ..., field: value}, got " + repr(mixers)
        )
    try:
        model = build_language_model(**config.model.to_dict())
        for i, mixer in enumerate(mixers):
            _check_mixer(f"config.model.mixers[{i}]", mixer)
        tokens = jnp.zeros((1, min(config.model.max_positions or 8, 8)), jnp.int32)
        jax.eval_shape(model.init, jax.random.key(0), tokens)
    except (ValueError, TypeError) as error:
        raise UserError(f"config.model: {str(error).splitlines()[0]}") from error


def _check_mixer(path: str, mixer: Mapping[str, Any]) -> None:
    """Fields hold what their defaults are: a number, a word, a switch."""
    from jaxmodels.mixers.registry import MIXERS

    defaults = {field.name: field.default for field in dataclasses.fields(MIXERS[mixer["name"]])}
    for key, value in mixer.items():
        default = defaults.get(key)
        if callable(default):
            raise UserError(f"{path}.{key} is a function and cannot be set in a config")
        wanted = {bool: bool, int: int, float: (int, float), str: str}.get(type(default))
        if key == "name" or wanted is None:
            continue
        if not isinstance(value, wanted) or (isinstance(value, bool) and type(default) is not bool):
            raise UserError(f"{path}.{key} must be like its default {default!r}, got {value!r}")


def _check_task(config: Config) -> None:
    """The task's own checks."""
    from train.tasks import CHECKS

    if config.task not in CHECKS:
        near = nearest(config.task, list(CHECKS))
        hint = f"; did you mean {near}?" if near else ""
        raise UserError(
            f"config.task must be one of {', '.join(CHECKS)}, got {config.task!r}{hint}"
        )
    CHECKS[config.task](config)
