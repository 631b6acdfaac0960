"""Settings of a training run."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optax

from xlora_jax.training.optimizers import make_optimizer, make_schedule
from xlora_jax.training.regularizers import Regularizers

__all__ = ["TrainConfig"]

_KINDS: dict[str, Any] = {"int": numbers.Integral, "float": numbers.Real, "bool": bool, "str": str}


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run.

    Attributes:
        steps: number of optimizer steps in the whole run.
        batch_size: number of rows per micro-batch, over all devices.
        accumulate: number of micro-batches per step.
        optimizer: key of :data:`xlora_jax.training.optimizers.OPTIMIZERS`.
        learning_rate: peak learning rate.
        schedule: one of :data:`xlora_jax.training.optimizers.SCHEDULES`.
        warmup: number of linear warm-up steps.
        weight_decay: coefficient of the decoupled weight decay.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: epsilon of adaptive optimizers.
        max_grad_norm: maximum norm of the gradient, which is clipped to it; None for no clipping.
        seed: random seed of data order and dropouts.
        param_dtype: dtype of the trainable parameters; None keeps the loaded dtype.
        gate_dtype: compute dtype of the classifier; None takes the base model's, as PEFT does.
        remat: rematerialization policy, a key of :data:`xlora_jax.models.transformer.REMAT_POLICIES`; None stores all.
        attention: attention implementation, ``xla`` or ``cudnn``; None leaves the choice to JAX.
        loss_chunk: number of positions of a row whose logits exist at a time.
        load_balance: weight of the load-balance loss, see :mod:`xlora_jax.training.regularizers`.
        entropy: weight of the router entropy, see there.
        z_loss: weight of the router z-loss, see there.
        regularize_per_layer: whether to balance the experts within every layer, or over all layers together.
        only_expert: name of an expert: only the gate's outputs for it are trained. None trains the whole gate.
        eval_every: number of steps between evaluations; 0 evaluates at the end only.
        checkpoint_every: number of steps between checkpoints; 0 saves at the end and on SIGTERM only.
        keep_checkpoints: number of the latest checkpoints to keep.
        log_every: number of steps between entries of the metrics.
        max_bad_steps: number of non-finite steps in a row that stops the run.
        balance_steps: number of steps in a row, with an expert below 1 % or above 99 % of the gates, that gives a
            warning; 0 gives none.
        scaling_cache: ``off``, ``memory`` or ``disk``.
        scaling_cache_dtype: element type of the cache, float32 or bfloat16.
        scaling_cache_directory: path for ``scaling_cache="disk"``; None takes ``output/scaling_cache``.
        data: size of the ``data`` mesh axis; -1 takes the devices that the other axes leave.
        fsdp: size of the ``fsdp`` mesh axis.
        tensor: size of the ``tensor`` mesh axis.
        tensorboard: whether to write TensorBoard's files too.
        allow_changed: whether a run may resume with inputs or settings other than those it began with. A warning names
            the changes.
    """

    steps: int = 1000
    batch_size: int = 8
    accumulate: int = 1
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    schedule: str = "cosine"
    warmup: int = 0
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    max_grad_norm: float | None = 1.0
    seed: int = 0
    param_dtype: str | None = "float32"
    gate_dtype: str | None = None
    remat: str | None = None
    attention: str | None = None
    loss_chunk: int = 256
    load_balance: float = 0.0
    entropy: float = 0.0
    z_loss: float = 0.0
    regularize_per_layer: bool = True
    only_expert: str | None = None
    eval_every: int = 0
    checkpoint_every: int = 0
    keep_checkpoints: int = 2
    log_every: int = 10
    max_bad_steps: int = 5
    balance_steps: int = 100
    scaling_cache: str = "off"
    scaling_cache_dtype: str = "float32"
    scaling_cache_directory: str | None = None
    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    tensorboard: bool = True
    allow_changed: bool = False

    def __post_init__(self) -> None:
        """Validate the fields.

        Raises:
            TypeError: a field has the wrong type.
            ValueError: a field has an invalid value.
        """
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), str(field.type)
            if value is None and kind.endswith("| None"):
                continue
            expected = _KINDS[kind.removesuffix(" | None")]
            if not isinstance(value, expected) or (isinstance(value, bool) and kind != "bool"):
                raise TypeError(f"{field.name}: expected {kind}, got {value!r:.100} ({type(value).__name__})")
        positive = ("steps", "batch_size", "accumulate", "loss_chunk", "log_every", "max_bad_steps", "keep_checkpoints")
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("eval_every", "checkpoint_every", "balance_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        if self.scaling_cache not in ("off", "memory", "disk"):
            raise ValueError(f"scaling_cache: expected off, memory or disk, got {self.scaling_cache!r}")

    @property
    def regularizers(self) -> Regularizers:
        """Return the additional terms of the loss."""
        return Regularizers(self.load_balance, self.entropy, self.z_loss, self.regularize_per_layer)

    def make_schedule(self) -> Callable[[Any], Any]:
        """Make the function from a step to its learning rate."""
        return make_schedule(self.schedule, self.learning_rate, self.steps, self.warmup)

    def make_optimizer(self) -> optax.GradientTransformation:
        """Make the optimizer that the settings describe."""
        return make_optimizer(
            self.optimizer,
            self.make_schedule(),
            weight_decay=self.weight_decay,
            b1=self.b1,
            b2=self.b2,
            eps=self.eps,
            max_grad_norm=self.max_grad_norm,
        )

    # Settings that may differ on resume. They do not change the result, except for the last bits on another mesh.
    _FREE = (
        "eval_every",
        "checkpoint_every",
        "keep_checkpoints",
        "log_every",
        "max_bad_steps",
        "balance_steps",
        "scaling_cache",
        "scaling_cache_directory",
        "remat",
        "attention",
        "loss_chunk",
        "data",
        "fsdp",
        "tensor",
        "tensorboard",
        "allow_changed",
    )
    # These have no effect if the caller passes an optimizer.
    _OF_OPTIMIZER = (
        *("steps", "optimizer", "learning_rate", "schedule", "warmup", "weight_decay"),
        *("b1", "b2", "eps", "max_grad_norm"),
    )

    def fixed(self, *, own_optimizer: bool = False) -> dict[str, Any]:
        """Return the settings that a resumed run must share with the run it resumes.

        Args:
            own_optimizer: whether the caller passes an optimizer, so that the optimizer's settings are left out.
        """
        free = self._FREE + (self._OF_OPTIMIZER if own_optimizer else ())
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in free}
