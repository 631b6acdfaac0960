"""Base models in Flax: they know nothing of gating, and mix experts wherever they are given any."""

from xlora_jax.models.base import BaseModule
from xlora_jax.models.cache import Cache, KVCache, PairedCache, Place
from xlora_jax.models.declaration import DecoderConfig, RoutedMLP
from xlora_jax.models.decoder import Decoder, DecoderOutput
from xlora_jax.models.rope import Rope

__all__ = [
    "BaseModule",
    "Cache",
    "Decoder",
    "DecoderConfig",
    "DecoderOutput",
    "KVCache",
    "PairedCache",
    "Place",
    "Rope",
    "RoutedMLP",
]
