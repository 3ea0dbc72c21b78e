"""Let Gemma 3n compute the same without a cache as with one.

Its last layers read the keys and values of earlier ones. mlx-lm 0.32 finds them only in a cache: without one, as in
training and scoring, such a layer makes its own, from weights that generation never uses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gemma3n

KeysValues = tuple[mx.array, mx.array]


class _Given:
    """A substitute for the cache of a layer that reads an earlier one's keys and values."""

    def __init__(self, keys: mx.array, values: mx.array) -> None:
        self._both = keys, values

    def keys_and_values(self) -> KeysValues:
        return self._both


class _Attention(gemma3n.Gemma3nAttention):
    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None, offset: int = 0) -> mx.array:
        # Until here a plain tuple of arguments of the block: their gradient passes through a checkpointed block.
        return super().__call__(x, mask, _Given(*cache) if isinstance(cache, (tuple, list)) else cache, offset)


class _Model(gemma3n.LanguageModel):
    def __call__(self, inputs: Any = None, cache: Any = None, input_embeddings: Any = None) -> mx.array:
        if cache is not None:
            return super().__call__(inputs, cache, input_embeddings)
        layers, given = self["layers"], dict[int, KeysValues]()
        sources = self.layer_idx_to_cache_idx

        def sharing(i: int, layer: nn.Module) -> Callable[..., mx.array]:
            def call(h: mx.array, mask: Any, _: None, per_layer_input: mx.array, offset: int) -> mx.array:
                if i in sources[self.first_kv_shared_layer_idx :]:
                    given[i] = _keys_and_values(layer, h)
                return layer(h, mask, given[sources[i]] if sources[i] != i else None, per_layer_input, offset=offset)

            return call

        self.layers = [sharing(i, layer) for i, layer in enumerate(layers)]
        try:
            return super().__call__(inputs, None, input_embeddings)
        finally:
            self.layers = layers


def _keys_and_values(layer: nn.Module, h: mx.array) -> KeysValues:
    """Return keys and values of a block's attention for the block's input (streams, B, T, D)."""
    x = layer.input_layernorm(layer.altup.predict(h)[layer.config.altup_active_idx])
    own = layer.self_attn
    keys, values = (f(x).reshape(*x.shape[:2], -1, own.head_dim) for f in (own.k_proj, own.v_proj))
    return own.rope(own.k_norm(keys).transpose(0, 2, 1, 3)), own.v_norm(values).transpose(0, 2, 1, 3)


def share_without_cache(model: nn.Module) -> None:
    """Pass keys and values from layer to layer when there is no cache."""
    text = model.model.language_model
    text.__class__ = _Model
    for layer in text.layers:
        layer.self_attn.__class__ = _Attention
