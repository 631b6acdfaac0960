"""The model card, README.md, of an exported X-LoRA checkpoint.

Names and paths come from untrusted files. They are written as Markdown text, Python literals or shell words, never
unescaped: nothing in them can become markup, a link, an HTML element or a command.
"""

from __future__ import annotations

import html
import json
import re
import shlex
from collections.abc import Sequence

from interop.peft.adapter import LoraAdapter
from interop.storage.hub import is_hub_id
from xlora_jax.config import XLoraConfig
from xlora_jax.layers.quantized import KINDS

__all__ = ["model_card"]

_LAYOUTS = {
    "peft": "PEFT's layout",
    "xlora": "the layout of the original xlora package",
    "mistralrs": "the layout that mistral.rs reads",
}

_HERE = """\
```python
from interop import load_xlora

model = load_xlora({base}, checkpoint="DIR"{quantize})
```
"""

_PEFT = """\
```python
from peft import PeftConfig, PeftModel
from transformers import {auto}

base = {auto}.from_pretrained({base}{labels})
base.config.use_cache = False
config = PeftConfig.from_pretrained("DIR")
config.adapters = {{i: f"DIR/experts/{{i}}" for i in config.adapters}}
model = PeftModel.from_pretrained(base, "DIR", config=config)
```

PEFT takes the experts' paths from `adapter_config.json`, and they are those of the place where this was saved. The two
lines about `config` put the present ones in their place. To put them into the file instead, once after a move:

    python -c "import interop; interop.repoint('DIR')"

or, without xlora-jax:

    python -c "import json, pathlib; d = pathlib.Path('DIR').resolve(); f = d / 'adapter_config.json'; \\
    c = json.loads(f.read_text()); c['adapters'] = {{i: str(d / 'experts' / i) for i in c['adapters']}}; \\
    f.write_text(json.dumps(c, indent=2))"
"""

_XLORA = """\
```python
import xlora

model = xlora.from_pretrained("DIR", base, "cpu", adapters={adapters})
```

The order of `adapters` is the order of the classifier's outputs.
"""

_MISTRALRS = """\
    mistralrs run -m {base} --xlora DIR --xlora-order DIR/xlora_ordering.json

The base has to be named as in `xlora_ordering.json`. `xlora_dropout_p` is 0 here, since mistral.rs applies the
classifier's dropout when it generates. An expert's `lora_alpha` is the one that gives its scale as alpha / r. An
`xlora_size` below the hidden size was raised to it, with units that are always zero.

Seen with mistral.rs 0.9.5 on a CPU: it computes the same tokens, for prompts of one token. Longer prompts on
safetensors fail there ("RoPE positions length 1 does not match"). A base with tied embeddings lacks `lm_head.weight`
there. It reads `rope_theta` at the top level of config.json, where transformers 5 no longer writes it.
"""

_ELSEWHERE = """\
Not in this layout. This writes it:

    xlora-jax export --base {base} --checkpoint DIR --layout {layout} --output OUTPUT
"""

# transformers' class by PEFT's task_type; PEFT has none for image classification.
_AUTO = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    None: "AutoModelForImageClassification",
}


