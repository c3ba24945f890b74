"""Multi-query associative recall (MQAR), generated on device: example i of a segment is a function of (seed, i) alone.

A row of `length` tokens is a context and a query region.

    context       k_1 v_1 ... k_n v_n, written num_passes times          (n = num_kv_pairs)
    query region  `space` slots of two tokens; key k_j stands on the first token of slot g_j and is labelled v_j

Keys are drawn without replacement from [1, V // 2), values from [V // 2, V), slots from [0, space) with
p(g) proportional to a (g + 1)^(a - 1), all uniform choices within an example. Every token that holds nothing is 0, or, with
`random_non_queries`, uniform on [0, V): it may repeat a key or a value of the row, which distracts and never mislabels.

Source: Arora, Eyuboglu et al., "Zoology: Measuring and Improving Recall in Efficient Language Models" (2023),
appendix on the synthetic; multi-pass contexts: Arora et al., "Just Read Twice" (2024).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, UInt32

# The streams of random bits of an example. The filler has its own, so that switching it off changes no key.
_STRUCTURE, _FILLER = 0, 1
_TAKEN_NOTHING = 2**30  # larger than any token


@dataclasses.dataclass(frozen=True)
class Segment:
    """One kind of MQAR row, and how many different ones there are.

    `num_examples=None` is an endless supply. The probability of slot g does not depend on the factor a of the power law,
    so only its exponent matters: `power_a` near 0 puts the queries close to the context, 1 spreads them evenly.

    Raises:
      ValueError: one line that says what was wrong and what would be right. The capacity rule and a vocabulary larger
        than the length together guarantee enough keys (V / 2 - 1 >= 2 n - 1 >= n) and values.
    """

    length: int
    num_kv_pairs: int
    num_examples: int | None = None
    vocab_size: int = 8192
    power_a: float | int = 0.01
    random_non_queries: bool = True
    num_passes: int = 1
    seed: int = 0

    def __post_init__(self):
        for name in ("length", "num_kv_pairs", "num_passes", "vocab_size", "num_examples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in [0, {2**32 - 1}], got {self.seed}")
        if not (math.isfinite(self.power_a) and self.power_a > 0):
            raise ValueError(
                "power_a must be a positive number (0.01 in the papers, 1 spreads the queries evenly), "
                f"got {self.power_a}"
            )
        _check_room(self)

    @property
    def context(self) -> int:
        """Tokens before the query region."""
        return 2 * self.num_kv_pairs * self.num_passes

    @property
    def space(self) -> int:
        """Slots of the query region."""
        return (self.length - self.context) // 2

    @property
    def num_keys(self) -> int:
        """Keys of the vocabulary: the tokens 1 ... num_keys."""
        return self.vocab_size // 2 - 1

    @property
    def num_values(self) -> int:
        """Values of the vocabulary: the tokens from vocab_size // 2 on."""
        return self.vocab_size - self.vocab_size // 2


def examples(segment: Segment, indices: UInt32[Array, "b"]) -> dict[str, Int[Array, "b _"]]:
    """The examples with these indices, whatever else is in the batch.

    Returns int32 arrays: `tokens` [b, length]; `positions` [b, n] and `labels` [b, n], pair by pair in the order of the
    context: the j-th key of the context is asked for at positions[:, j], where labels[:, j] is right.
    """
    keys, values, slots = draw(segment, indices)
    filler = fill(segment, indices) if segment.random_non_queries else None
    return assemble(segment, keys, values, slots, filler)


def draw(
    segment: Segment, indices: UInt32[Array, "b"]
) -> tuple[Int[Array, "b n"], Int[Array, "b n"], Int[Array, "b n"]]:
    """The keys, the values and the slots of the queries of each example, in the order of the context."""
    n, space = segment.num_kv_pairs, segment.space
    bits = _bits(segment.seed, _STRUCTURE, indices, 2 * n + space)
    keys = 1 + without_replacement(bits[:, :n], segment.num_keys)
    values = segment.vocab_size // 2 + without_replacement(bits[:, n : 2 * n], segment.num_values)
    slots = power_law_slots(bits[:, 2 * n :], n, segment.power_a)
    return keys, values, slots


def fill(segment: Segment, indices: UInt32[Array, "b"]) -> Int[Array, "b r"]:
    """Uniform tokens of [0, vocab_size) for the whole query region, r = 2 space, of each example.

    A 32-bit word modulo the vocabulary: exact for a power of two, otherwise no token is favoured by more than V / 2^32.
    """
    bits = _bits(segment.seed, _FILLER, indices, 2 * segment.space)
    return (bits % jnp.uint32(segment.vocab_size)).astype(jnp.int32)


