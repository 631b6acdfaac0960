"""Meshes and sharding rules: which axis of a parameter is split over which axis of the mesh.

The mesh has three axes; an axis that is not used has size 1:

    data    copies of the model, each with its part of the batch
    fsdp    parameters in parts, gathered layer by layer as they are used; the batch is split over it as well
    tensor  the width of every layer in parts

Arrays carry their shardings into one jitted function, and the compiler inserts the collectives. The table ``RULES``
alone decides how parameters are split.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.typing import NDArray

from xlora_jax.trees import Path, flatten, unflatten

__all__ = [
    "AXES",
    "BATCH_AXES",
    "RULES",
    "Rules",
    "batch_sharding",
    "check_rules",
    "keep_batch_split",
    "make_mesh",
    "param_shardings",
    "placer",
    "put_batch",
    "shard_params",
    "spec_of",
    "state_shardings",
]

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

Rules = Sequence[tuple[str, P]]

_WIDENING = (
    r"(q_proj|k_proj|v_proj|qkv_proj|gate_proj|up_proj|gate_up_proj|fc1|c_fc|c_attn|dense_h_to_4h|query|key|value)"
)
_NARROWING = r"(o_proj|down_proj|out_proj|fc2|c_proj|dense_4h_to_h|dense|output)"

# Path pattern -> how the LAST axes of a matching leaf are split. Axes before them (stacked blocks) are not split. The
# first matching pattern counts. Widening projections are split over `tensor` in their output and narrowing ones in
# their input, so that each pair needs only one all-reduce.
RULES: Rules = (
    (r"^base/.*embed_tokens/embedding$", P(("tensor", "fsdp"), None)),  # [V, D]
    (r"^base/.*lm_head/kernel$", P("fsdp", "tensor")),  # [D, V]
    (rf"^base/.*{_WIDENING}/kernel$", P("fsdp", "tensor")),  # [D, F]
    (rf"^base/.*{_WIDENING}/bias$", P("tensor")),
    (rf"^base/.*{_NARROWING}/kernel$", P("tensor", "fsdp")),  # [F, D]
    (r"^base/.*/kernel$", P(None, "fsdp")),
    (r"^base/.*/embedding$", P(None, "fsdp")),
    (r"^base/", P()),  # norms, other biases
    (r"^experts/.*embed_tokens/lora_a$", P(None, "fsdp")),  # [V, R]: a lookup table
    (rf"^experts/.*({_WIDENING}|lm_head)/lora_a$", P("fsdp", None)),  # [D, R]
    (rf"^experts/.*({_WIDENING}|lm_head)/lora_b$", P("fsdp", "tensor")),  # [R, F]
    (r"^experts/.*/lora_a$", P("tensor", "fsdp")),  # [F, R]
    (r"^experts/.*/lora_b$", P(None, "fsdp")),  # [R, D]
    (r"^experts/", P()),  # columns, scales, biases, dropout rates
    (r"^classifier/dense_\d+/kernel$", P("fsdp", "tensor")),
    (r"^classifier/", P()),
)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Make a mesh of all devices of all processes.

    Args:
        data: size of the axis ``data``. One of the three sizes may be -1: all devices that the other axes leave.
        fsdp: size of the axis ``fsdp``.
        tensor: size of the axis ``tensor``. Its devices are adjacent, because this axis communicates most.
        devices: devices of the mesh; default ``jax.devices()``.

    Returns:
        A mesh with the axes ``data``, ``fsdp`` and ``tensor``.

    Raises:
        ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    named = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(f"mesh {named}: expected sizes of at least 1, and -1 (what is left) at most once")
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(1, len(devices) // math.prod(size for size in sizes if size != -1))
    if math.prod(sizes) != len(devices):
        raise ValueError(f"mesh {named}: expected sizes whose product is the number of devices, {len(devices)}")
    array = jax.make_mesh(sizes, AXES, devices=devices, axis_types=(jax.sharding.AxisType.Auto,) * 3).devices
    return Mesh(array, AXES)


def check_rules(rules: Rules, params: Mapping[str, Any]) -> None:
    """Check that a table of rules is sound and covers a tree.

    Raises:
        ValueError: a rule has an unknown axis or one axis twice; a leaf is matched by no rule, or by one with more axes
            than it has.
    """
    for pattern, spec in rules:
        named = [axis for part in spec if part is not None for axis in ((part,) if isinstance(part, str) else part)]
        unknown = [axis for axis in named if axis not in AXES]
        if unknown:
            raise ValueError(f"sharding rule {pattern!r}: expected axes among {', '.join(AXES)}, got {unknown[0]!r}")
        if len(set(named)) != len(named):
            raise ValueError(f"sharding rule {pattern!r}: {spec} uses an axis twice; an array can have it once only")
    unmatched = []
    for path, leaf in flatten(params).items():
        rule = _rule(rules, path)
        if rule is None:
            unmatched.append("/".join(path))
        elif len(rule[1]) > len(leaf.shape):
            raise ValueError(
                f"sharding rule {rule[0]!r}: {rule[1]} has {len(rule[1])} axes, but {'/'.join(path)} has the shape "
                f"{list(leaf.shape)}; put a rule for it before this one"
            )
    if unmatched:
        raise ValueError(f"no sharding rule matches {', '.join(unmatched[:5])}; add one, P() to keep a leaf whole")


def _rule(rules: Rules, path: Path) -> tuple[str, P] | None:
    name = "/".join(path)
    return next(((pattern, spec) for pattern, spec in rules if re.search(pattern, name)), None)


def spec_of(path: Path, shape: Sequence[int], mesh: Mesh, rules: Rules = RULES) -> P:
    """Return the PartitionSpec of one leaf.

    A mesh axis that does not divide the leaf's dimension is left out. So small or odd layers are whole on every device.

    Raises:
        ValueError: no rule matches the path.
    """
    rule = _rule(rules, path)
    if rule is None:
        raise ValueError(f"no sharding rule matches {'/'.join(path)}; add one, P() to keep it whole")
    spec = (*[None] * (len(shape) - len(rule[1])), *rule[1])
    kept = []
    for part, size in zip(spec, shape, strict=True):
        names = () if part is None else (part,) if isinstance(part, str) else tuple(part)
        divides = size % math.prod(mesh.shape[name] for name in names) == 0
        kept.append(part if divides else None)
    while kept and kept[-1] is None:
        kept.pop()
    return P(*kept)


def param_shardings(params: Mapping[str, Any], mesh: Mesh, rules: Rules = RULES) -> dict[str, Any]:
    """Return the tree of shardings for a tree of arrays or of shapes, after :func:`check_rules`."""
    check_rules(rules, params)

    def sharding(path: Path, leaf: Any) -> Any:
        # The arrays of a quantized kernel have its axes, some of them shorter.
        return jax.tree.map(lambda array: NamedSharding(mesh, spec_of(path, array.shape, mesh, rules)), leaf)

    return unflatten({path: sharding(path, leaf) for path, leaf in flatten(params).items()})


def shard_params(params: Mapping[str, Any], mesh: Mesh, rules: Rules = RULES) -> dict[str, Any]:
    """Put a tree of parameters onto the mesh; every process passes the same tree."""
    place = placer(mesh, rules)
    check_rules(rules, params)
    return unflatten({path: place(path, leaf) for path, leaf in flatten(params).items()})


def placer(mesh: Mesh, rules: Rules = RULES) -> Callable[[Path, Any], Any]:
    """Return a function that puts one leaf onto the mesh, for loading parameters straight into their shards.

    The function takes the leaf's path, which begins with ``base``, ``experts`` or ``classifier``, and the leaf as a
    NumPy or JAX array, or a quantized kernel of such arrays. Of a NumPy array, each device gets its own part only.
    """

    def place(path: Path, leaf: Any) -> Any:
        return jax.tree.map(partial(place_array, path), leaf)

    def place_array(path: Path, leaf: Any) -> jax.Array:
        sharding = NamedSharding(mesh, spec_of(path, leaf.shape, mesh, rules))
        if isinstance(leaf, jax.Array) and leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
            return leaf
        if isinstance(leaf, jax.Array) and jax.process_count() == 1:
            placed: jax.Array = jax.device_put(leaf, sharding)
            return placed
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return place


def state_shardings(
    abstract_state: Any, optimizer: optax.GradientTransformation, mesh: Mesh, rules: Rules = RULES
) -> Any:
    """Return shardings of a :class:`~xlora_jax.training.step.TrainState`; moments are split like their parameters.

    Args:
        abstract_state: state, or its shapes.
        optimizer: optimizer that made the state's ``opt_state``.
        mesh: mesh that the state is put on.
        rules: table of sharding rules.
    """
    whole = NamedSharding(mesh, P())
    trainable = param_shardings(abstract_state.trainable, mesh, rules)

    def of_moment(leaf: Any, sharding: NamedSharding, parameter: Any) -> NamedSharding:
        # Some optimizers keep less than a whole array for a parameter (a row's or a column's mean).
        return sharding if leaf.shape == parameter.shape else whole

    opt_state = optax.tree.map_params(
        optimizer,
        of_moment,
        abstract_state.opt_state,
        trainable,
        abstract_state.trainable,
        transform_non_params=lambda _: whole,
    )
    rest = jax.tree.map(lambda _: whole, abstract_state.replace(trainable=None, opt_state=None))
    return rest.replace(trainable=trainable, opt_state=opt_state)


def batch_sharding(mesh: Mesh, accumulate: int = 1) -> NamedSharding:
    """Return the sharding of a batch ``[B, ...]`` or of micro-batches ``[A, B, ...]``, split by row."""
    return NamedSharding(mesh, P(BATCH_AXES) if accumulate == 1 else P(None, BATCH_AXES))


@contextmanager
def keep_batch_split(mesh: Mesh | None) -> Iterator[None]:
    """Keep activations ``[B, T, ...]`` split over the batch in functions that are traced within this context.

    Parameters under ``fsdp`` are split in their width. Without constraints the compiler may therefore gather the batch
    and split the activations' width, which moves activations between devices instead of weights. The output of a dense
    layer may be split in its last axis (``tensor``). The outputs of all other modules (norms, embedding, blocks,
    classifier) are not split in that axis.

    Args:
        mesh: mesh of the computation; None (one device) constrains nothing.
    """
    if mesh is None or mesh.size == 1:
        yield
        return

    def constrain(array: Any, last: Any) -> Any:
        if not isinstance(array, jax.Array) or array.ndim < 3 or not jnp.issubdtype(array.dtype, jnp.floating):
            return array
        spec = P(BATCH_AXES, *[None] * (array.ndim - 2), last)
        return lax.with_sharding_constraint(array, NamedSharding(mesh, spec))

    def interceptor(
        next_call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        out = next_call(*args, **kwargs)
        if context.method_name != "__call__":
            return out
        if isinstance(context.module, nn.Dense):
            return constrain(out, P.UNCONSTRAINED)
        # A block returns its carry (the residual stream first) and nothing else.
        if isinstance(out, tuple) and out and isinstance(out[0], tuple):
            return ((constrain(out[0][0], None), *out[0][1:]), *out[1:])
        return constrain(out, None)

    with nn.intercept_methods(interceptor):
        yield


def put_batch(batch: Mapping[str, NDArray[Any]], mesh: Mesh, accumulate: int = 1) -> dict[str, jax.Array]:
    """Put this process's rows of a batch onto the mesh, as parts of the whole batch.

    Raises:
        ValueError: the rows can't be divided evenly among the devices.
    """
    sharding = batch_sharding(mesh, accumulate)
    axis = 0 if accumulate == 1 else 1
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    arrays = {}
    for name, array in batch.items():
        rows = array.shape[axis] * jax.process_count()
        if rows % parts:
            raise ValueError(
                f"batch of {rows} rows over data x fsdp = {parts} devices: expected a multiple; change the batch size, "
                f"or use fewer devices for data and fsdp"
            )
        arrays[name] = jax.make_array_from_process_local_data(sharding, array)
    return arrays
