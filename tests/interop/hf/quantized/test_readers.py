"""Bases quantized by other programs have the values that those programs' own dequantization gives."""

from __future__ import annotations

import json
import shutil
import warnings

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.numpy import load_file, save_file

from interop import load_base, save_base
from interop.hf.quantized.gguf import _CODES, _tensor
from interop.inspection import inspect_path
from interop.storage.errors import FormatError
from tests.helpers.reference import prompt, torch_base
from xlora_jax.layers.quantized import QuantizedKernel, dequantize
from xlora_jax.trees import flatten

# Inputs of 64, 128 and, for o_proj, 96 = 1.5 blocks of 64.
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8, "head_dim": 12}


@pytest.fixture(scope="module")
def source(base):
    return base("llama", **SHAPE)


def is_projection(name):
    return "_proj.weight" in name


def with_weights(source, directory, tensors, settings=None, metadata=None):
    """Copy a base with other tensors, and with a quantization_config."""
    directory.mkdir()
    config = json.loads((source / "config.json").read_text())
    config |= {} if settings is None else {"quantization_config": settings}
    (directory / "config.json").write_text(json.dumps(config))
    tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def load(directory, **options):
    """Load a base and return it with the text of its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = load_base(directory, **options)
    return model, " ".join(str(warning.message) for warning in caught)


def assert_has_values(model, directory, exact=True):
    """Compare a model, leaf by leaf, with the plain base in a directory; return the quantized leaves' kinds."""
    plain = load_base(directory, dtype=model.module.dtype, scan_layers=model.module.scan_layers)
    expected, kinds = flatten(plain.params), {}
    for path, leaf in flatten(model.params).items():
        if isinstance(leaf, QuantizedKernel):
            kinds[path[-2]] = leaf.kind
            leaf = dequantize(leaf, model.module.dtype)
        if exact:
            np.testing.assert_array_equal(leaf, expected[path], err_msg="/".join(path))
        else:
            np.testing.assert_allclose(leaf, expected[path], rtol=2e-7, err_msg="/".join(path))
    return kinds


ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("options", "held"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, "nf4"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.bfloat16}, "nf4"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, None),
        ({"load_in_8bit": True}, "int8"),
    ],
    ids=["nf4-double", "nf4", "fp4", "int8"],
)
def test_bitsandbytes(source, tmp_path, options, held):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    quantized = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=BitsAndBytesConfig(**options), device_map="cpu", dtype=torch.float32
    )
    quantized.save_pretrained(tmp_path / "quantized")
    values = load_file(source / "model.safetensors")
    for name in filter(is_projection, values):
        module = quantized.get_submodule(name.removesuffix(".weight"))
        values[name] = dequantize_bnb_weight(module.weight, getattr(module, "state", None)).float().numpy()
    plain = with_weights(source, tmp_path / "plain", values)

    model, told = load(tmp_path / "quantized")
    # In 8 bits theirs rounds twice, code times scale times 1/127.
    kinds = assert_has_values(model, plain, exact=held != "int8")
    # The inputs of o_proj don't divide into blocks of 64.
    fitting = set(ALL) if held == "int8" else set(ALL) - {"o_proj"}
    assert kinds == (dict.fromkeys(fitting, held) if held else {})
    assert ("layers/self_attn/o_proj/kernel" in told) == (held != "int8")
    inputs = prompt(2, 9)
    ours = model(**inputs).logits
    with torch.no_grad():
        theirs = torch_base(plain)(**{k: torch.tensor(np.asarray(v)) for k, v in inputs.items()}).logits.numpy()
    np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())
    with pytest.raises(FormatError, match=r"bitsandbytes.*are not written"):
        save_base(model, tmp_path / "again")
    with pytest.raises(ValueError, match="quantized already, by bitsandbytes"):
        load_base(tmp_path / "quantized", quantize="int8")


def integers(weight, bits, group, symmetric, dtype=np.float16):
    """Return unsigned codes [F, D], scales [F, G] and zero points [F, G] of a weight."""
    groups = weight.reshape(len(weight), -1, group)
    most = 2**bits - 1
    low, high = groups.min(-1), groups.max(-1)
    if symmetric:
        high = np.abs(groups).max(-1)
        low = -high
    scales = ((high - low) / most).astype(dtype)
    zeros = np.full(scales.shape, 2 ** (bits - 1)) if symmetric else np.clip(np.rint(-low / scales), 1, most)
    codes = np.clip(np.rint(groups / scales[..., None]) + zeros[..., None], 0, most)
    return codes.reshape(weight.shape).astype(np.int64), scales, zeros.astype(np.int64)


