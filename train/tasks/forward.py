"""The part of a loss that every task shares: the model without its head, and what its layers sowed."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jaxtyping import Float, Int, PRNGKeyArray

from jaxmodels.typing import Params


def hidden_states(
    model: nn.Module,
    params: Params,
    tokens: Int[Array, "b t"],
    rng: PRNGKeyArray | None,
    segment_ids: Int[Array, "b t"] | None = None,
) -> tuple[Float[Array, "b t d"], Float[Array, ""] | None]:
    """(model.hidden of a training step, the sum of every auxiliary loss sown into `losses` or None where there is none)."""
    packing = {} if segment_ids is None else {"segment_ids": segment_ids}
    (hidden, _), sown = model.apply(
        {"params": params},
        tokens,
        **packing,
        method="hidden",
        mutable=["losses"],
        rngs={} if rng is None else {"dropout": rng},
    )
    auxiliary = [jnp.sum(leaf) for leaf in jax.tree.leaves(sown)]
    return hidden, jnp.sum(jnp.stack(auxiliary)) if auxiliary else None