def model_card(
    layout: str,
    config: XLoraConfig,
    adapters: Sequence[LoraAdapter],
    base_model: str,
    layer_count: int,
    task_type: str | None = "CAUSAL_LM",
    labels: int | None = None,
    quantized: str | None = None,
) -> str:
    """Return a README.md with base model, experts, settings, and code that loads the checkpoint here and elsewhere.

    Args:
        layout: "peft", "xlora" or "mistralrs".
        config: X-LoRA settings.
        adapters: adapters of the experts, in order.
        base_model: directory or hub id of the base model.
        layer_count: number of adapted layers.
        task_type: PEFT's task type.
        labels: number of classes of a head that is in the checkpoint, not in the base; None for no such head.
        quantized: grid of the base's kernels beside the saved classifier, such as ``nf4``; None for floating point.
    """
    base = _literal(base_model)
    front = ["library_name: peft", "tags: [lora, x-lora, mixture-of-experts]"]
    if is_hub_id(base_model):
        # YAML could read a name without an owner as a number or null.
        front.insert(0, f"base_model: {base_model if '/' in base_model else json.dumps(base_model)}")
    pairs = (f"{_literal(adapter.name)}: {_literal(f'DIR/{adapter.name}')}" for adapter in adapters)
    folders = "{" + ", ".join(pairs) + "}"
    loading = {
        "peft": (
            "PEFT",
            _PEFT.format(
                base=base,
                auto=_AUTO.get(task_type, "AutoModel"),
                labels="" if labels is None else f", num_labels={labels}",
            ),
        ),
        "xlora": ("the original xlora package", _XLORA.format(adapters=folders)),
        "mistralrs": ("mistral.rs", _MISTRALRS.format(base=_shell_word(base_model))),
    }
    settings = {name: value for name, value in config.to_dict().items() if name != "adapters"}
    lines = [
        "---",
        *front,
        "---",
        "",
        "# X-LoRA checkpoint",
        "",
        f"A mixture of {len(adapters)} LoRA experts on {_as_text(base_model)}, in {_LAYOUTS[layout]}. For every token "
        "a small classifier",
        f"weighs the experts in {layer_count} adapted layers ([X-LoRA](https://arxiv.org/abs/2402.07148)). Written by "
        "xlora-jax.",
        "",
        *_quantization(quantized),
        "## Experts",
        "",
        "| number | name | rank | layers | trained on |",
        "|---|---|---|---|---|",
        *(_row(number, adapter) for number, adapter in enumerate(adapters)),
        "",
        "## Settings",
        "",
        "| field | value |",
        "|---|---|",
        *(f"| {name} | {json.dumps(value)} |" for name, value in settings.items()),
        "",
        "## Loading",
        "",
        "`DIR` is the directory of this file.",
        "",
        "### xlora-jax",
        "",
        _HERE.format(base=base, quantize=f', quantize="{quantized}"' if quantized in KINDS else ""),
    ]
    for kind, (title, text) in loading.items():
        lines += [
            f"### {title}",
            "",
            text if kind == layout else _ELSEWHERE.format(base=_shell_word(base_model), layout=kind),
        ]
    return "\n".join(lines).rstrip() + "\n"


def _quantization(quantized: str | None) -> list[str]:
    if quantized is None:
        return []
    return [
        f"The gate was trained or saved on this base with quantized kernels ({_as_text(quantized)}). On the base in",
        "floating point, its inputs and so its weights of the experts differ a little.",
        "",
    ]


def _row(number: int, adapter: LoraAdapter) -> str:
    ranks = sorted({layer.r for layer in adapter.layers.values()})
    cells = (
        str(number),
        adapter.name,
        ", ".join(map(str, ranks)),
        str(len(adapter.layers)),
        str(adapter.base_model_name_or_path),
    )
    return "| " + " | ".join(map(_as_text, cells)) + " |"


_MARKUP = re.compile(r"[\\`*\[\]()|~#!$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")


def _as_text(text: str) -> str:
    """Return Markdown that shows exactly this text, in a table too."""
    shown = html.escape(re.sub(_MARKUP, r"\\\g<0>", _printable(text, r"\x{:02x}", r"\u{:04x}")), quote=False)
    return shown.replace("://", "&#58;//").replace("www.", "www&#46;")  # GitHub turns both into links


def _literal(text: str) -> str:
    """Return the text as a Python string literal."""
    return _printable(json.dumps(text, ensure_ascii=False), r"\x{:02x}", r"\u{:04x}", r"\U{:08x}")


def _shell_word(text: str) -> str:
    """Return the text as one word of bash and zsh, on one line."""
    if text.isprintable():
        return shlex.quote(text)
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return "$'" + _printable(escaped, r"\x{:02x}", r"\u{:04x}", r"\U{:08x}") + "'"


def _printable(text: str, byte: str, short: str, long: str = r"\U{:08x}") -> str:
    """Return the text with an escape for every character that doesn't print: controls, line ends, overrides."""

    def number(character: str) -> str:
        code = ord(character)
        return (byte if code < 0x80 else short if code < 0x10000 else long).format(code)

    return "".join(c if c.isprintable() else number(c) for c in text)
