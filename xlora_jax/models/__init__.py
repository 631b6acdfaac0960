"""Base models in Flax. They are independent of gating, and mix experts in every layer that is given some."""

from xlora_jax.models.cache import Cache, KVCache, PairedCache, Place
from xlora_jax.models.config import DecoderConfig, RoutedMLP
from xlora_jax.models.decoder import Decoder
from xlora_jax.models.encoder import Encoder, EncoderConfig, VisionTransformer
from xlora_jax.models.protocol import BaseModule
from xlora_jax.models.rope import Rope
from xlora_jax.models.transformer import DecoderOutput, Transformer

__all__ = [
    "BaseModule",
    "Cache",
    "Decoder",
    "DecoderConfig",
    "DecoderOutput",
    "Encoder",
    "EncoderConfig",
    "KVCache",
    "PairedCache",
    "Place",
    "Rope",
    "RoutedMLP",
    "Transformer",
    "VisionTransformer",
]
