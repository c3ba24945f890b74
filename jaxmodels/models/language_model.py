"""A causal language model: embedding, blocks around any mixers of the registry, norm, tied head."""

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.core import FrozenDict
from jaxtyping import Array, Float, Int

from jaxmodels.mixers import segments
from jaxmodels.mixers.registry import MIXERS
from jaxmodels.models import padding
from jaxmodels.models.backbone import CHANNELS, NORMS, Block
from jaxmodels.typing import Dtype, State


class LanguageModel(nn.Module):
    """logits, state = model(tokens, state=None, segment_ids=None); see `build_language_model` for the fields.

    Padding (segment id 0) may stand anywhere in a row; its logits mean nothing. A given state comes back updated, so
    that prefill in pieces and decoding are the same call.
    """

    vocab_size: int
    d_model: int
    num_layers: int
    mixers: Sequence[Mapping[str, Any]]
    norm: str = "layernorm"
    norm_epsilon: float = 1e-5
    channel: str | None = None
    channel_multiplier: float = 4.0
    max_positions: int = 0
    tie_embeddings: bool = True
    embed_dropout: float = 0.0
    resid_dropout: float = 0.0
    initializer_range: float = 0.02
    remat: bool = False
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.nowrap
    def layer_mixer(self, layer: int, **attributes: Any) -> nn.Module:
        """The mixer of one layer, built from its fields: layer i uses mixers[i mod n]."""
        fields = dict(self.mixers[layer % len(self.mixers)])
        return MIXERS[fields.pop("name")](
            d_model=self.d_model,
            **{**self._common(), **fields},
            **attributes,
        )

    @nn.nowrap
    def _common(self) -> dict[str, Any]:
        """Types and initialisers, as Zoology draws them: N(0, .02), outputs .02 / sqrt(2 layers)."""
        scale = self.initializer_range
        return dict(
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=nn.initializers.normal(scale),
            out_kernel_init=nn.initializers.normal(scale / math.sqrt(2 * self.num_layers)),
        )

    @nn.nowrap
    def init_state(
        self, batch_size: int, max_len: int, dtype: Dtype | None = None
    ) -> dict[str, Any]:
        """The empty state of every layer, for sequences of up to max_len tokens."""
        dtype = self.dtype if dtype is None else dtype
        layers = [
            self.layer_mixer(i, parent=None).init_state(batch_size, max_len, dtype)
            for i in range(self.num_layers)
        ]
        state = {"layers": layers}
        return state | ({"cursor": segments.init_cursor(batch_size)} if self.max_positions else {})

    def setup(self) -> None:
        normal = nn.initializers.normal(self.initializer_range)
        embed = dict(features=self.d_model, embedding_init=normal, param_dtype=self.param_dtype)
        self.embed = nn.Embed(self.vocab_size, **embed)
        if self.max_positions:
            self.position_embed = nn.Embed(self.max_positions, **embed)
        block = nn.remat(Block) if self.remat else Block
        self.layers = [
            block(
                mixer=self.layer_mixer(i),
                d_model=self.d_model,
                norm=self.norm,
                norm_epsilon=self.norm_epsilon,
                channel=self.channel,
                channel_multiplier=self.channel_multiplier,
                dropout=self.resid_dropout,
                **self._common(),
            )
            for i in range(self.num_layers)
        ]
        self.final_norm = NORMS[self.norm](
            epsilon=self.norm_epsilon, dtype=self.dtype, param_dtype=self.param_dtype
        )
        self.embed_drop = nn.Dropout(self.embed_dropout)
        if not self.tie_embeddings:
            self.lm_head = self.param(
                "lm_head", normal, (self.d_model, self.vocab_size), self.param_dtype
            )

    def hidden(
        self,
        tokens: Int[Array, "b t"],
        state: State | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b t d"], State | None]:
        """The normalised output of the last block, which `head` turns into logits."""
        door = None if segment_ids is None else padding.enter(tokens, segment_ids)
        if door is not None:
            tokens, segment_ids = door.tokens, door.segment_ids
        x = self.embed(tokens)
        after: State = {}
        if self.max_positions:
            x = x + self._positions(tokens, state, segment_ids, after)
        x = x.astype(jnp.promote_types(self.dtype, jnp.float32))
        x = self.embed_drop(x, deterministic=not self.has_rng("dropout"))
        before = [None] * self.num_layers if state is None else state["layers"]
        states = []
        for layer, layer_state in zip(self.layers, before):
            x, layer_state = layer(x, layer_state, segment_ids)
            states.append(layer_state)
        x = self.final_norm(x)
        if door is not None:
            x = door.leave(x)
        return x, None if state is None else {"layers": states, **after}

    def _positions(self, tokens, state, segment_ids, after) -> Float[Array, "b t d"]:
        """Learned embeddings of the position inside the segment; past the table's end, the last one."""
        if tokens.shape[1] > self.max_positions:
            raise ValueError(
                f"{tokens.shape[1]} tokens do not fit the {self.max_positions} learned positions; raise max_positions"
            )
        where = segments.layout(segment_ids, state and state["cursor"], *tokens.shape)
        if state is not None:
            after["cursor"] = where.cursor
        return self.position_embed(jnp.minimum(where.positions, self.max_positions - 1))

    def head(self, hidden: Float[Array, "*rows d"]) -> Float[Array, "*rows vocab"]:
        """Logits, float32 or wider; call it on the rows that need them."""
        wide = jnp.promote_types(self.dtype, jnp.float32)
        kernel = self.embed.embedding.T if self.tie_embeddings else self.lm_head
        return jnp.matmul(
            hidden.astype(self.dtype), kernel.astype(self.dtype), preferred_element_type=wide
        )

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        state: State | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b t vocab"], State | None]:
        x, state = self.hidden(tokens, state, segment_ids)
        return self.head(x), state


def build_language_model(**fields: Any) -> LanguageModel:
    """A LanguageModel from plain values, as a config holds them.

    vocab_size, d_model, num_layers: the sizes.
    mixers: a list of {"name": one of the registry, field: value, ...}; layer i uses mixers[i mod n].
    norm: "layernorm" or "rmsnorm". channel: None, "identity" (Zoology), "mlp" or "swiglu".
    max_positions: learned positions, 0 for none. remat: recompute each block in the backward pass.
    dtype: of the computation ("bfloat16" or a jnp dtype); param_dtype: of the parameters.

    Raises ValueError, one line, for an unknown mixer, field, norm or channel, naming the nearest or all of the known.
    """
    _check_fields("the model", fields, LanguageModel)
    missing = {"vocab_size", "d_model", "num_layers", "mixers"} - set(fields)
    if missing:
        raise ValueError(f"the model needs {', '.join(sorted(missing))}")
    mixers = [dict(m) for m in fields["mixers"]]
    if not mixers:
        raise ValueError(f"model.mixers is empty; name at least one of {', '.join(sorted(MIXERS))}")
    for mixer in mixers:
        name = mixer.get("name")
        if name not in MIXERS:
            raise ValueError(f"unknown mixer {name!r}; there are {', '.join(sorted(MIXERS))}")
        _check_fields(f"mixer {name}", mixer, MIXERS[name])
    for field, known in (("norm", tuple(NORMS)), ("channel", CHANNELS)):
        if fields.get(field, known[0]) not in known:
            raise ValueError(
                f"unknown {field} {fields[field]!r}; there are {', '.join(map(str, known))}"
            )
    types = {k: jnp.dtype(fields[k]) for k in ("dtype", "param_dtype") if fields.get(k) is not None}
    # frozen, so that a model can be hashed: it is a static argument of compiled functions
    return LanguageModel(**{**fields, **types, "mixers": tuple(map(FrozenDict, mixers))})


def _check_fields(what: str, given: Mapping[str, Any], module: type[nn.Module]) -> None:
    known = {f.name for f in dataclasses.fields(module)} - {"parent", "name"}
    for key in set(given) - known - {"name"}:
        near = difflib.get_close_matches(key, known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(sorted(known))}"
        raise ValueError(f"{what} has no field {key!r}{hint}")
