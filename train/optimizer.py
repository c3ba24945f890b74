"""Optimisers, learning rates and weight-decay masks, each named in one dict.

Every optimiser is built at learning rate 1, so that its update u is a direction, and the step applies

    p <- p + eta(step) * u,    u = -(m_hat / (sqrt(v_hat) + eps) + lambda * p)  for AdamW.

The rate is therefore known in one place (and logged), and is a function of the step, not of a counter in the optimiser.
Weight decay is decoupled for all of them: what is subtracted is eta * lambda * p, as torch.optim.AdamW does.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float, Int
from ml_collections import ConfigDict

from train.errors import UserError
from train.sharding import path_name

Schedule = Callable[[Int[Array, ""]], Float[Array, ""]]
Rate = Callable[[Any, Int[Array, ""]], Float[Array, ""]]
Mask = Callable[[Any], Any]
_PER_TOKEN = r"(^|/)(\w*embed\w*|lm_head)(/|$)"  # parameters with a row or a column per token


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """The optimiser of config.optimizer at learning rate 1.

    Raises:
      UserError: an unknown name, decay mask, or a number out of range.
    """
    c = config.optimizer
    for key in ("b1", "b2", "momentum"):
        if not 0 <= c[key] < 1:
            raise UserError(f"config.optimizer.{key} must be in [0, 1), got {c[key]}")
    for key in ("weight_decay", "clip_norm", "eps"):
        if c[key] < 0:
            raise UserError(f"config.optimizer.{key} must not be negative, got {c[key]}")
    mask = _choose(DECAY_MASKS, c.decay_mask, "config.optimizer.decay_mask")
    return _choose(OPTIMIZERS, c.name, "config.optimizer.name")(c, mask)


def make_schedule(config: ConfigDict) -> Schedule:
    """The learning rate as a function of the number of steps taken before this one.

    Raises:
      UserError: as make_rate, or a peak that is not positive.
    """
    rate = make_rate(config)
    if not config.learning_rate > 0:
        raise UserError(f"config.learning_rate must be positive, got {config.learning_rate}")
    return partial(rate, float(config.learning_rate))


def make_rate(config: ConfigDict) -> Rate:
    """(peak, steps taken before this one) -> learning rate. The peak may be traced: config.learning_rate is not read.

    Raises:
      UserError: an unknown name, or lengths that do not fit config.steps.
    """
    c = config.optimizer
    shape = _choose(SCHEDULES, c.schedule, "config.optimizer.schedule")(config)
    if not 0 <= c.warmup_steps < config.steps:
        raise UserError(
            f"config.optimizer.warmup_steps={c.warmup_steps} must lie between 0 and config.steps={config.steps}"
        )
    warmup = int(c.warmup_steps)

    def rate(peak: Any, step: Int[Array, ""]) -> Float[Array, ""]:
        value = peak * shape(step)
        return value * jnp.minimum(1.0, (step + 1) / warmup) if warmup else jnp.asarray(value)

    return rate


# --- optimisers: (config.optimizer, decay mask) -> transformation at learning rate 1 ---------------------------------


def _adamw(c: ConfigDict, mask: Mask) -> optax.GradientTransformation:
    return optax.adamw(1.0, c.b1, c.b2, c.eps, weight_decay=c.weight_decay, mask=mask)


def _sgd(c: ConfigDict, mask: Mask) -> optax.GradientTransformation:
    """Heavy-ball momentum, m <- momentum * m + g."""
    return optax.chain(
        optax.trace(c.momentum) if c.momentum else optax.identity(),
        optax.add_decayed_weights(c.weight_decay, mask) if c.weight_decay else optax.identity(),
        optax.scale(-1.0),
    )


def _lion(c: ConfigDict, mask: Mask) -> optax.GradientTransformation:
    """Sign of interpolated momentum (arXiv 2302.06675); wants a rate 3-10 times below AdamW's and b2 near .99."""
    return optax.lion(1.0, c.b1, c.b2, weight_decay=c.weight_decay, mask=mask)


def _muon(c: ConfigDict, mask: Mask) -> optax.GradientTransformation:
    """Momentum orthogonalised by Newton-Schulz for the matrices of the layers, AdamW for everything else.

    Embeddings and heads are matrices too, but their rows are tokens: they go to AdamW, as its author has it. Updates are
    scaled by .2 sqrt(max(m, n)) so that one learning rate serves both parts (arXiv 2502.16982).
    """
    matrices = optax.contrib.muon(
        1.0,
        beta=c.momentum,
        weight_decay=c.weight_decay,  # both masks decay these
        consistent_rms=0.2,
    )

    def labels(params: Any) -> Any:
        return jax.tree.map(
            lambda inner, p: "muon" if inner and p.ndim == 2 else "adamw",
            decay_matrices(params),
            params,
        )

    return optax.partition({"muon": matrices, "adamw": _adamw(c, mask)}, labels)


