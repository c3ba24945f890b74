"""Padding anywhere in a row becomes padding at its end, and outputs find their way back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.models import padding


def test_padding_moves_behind_real_tokens_in_their_order():
    tokens = jnp.array([[7, 5, 6, 8], [1, 2, 3, 4], [9, 9, 2, 1]])
    ids = jnp.array([[0, 1, 0, 2], [1, 1, 2, 2], [0, 0, 3, 3]])
    door = padding.enter(tokens, ids)
    np.testing.assert_array_equal(door.tokens, [[5, 8, 7, 6], [1, 2, 3, 4], [2, 1, 9, 9]])
    np.testing.assert_array_equal(door.segment_ids, [[1, 2, 0, 0], [1, 1, 2, 2], [3, 3, 0, 0]])
    np.testing.assert_array_equal(door.leave(door.tokens), tokens)


@pytest.mark.parametrize("ids", [[[2, 1]], [[-1, 1]], [[3, 0, 2]]])
def test_concrete_ids_that_break_the_contract_are_an_error(ids):
    ids = jnp.array(ids)
    with pytest.raises(ValueError, match="never decrease"):
        padding.enter(ids, ids)


def test_traced_ids_are_clamped_as_documented():
    ids = jnp.array([[1, 3, 2, -5, 0, 4]])
    door = jax.jit(lambda ids: padding.enter(ids, ids))(ids)
    np.testing.assert_array_equal(door.segment_ids, [[1, 3, 3, 4, 0, 0]])