def values_of(codes, scales, zeros):
    """Return ``(q - z) s``, rounded once to the dtype of the scales."""
    group = codes.shape[1] // scales.shape[1]
    shifted = codes - np.repeat(zeros, group, axis=1)
    return (shifted * np.repeat(scales, group, axis=1).astype(np.float64)).astype(scales.dtype)


def packed(codes, bits, order=None):
    """Pack the last axis into int32, from the lowest bits up; ``order`` gives the column of each place."""
    count = 32 // bits
    parts = codes.reshape(*codes.shape[:-1], -1, count)[..., order or range(count)].astype(np.uint64)
    return (parts << (np.arange(count, dtype=np.uint64) * np.uint64(bits))).sum(-1).astype(np.uint32).view(np.int32)


def convert(source, tmp_path, one, settings):
    """Replace each projection by the tensors that ``one(weight)`` returns with its values."""
    tensors, values = {}, {}
    for name, weight in load_file(source / "model.safetensors").items():
        if not is_projection(name):
            tensors[name] = values[name] = weight
            continue
        parts, values[name] = one(weight)
        tensors |= {f"{name.removesuffix('weight')}{ending}": array for ending, array in parts.items()}
    plain = with_weights(source, tmp_path / "plain", {k: v.astype(np.float32) for k, v in values.items()})
    return with_weights(source, tmp_path / "quantized", tensors, settings), plain


def test_awq(source, tmp_path):
    def one(weight):
        codes, scales, zeros = integers(weight, 4, 32, symmetric=False)
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        parts = {"qweight": packed(codes.T, 4, order), "qzeros": packed(zeros.T, 4, order), "scales": scales.T}
        return parts, values_of(codes, scales, zeros)

    settings = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    quantized, plain = convert(source, tmp_path, one, settings)
    model, told = load(quantized, dtype="float16")
    assert assert_has_values(model, plain) == dict.fromkeys(ALL, "int4")
    assert not told
    edit(quantized, version="gemv")
    with pytest.raises(FormatError, match=r"version: expected one of gemm.*got 'gemv'"):
        load_base(quantized)


def edit(directory, **changes):
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] |= changes
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(("bits", "form", "group"), [(4, "gptq", 32), (8, "gptq_v2", 16)])
def test_gptq(source, tmp_path, bits, form, group):
    def one(weight, order=None):
        codes, scales, zeros = integers(weight, bits, group, symmetric=bits == 4)
        groups = np.arange(weight.shape[1]) // group if order is None else order
        parts = {
            "qweight": packed(codes, bits).T,
            "qzeros": packed(zeros.T - (form == "gptq"), bits),
            "scales": scales.T,
            "g_idx": groups.astype(np.int32),
        }
        return parts, values_of(codes, scales, zeros)

    settings = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False, "checkpoint_format": form}
    quantized, plain = convert(source, tmp_path, one, settings)
    model, _ = load(quantized, dtype="float16", scan_layers=False)
    assert assert_has_values(model, plain) == dict.fromkeys(ALL, "int4" if bits == 4 else "int8")

    shuffled = load_file(quantized / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.g_idx"
    shuffled[name] = shuffled[name][::-1].copy()
    save_file(shuffled, quantized / "model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match=r"layers.1.mlp.down_proj.g_idx.*desc_act, act-order.*not supported"):
        load_base(quantized)


@pytest.mark.parametrize(("bits", "form", "group", "symmetric"), [
    (4, "pack-quantized", 32, True), (4, "pack-quantized", 16, False), (8, "int-quantized", None, True),
    (8, "pack-quantized", 32, True), (8, "int-quantized", 32, False),
])  # fmt: skip
def test_compressed_tensors(source, tmp_path, bits, form, group, symmetric):
    def one(weight):
        codes, scales, zeros = integers(weight, bits, group or weight.shape[1], symmetric)
        half = 2 ** (bits - 1)
        signed = torch.tensor(codes - half, dtype=torch.int8)
        parts = {"weight_scale": scales}
        if form == "int-quantized":
            parts["weight"] = signed.numpy()
        else:
            parts["weight_packed"] = pack_to_int32(signed, bits).numpy()
            parts["weight_shape"] = np.array(weight.shape)
        if not symmetric:
            shifted = torch.tensor(zeros - half, dtype=torch.int8)
            is_packed = form == "pack-quantized"
            parts["weight_zero_point"] = (
                pack_to_int32(shifted, bits, packed_dim=0).numpy() if is_packed else shifted.numpy()
            )
        return parts, values_of(codes, scales, zeros)

    group_of = {"targets": ["Linear"], "weights": {"num_bits": bits, "group_size": group}}
    group_of["input_activations"] = {"num_bits": 8} if group is None else None
    settings = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group_of}}
    quantized, plain = convert(source, tmp_path, one, settings)
    model, told = load(quantized, dtype="float16")
    assert assert_has_values(model, plain) == dict.fromkeys(ALL, "int4" if bits == 4 else "int8")
    assert ("quantized activations" in told) == (group is None)


