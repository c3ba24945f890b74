"""What a model remembers per sequence, in bytes: the real state, and the papers' count."""

import jax

from jaxmodels.models.language_model import LanguageModel


def state_bytes(model: LanguageModel, max_len: int) -> int:
    """Bytes of the state that decoding one sequence of max_len tokens really carries, float32 caches."""
    state = jax.eval_shape(lambda: model.init_state(1, max_len, "float32"))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def legacy_state_bytes(model: LanguageModel, length: int) -> int:
    """The count behind the published recall-memory figures (Zoology's `state_size`): four bytes per element it counts."""
    layers = (model.layer_mixer(i, parent=None) for i in range(model.num_layers))
    return 4 * sum(mixer.legacy_state_elements(length) for mixer in layers)
