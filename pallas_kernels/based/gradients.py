"""The one custom_vjp of the op, over the `forward` and `backward` that every implementation offers.

Second derivatives are those of the chunked XLA form, whatever computed the first ones. Forward mode (jax.jvp) raises JAX's
TypeError for a custom_vjp; implementation="reference" has it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from pallas_kernels.based import chunked, dispatch
from pallas_kernels.based.dispatch import How


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def call(how: How, q: Any, k: Any, v: Any, state: Any, ids: Any) -> Any:
    """(y, den, final state). den is for the backward pass: its own gradient is taken to be zero."""
    return dispatch.forward(how, q, k, v, state, ids)


def _call_forward(how, *marked):
    given = jax.tree.map(lambda x: x.value, marked, is_leaf=lambda x: hasattr(x, "perturbed"))
    # `call` again, not dispatch.forward: so a derivative of this pass, too, is the one below.
    y, den, final = call(how, *given)
    return (y, den, final), (*given, y, den)


def _call_backward(how, kept, cotangents):
    dy, _, dstate = cotangents
    if isinstance(dstate, SymbolicZero):
        dstate = None  # nothing depends on the final state
    dy = jnp.zeros(dy.shape, dy.dtype) if isinstance(dy, SymbolicZero) else dy
    return *_pull(how, *kept, dy, dstate), None


call.defvjp(_call_forward, _call_backward, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _pull(how, q, k, v, state, ids, y, den, dy, dstate):
    return dispatch.backward(how, q, k, v, state, ids, y, den, dy, dstate)


def _pull_forward(how, *args):
    return _pull(how, *args), args


def _pull_backward(how, args, cotangents):
    q, k, v, state, ids, _, _, dy, dstate = args
    fixed = dict(normalize=how.normalize, epsilon=how.epsilon)

    def gradients(q, k, v, state, dy, dstate):
        # y and den are functions of the rest here, so that their arguments above get no gradient of their own.
        y, den, _ = chunked.forward(q, k, v, state, ids, **fixed)
        return chunked.backward(q, k, v, state, ids, y, den, dy, dstate, **fixed)

    _, transposed = jax.vjp(gradients, q, k, v, state, dy, dstate)
    *dtokens, ddy, ddstate = transposed(cotangents)
    return *dtokens, None, None, None, ddy, ddstate


_pull.defvjp(_pull_forward, _pull_backward)