@pytest.mark.parametrize("zeros", [np.zeros((5, 2), np.int32), np.zeros((5, 2), np.int8), np.zeros((2, 2), np.float16)])
def test_misshapen_zero_points_are_named(source, tmp_path, zeros):
    def one(weight):
        codes, scales, _ = integers(weight, 8, 32, symmetric=True)
        return {"weight": (codes - 128).astype(np.int8), "weight_scale": scales, "weight_zero_point": zeros}, weight

    directory, _ = convert(source, tmp_path, one, {"quant_method": "compressed-tensors", "format": "int-quantized"})
    with pytest.raises(FormatError, match=r"_proj.weight_zero_point': expected .*got (int|float)\d+ \["):
        load_base(directory)


def random_blocks(kind, rows, depth, seed=0):
    """Return random bytes of a type of GGUF, with finite scales in float16."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    blocks = np.random.default_rng(seed).integers(0, 256, (rows, depth // block, size)).astype(np.uint8)
    scale = np.random.default_rng(seed + 1).normal(size=(rows, depth // block, 2)).astype(np.float16).view(np.uint8)
    places = {"Q4_1": [0, 2], "Q4_K": [0, 2], "Q6_K": [208]}.get(kind, [0])
    for number, place in enumerate(places):
        blocks[..., place : place + 2] = scale[..., 2 * number : 2 * number + 2]
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("kind", _CODES)
def test_codes_of_gguf_are_those_of_its_package(kind, tmp_path):
    number = gguf.GGMLQuantizationType[kind]
    data = random_blocks(kind, 5, 512)
    stored = type("Stored", (), {"tensor_type": number, "shape": np.array([512, 5]), "data": data, "name": "x"})
    tensor = _tensor("x", tmp_path, stored, None)
    expected = gguf.quants.dequantize(data, number)
    assert np.isfinite(expected).all()
    np.testing.assert_array_equal(tensor.read(), expected)


def permuted(weight, heads):
    """Permute rows as llama.cpp's converter does for q and k of Llama."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(source, directory, kind_of, **metadata):
    """Write the tensors of a Llama as a GGUF file and, with the values it holds, as safetensors."""
    config = json.loads((source / "config.json").read_text())
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    directory.mkdir()
    writer = gguf.GGUFWriter(directory / "model.gguf", "llama")
    writer.add_block_count(metadata.get("blocks", config["num_hidden_layers"]))
    writer.add_embedding_length(config["hidden_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    values = {}
    for name, weight in load_file(source / "model.safetensors").items():
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        number = gguf.GGMLQuantizationType[kind_of(name)] if weight.ndim > 1 else gguf.GGMLQuantizationType.F32
        count = next((count for part, count in heads.items() if part in theirs), None)
        stored = weight if count is None else permuted(weight, count)
        if number.name == "Q6_K":
            data = random_blocks("Q6_K", *weight.shape)
            data[:, 208::210], data[:, 209::210] = 0, 0x1C  # small scales
        else:
            data = gguf.quants.quantize(stored, number)
        writer.add_tensor(theirs, data, raw_dtype=number)
        value = gguf.quants.dequantize(data, number).reshape(weight.shape)
        if count is not None:
            half = len(value) // count // 2
            value = value.reshape(count, half, 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
        values[name] = value
    writer.add_tensor("rope_freqs.weight", np.ones(6, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    shutil.copyfile(source / "config.json", directory / "config.json")
    return directory, values


def kind_of(name):
    """Return a type for each tensor, as mixed as in released files: blocks of one projection differ."""
    if "embed" in name or "lm_head" in name:
        return "Q8_0" if "embed" in name else "F16"
    if "down_proj" in name:
        return "Q8_0" if "layers.0" in name else "Q4_1"
    return {"o_proj": "Q5_1", "gate_proj": "Q4_1", "v_proj": "Q4_0" if "layers.0" in name else "Q4_1"}.get(
        name.split(".")[-2], "Q4_0"
    )


def test_gguf(source, tmp_path):
    directory, values = write_gguf(source, tmp_path / "quantized", kind_of)
    plain = with_weights(source, tmp_path / "plain", values)
    model, told = load(directory, dtype="float32")
    kinds = {"gate_proj": "int4", "up_proj": "int4", "q_proj": "int4", "k_proj": "int4", "v_proj": "int4"}
    assert assert_has_values(model, plain) == {**kinds, "down_proj": "int8"}
    assert "embed_tokens/embedding" in told
    facts = inspect_path(directory).facts
    assert facts["quantized by"] == "GGUF"
    assert {"int4", "int8", "float32"} <= set(facts["dtype"].split(", "))
    inputs = prompt(2, 9)
    ours, theirs = model(**inputs).logits, load_base(plain)(**inputs).logits
    assert float(jnp.abs(ours - theirs).max()) < 1e-5 * float(jnp.abs(theirs).max())
    # Separate blocks keep the grid of each.
    assert assert_has_values(load(directory, dtype="float32", scan_layers=False)[0], plain)["down_proj"] == "int4"


def test_gguf_of_another_model_is_refused(source, tmp_path):
    directory, _ = write_gguf(source, tmp_path / "quantized", lambda name: "F32", blocks=7)
    with pytest.raises(FormatError, match=r"block_count is 7, but num_hidden_layers .* is 2"):
        load_base(directory)
    broken = directory / "model.gguf"
    broken.write_bytes(broken.read_bytes()[:5000])
    with pytest.raises(FormatError, match=r"model.gguf: no readable GGUF file"):
        load_base(directory)
    (directory / "second.gguf").write_bytes(b"")
    with pytest.raises(FormatError, match=r"expected one .gguf file, got model.gguf, second.gguf"):
        load_base(directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "model_type": "gemma"}))
    (directory / "second.gguf").unlink()
    with pytest.raises(FormatError, match=r"of GGUF files, those of llama, .* config.json says 'gemma'"):
        load(directory)


@pytest.mark.parametrize("settings", [{"quant_method": "hqq"}, {"quant_method": "fp8"}, {"bits": 4}, "int4"])
def test_other_methods_are_refused_by_name(source, tmp_path, settings):
    directory = with_weights(source, tmp_path / "base", load_file(source / "model.safetensors"), settings)
    got = settings.get("quant_method", "bits") if isinstance(settings, dict) else settings
    with pytest.raises(FormatError, match=rf"config.json: field 'quantization_config'.*bitsandbytes.*got .*{got}"):
        load_base(directory)


def test_a_method_without_quantized_tensors_is_refused(source, tmp_path):
    tensors = load_file(source / "model.safetensors")
    directory = with_weights(source, tmp_path / "base", tensors, {"load_in_4bit": True})
    with pytest.raises(FormatError, match="says bitsandbytes, but no tensor beside it is quantized so"):
        load_base(directory)


def test_a_missing_or_misshapen_part_is_named(source, tmp_path):
    def one(weight):
        codes, scales, zeros = integers(weight, 4, 32, symmetric=False)
        return {"qweight": packed(codes, 4).T, "qzeros": packed(zeros.T - 1, 4), "scales": scales.T}, weight

    directory, _ = convert(source, tmp_path, one, {"quant_method": "gptq", "bits": 4})
    file = directory / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj"
    for change, message in (
        ({f"{name}.qzeros": None}, rf"module '{name}' is quantized.*missing: qzeros"),
        (
            {f"{name}.qzeros": np.zeros((3, 2), np.int32)},
            rf"tensor '{name}.qzeros': expected int32 \[2, 16\].*\[3, 2\]",
        ),
        ({f"{name}.scales": np.zeros((2, 5), np.float16)}, rf"tensor '{name}.scales': expected a scale"),
        ({f"{name}.scales": np.full((2, 128), np.nan, np.float16)}, rf"'{name}.weight \(scales\)' holds 256 NaN"),
    ):
        changed = {key: value for key, value in {**tensors, **change}.items() if value is not None}
        save_file(changed, file, {"format": "pt"})
        with pytest.raises(FormatError, match=message):
            load_base(directory)