OPTIMIZERS: Mapping[str, Callable[[ConfigDict, Mask], optax.GradientTransformation]] = {
    "adamw": _adamw,
    "sgd": _sgd,
    "lion": _lion,
    "muon": _muon,
}


# --- weight-decay masks: params -> tree of bool ----------------------------------------------------------------------


def decay_all(params: Any) -> Any:
    """Every parameter, biases, norms and embeddings included: what the original of the MQAR figures does."""
    return jax.tree.map(lambda p: True, params)


def decay_matrices(params: Any) -> Any:
    """Arrays of two or more dimensions that are neither embeddings nor heads."""
    return jax.tree_util.tree_map_with_path(
        lambda path, p: p.ndim >= 2 and not re.search(_PER_TOKEN, path_name(path)), params
    )


DECAY_MASKS: Mapping[str, Mask] = {"all": decay_all, "matrices": decay_matrices}


# --- schedules: config -> (step -> fraction of the peak); warm-up is multiplied in by make_rate ------------------


def _constant(config: ConfigDict) -> Schedule:
    return lambda step: jnp.ones(())


def _cosine(config: ConfigDict) -> Schedule:
    """final + (1 - final) (1 + cos(pi x)) / 2, x from 0 at the end of the warm-up to 1 at the end of the run."""
    warmup, final = config.optimizer.warmup_steps, config.optimizer.final_fraction
    length = max(config.steps - warmup, 1)

    def shape(step: Int[Array, ""]) -> Float[Array, ""]:
        return _half_cosine(jnp.clip((step - warmup) / length, 0.0, 1.0), final)

    return shape


def _wsd(config: ConfigDict) -> Schedule:
    """Warm-up, stable, decay: 1 until the last decay_steps (a tenth of the run if 0), then linearly down to final."""
    final = config.optimizer.final_fraction
    decay = config.optimizer.decay_steps or max(config.steps // 10, 1)
    if decay < 0 or decay + config.optimizer.warmup_steps > config.steps:
        raise UserError(
            f"config.optimizer.decay_steps={decay} and warmup_steps={config.optimizer.warmup_steps} do not fit "
            f"config.steps={config.steps}"
        )

    def shape(step: Int[Array, ""]) -> Float[Array, ""]:
        x = jnp.clip((step - (config.steps - decay)) / decay, 0.0, 1.0)
        return 1.0 - (1.0 - final) * x

    return shape


def _cosine_per_epoch(config: ConfigDict) -> Schedule:
    """The original's CosineAnnealingLR: the rate of an epoch is constant, (1 + cos(pi epoch / epochs)) / 2 of the peak."""
    length = steps_per_epoch(config)
    epochs = max(-(-config.steps // length), 1)
    final = config.optimizer.final_fraction
    return lambda step: _half_cosine((step // length) / epochs, final)


def steps_per_epoch(config: ConfigDict) -> int:
    """config.optimizer.steps_per_epoch or, where that is 0, the batches of one pass over config.data.train.

    Raises:
      UserError: neither is known (an endless segment).
    """
    if config.optimizer.steps_per_epoch > 0:
        return int(config.optimizer.steps_per_epoch)
    sizes = [segment.get("num_examples") for segment in config.data.get("train", ())]
    if not sizes or None in sizes:
        raise UserError(
            "config.optimizer.schedule=cosine_per_epoch needs config.optimizer.steps_per_epoch, because the training "
            "data has no end"
        )
    return sum(-(-size // config.batch_size) for size in sizes)


def _half_cosine(x: Float[Array, ""], final: float) -> Float[Array, ""]:
    return final + (1.0 - final) * 0.5 * (1.0 + jnp.cos(jnp.pi * x))


SCHEDULES: Mapping[str, Callable[[ConfigDict], Schedule]] = {
    "cosine": _cosine,
    "wsd": _wsd,
    "cosine_per_epoch": _cosine_per_epoch,
    "constant": _constant,
}


def _choose[T](choices: Mapping[str, T], name: str, key: str) -> T:
    if name not in choices:
        raise UserError(f"{key}={name!r} is not one of {', '.join(sorted(choices))}")
    return choices[name]
