"""Feature maps: plain functions of [..., f]. Learned maps live with their parameters, in jaxmodels."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def identity(x: Float[Array, "*rows f"]) -> Float[Array, "*rows f"]:
    """x."""
    return x


def elu_plus_one(x: Float[Array, "*rows f"]) -> Float[Array, "*rows f"]:
    """elu(x) + 1 > 0 (arXiv 2006.16236)."""
    return jax.nn.elu(x) + 1


def relu(x: Float[Array, "*rows f"]) -> Float[Array, "*rows f"]:
    """max(x, 0)."""
    return jax.nn.relu(x)


def squared_relu(x: Float[Array, "*rows f"]) -> Float[Array, "*rows f"]:
    """max(x, 0)^2."""
    return jnp.square(jax.nn.relu(x))


def cosformer(
    x: Float[Array, "b t h f"], positions: Int[Array, "b t"], max_len: int
) -> Float[Array, "b t h 2*f"]:
    """relu(x) times [cos, sin](pi i / (2 max_len)): phi(q_i) . phi(k_j) = relu(q) . relu(k) cos(pi (i - j) / (2 max_len)).

    arXiv 2202.08791, equation 10. Not negative while positions stay below max_len.
    """
    angle = (jnp.pi / (2 * max_len) * positions)[..., None, None].astype(x.dtype)
    x = jax.nn.relu(x)
    return jnp.concatenate([x * jnp.cos(angle), x * jnp.sin(angle)], axis=-1)


def performer_projection(key: jax.Array, f: int, features: int) -> Float[Array, "f m"]:
    """Columns of orthogonal directions, in blocks of f, with the lengths of Gaussian vectors (arXiv 2009.06794, section 2.4)."""
    blocks = -(-features // f)
    directions, lengths = jax.random.split(key)
    q, r = jnp.linalg.qr(jax.random.normal(directions, (blocks, f, f)))
    # The signs that make the distribution uniform over rotations.
    q = q * jnp.sign(jnp.diagonal(r, axis1=-2, axis2=-1))[:, None, :]
    columns = jnp.moveaxis(q, 0, 1).reshape(f, blocks * f)[:, :features]
    return columns * jnp.linalg.norm(jax.random.normal(lengths, (f, features)), axis=0)


def performer(
    x: Float[Array, "*rows f"], projection: Float[Array, "f m"], *, query: bool
) -> Float[Array, "*rows m"]:
    """exp(x' w - |x'|^2 / 2) / sqrt(m), x' = x / f^(1/4): an unbiased estimate of exp(q . k / sqrt(f)), all positive.

    arXiv 2009.06794, lemma 1. A query's largest exponent is taken out of its row, which a normalised op does not see. A
    key's is not: it would have to be shared by all keys, those to come included.
    """
    f, m = projection.shape
    x = x * f**-0.25
    exponent = x @ projection.astype(x.dtype) - 0.5 * jnp.sum(x * x, axis=-1, keepdims=True)
    if query:
        exponent = exponent - jax.lax.stop_gradient(jnp.max(exponent, axis=-1, keepdims=True))
    return jnp.exp(exponent) * m**-0.5
