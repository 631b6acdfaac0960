"""Base models in Flax: they know nothing of gating, and mix experts wherever they are given any."""

from xlora_jax.models.cache import KVCache
from xlora_jax.models.declaration import DecoderConfig, RoutedMLP
from xlora_jax.models.decoder import Decoder, DecoderOutput
from xlora_jax.models.rope import Rope

__all__ = ["Decoder", "DecoderConfig", "DecoderOutput", "KVCache", "Rope", "RoutedMLP"]