def assemble(
    segment: Segment,
    keys: Int[Array, "b n"],
    values: Int[Array, "b n"],
    slots: Int[Array, "b n"],
    filler: Int[Array, "b r"] | None,
) -> dict[str, Int[Array, "b _"]]:
    """Rows from their parts; see `examples` for what comes back. `filler=None` leaves zeros."""
    b = keys.shape[0]
    pairs = jnp.stack([keys, values], axis=-1).reshape(b, -1)
    context = jnp.tile(pairs, (1, segment.num_passes))
    region = jnp.zeros((b, 2 * segment.space), jnp.int32) if filler is None else filler
    region = jnp.put_along_axis(region, 2 * slots, keys, axis=1, inplace=False)
    return {
        "tokens": jnp.concatenate([context, region], axis=1).astype(jnp.int32),
        "positions": (segment.context + 2 * slots).astype(jnp.int32),
        "labels": values.astype(jnp.int32),
    }


def without_replacement(bits: UInt32[Array, "b n"], size: int) -> Int[Array, "b n"]:
    """n different numbers of [0, size) in every row, every ordered choice equally likely (up to size / 2^32).

    The range shrinks: draw j is a rank r among the size - j numbers not yet taken. With the taken ones sorted as
    t_0 < t_1 < ..., the number of that rank is r + #{m : t_m - m <= r}, because t_m - m free numbers lie below t_m. That is
    O(n^2) comparisons and no memory beyond [b, n], where a permutation would touch `size` numbers a row.
    The batch is the minor dimension inside the loop: twice as fast on a CPU as [b, n] (measured).
    """
    n = bits.shape[1]
    steps = jnp.arange(n, dtype=jnp.uint32)[:, None]
    ranks = (bits.T % (jnp.uint32(size) - steps)).astype(jnp.int32)
    below = steps.astype(jnp.int32)

    def body(j, carry):
        taken, drawn = carry
        rank = jax.lax.dynamic_slice_in_dim(ranks, j, 1)
        value = rank + jnp.sum(taken - below <= rank, axis=0, keepdims=True, dtype=jnp.int32)
        # insert: entries below stay, the first one above becomes the value, the rest move up by one
        stays = taken < value
        previous_stays = jnp.concatenate([jnp.ones_like(stays[:1]), stays[:-1]])
        moved = jnp.concatenate([taken[:1], taken[:-1]])
        taken = jnp.where(stays, taken, jnp.where(previous_stays, value, moved))
        return taken, jax.lax.dynamic_update_slice_in_dim(drawn, value, j, axis=0)

    empty = jnp.full_like(ranks, _TAKEN_NOTHING)
    return jax.lax.fori_loop(0, n, body, (empty, ranks))[1].T


def power_law_slots(
    bits: UInt32[Array, "b space"], count: int, power_a: float | int
) -> Int[Array, "b count"]:
    """`count` different slots of [0, space) in every row, drawn one after the other with p(g) ~ (g + 1)^(power_a - 1).

    An exponential race: slot g arrives at time E_g / p(g), E_g ~ Exp(1), and the first `count` arrivals, in order, are
    distributed exactly as successive draws without replacement. Compared in logarithms (the Gumbel top-k trick), which
    no power overflows. E = -log(1 - u) with u = (bits + 1/2) / 2^32, whose float32 is finest near 0, where races are
    decided.
    """
    u = (bits.astype(jnp.float32) + 0.5) * jnp.float32(2**-32)
    slot = jnp.arange(1, bits.shape[1] + 1, dtype=jnp.float32)
    earliness: Float[Array, "b space"]
    earliness = jnp.float32(power_a - 1) * jnp.log(slot) - jnp.log(-jnp.log1p(-u))
    return jax.lax.top_k(earliness, count)[1].astype(jnp.int32)


def _bits(seed: int, stream: int, indices: Array, count: int) -> Array:
    """[b, count] random words, row by row from fold_in(stream of the seed, index)."""
    key = jax.random.fold_in(jax.random.key(jnp.uint32(seed), impl="threefry2x32"), stream)
    row = lambda index: jax.random.bits(jax.random.fold_in(key, index), (count,), jnp.uint32)
    return jax.vmap(row)(indices)


def _check_room(segment: Segment) -> None:
    length, n, passes = segment.length, segment.num_kv_pairs, segment.num_passes
    if length % 2:
        raise ValueError(
            f"length {length} is odd, but keys and values come in pairs; use {length + 1}"
        )
    share = 2 * (passes + 1)
    if share * n > length:
        raise ValueError(
            f"{share}*kv > length: {n} pairs in {passes} pass{'es' * (passes > 1)} and their queries need "
            f"{share * n} tokens, length is {length}; use length {share * n} or more, or at most {length // share} pairs"
        )
    if segment.vocab_size <= length:
        raise ValueError(
            f"vocab_size {segment.vocab_size} must be larger than length {length}; use {length + 1} or more"
        )
