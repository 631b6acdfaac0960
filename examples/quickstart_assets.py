"""The models and texts of quickstart.py, made on this machine in about a minute and kept in a directory.

    texts     four domains, from the standard library and its data, or generated; train and held-out parts
    tokenizer byte-level BPE trained on the texts, in HF's format
    base      small Llama trained briefly on the mix, in HF's format
    experts   one LoRA per domain, trained and saved by PEFT, each with its own rank and target modules

Nothing here is about X-LoRA. With your own base model and adapters you don't need this file.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import random
import re
import subprocess
import sys
import sysconfig
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers.utils import logging

if TYPE_CHECKING:
    import torch

ROW = 192  # tokens of one training row, <bos> included
VOCABULARY = 1024
DOMAINS = ("python", "english", "arithmetic", "json")
PROMPTS = {
    "python": "class Parser:\n    def __init__(self, ",
    "english": "Return a new list that contains",
    "arithmetic": "4718+3695\n8+5+0=13\n",
    "json": '{"name": "LATIN SMALL LETTER',
}


@dataclass(frozen=True)
class Adapter:
    """Settings of one expert's LoRA. They differ on purpose: X-LoRA needs no common rank or target."""

    rank: int
    alpha: int
    targets: tuple[str, ...]
    rslora: bool = False


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
ADAPTERS = {
    "python": Adapter(rank=32, alpha=64, targets=ATTENTION + MLP),
    "english": Adapter(rank=24, alpha=48, targets=ATTENTION + MLP),
    "arithmetic": Adapter(rank=16, alpha=8, targets=ATTENTION + MLP, rslora=True),
    "json": Adapter(rank=8, alpha=16, targets=("v_proj", *MLP)),
}

WIDTH, INNER, LAYERS = 96, 256, 3
BATCH, RATE = 8, 1e-2
# QUICKSTART_STEPS=2,2 makes almost untrained models, for tests.
BASE_STEPS, EXPERT_STEPS = map(int, os.environ.get("QUICKSTART_STEPS", "180,130").split(","))


@dataclass(frozen=True)
class Assets:
    """Paths of the models, and rows of tokens, int32 [rows, ROW]."""

    base: Path
    adapters: dict[str, str]
    train: dict[str, np.ndarray]
    held_out: dict[str, np.ndarray]


def prepare(directory: Path, console: Console) -> Assets:
    """Make models and texts in `directory`, unless this version of the file has made them, and return them."""
    recipe = f"{hashlib.sha256(Path(__file__).read_bytes()).hexdigest()} {BASE_STEPS} {EXPERT_STEPS}"
    stamp = directory / "recipe.txt"
    if not stamp.exists() or stamp.read_text() != recipe:
        stamp.unlink(missing_ok=True)
        directory.mkdir(parents=True, exist_ok=True)
        with console.status("reading texts, training the tokenizer"):
            _make_rows(directory)
        with progress_bar(console) as progress:
            _make_base(directory, _rows(directory, "train"), progress)
            _make_experts_in_parallel(directory, progress)
        stamp.write_text(recipe)
    adapters = {domain: str(directory / "experts" / domain) for domain in DOMAINS}
    return Assets(directory / "base", adapters, _rows(directory, "train"), _rows(directory, "held_out"))


def _rows(directory: Path, part: str) -> dict[str, np.ndarray]:
    with np.load(directory / "rows.npz") as rows:
        return {domain: rows[f"{part}/{domain}"] for domain in DOMAINS}


# Texts


def _library_files(limit: int = 250) -> list[Path]:
    """Return modules of the standard library, in an order that mixes packages but is the same in every run."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data"}
    files = [path for path in root.rglob("*.py") if not left_out & set(path.relative_to(root).parts)]
    files.sort(key=lambda path: hashlib.sha256(path.relative_to(root).as_posix().encode()).digest())
    return files[:limit]


_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def _split_module(source: str) -> tuple[str, list[str]]:
    """Return a module's code without docstrings and comments, and its docstrings."""
    tree = ast.parse(source)
    docstrings = []
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and (text := ast.get_docstring(node)):
            docstrings.append(text)
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree), docstrings


def _prose(text: str) -> Iterator[str]:
    """Yield the paragraphs of `text` that are sentences (no code, tables or signatures), each on one line."""
    for paragraph in re.split(r"\n\s*\n", text):
        line = " ".join(paragraph.split()).replace("``", "").replace("**", "")
        letters = sum(character.isalpha() or character in " ,.'" for character in line)
        if len(line) > 60 and letters > 0.95 * len(line) and line.count(" ") > 0.12 * len(line):
            yield line


def _sum_with_carries(rng: random.Random) -> str:
    """Return one addition, worked digit by digit from the right; the third summand is the carry."""
    a, b = (rng.randrange(1000, 10000) for _ in range(2))
    lines, carry = [f"{a}+{b}"], 0
    for i in range(4):
        x, y = a // 10**i % 10, b // 10**i % 10
        lines.append(f"{x}+{y}+{carry}={x + y + carry:02}")
        carry = (x + y + carry) // 10
    return "\n".join([*lines, f"answer {a + b}"])


def _character_record(character: str) -> str:
    """Return the properties of one Unicode character, as a line of JSON."""
    record = {
        "name": unicodedata.name(character),
        "category": unicodedata.category(character),
        "bidirectional": unicodedata.bidirectional(character),
        "width": unicodedata.east_asian_width(character),
        "decimal": unicodedata.decimal(character, None),
    }
    return json.dumps(record)


def _documents() -> Iterator[tuple[str, str, bool]]:
    """Yield (domain, text, whether held out). Held-out and training texts share no module, sum or character."""
    for number, path in enumerate(_library_files()):
        try:
            code, docstrings = _split_module(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        yield "python", code, number % 8 == 0
        yield "english", "\n".join(line for text in docstrings for line in _prose(text)), number % 8 == 0
    if importlib.util.find_spec("pydoc_data"):  # absent from some slimmed-down installations
        from pydoc_data.topics import topics

        for number, name in enumerate(sorted(topics)):
            yield "english", "\n".join(_prose(topics[name])), number % 8 == 0

    rng = random.Random(0)
    for number in range(400):
        yield "arithmetic", "\n".join(_sum_with_carries(rng) for _ in range(16)), number % 8 == 0

    named = [chr(code) for code in range(0x20, 0x2FFF) if unicodedata.name(chr(code), "")]
    for number, start in enumerate(range(0, len(named), 16)):
        records = "\n".join(_character_record(character) for character in named[start : start + 16])
        yield "json", records, number % 8 == 0


def _make_rows(directory: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    documents = [document for document in _documents() if document[1]]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for _, text, held_out in documents if not held_out), trainer)
    bos = tokenizer.token_to_id("<bos>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
        model_max_length=512,
    )
    fast.save_pretrained(directory / "base")

    rows: dict[str, Any] = {}
    rng = np.random.default_rng(0)
    for domain in DOMAINS:
        for part, wanted in (("train", (domain, False)), ("held_out", (domain, True))):
            texts = [text + "\n" for name, text, held_out in documents if (name, held_out) == wanted]
            encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
            stream = np.concatenate([np.asarray(one.ids, np.int32) for one in encoded])
            stream = stream[: len(stream) // (ROW - 1) * (ROW - 1)].reshape(-1, ROW - 1)
            table = np.concatenate([np.full((len(stream), 1), bos, np.int32), stream], axis=1)
            rows[f"{part}/{domain}"] = rng.permutation(table)
    np.savez_compressed(directory / "rows.npz", **rows)


# Models


def batches(tables: list[np.ndarray], size: int, seed: int) -> Iterator[np.ndarray]:
    """Yield endless batches int32 [size, ROW], in equal shares of `tables`; every other row changes its text midway."""
    rng = np.random.default_rng(seed)

    def rows() -> np.ndarray:
        drawn = rng.permutation(np.arange(size) % len(tables))
        return np.stack([tables[i][rng.integers(len(tables[i]))] for i in drawn])

    while True:
        change = rng.integers(1, 2 * ROW, (size, 1))
        yield np.where(np.arange(ROW) < change, rows(), rows())


def quiet() -> None:
    """Silence other libraries: their progress bars, and a warning of a deprecated name that PEFT uses."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)


def progress_bar(console: Console) -> Progress:
    """Return a progress bar whose tasks have a field `loss`."""
    return Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
        console=console,
    )


def _fit(model: torch.nn.Module, tables: list[np.ndarray], steps: int, report: Callable[[int, float], None]) -> None:
    """Train the parameters that require a gradient for `steps` batches; call `report(step, loss)` after each."""
    import torch

    # OpenMP's threads wait by spinning: while other processes are busy, two threads are slower than one.
    torch.set_num_threads(1)
    learned = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    matrices = [parameter for name, parameter in learned.items() if parameter.ndim == 2 and "embed" not in name]
    others = [parameter for name, parameter in learned.items() if parameter.ndim != 2 or "embed" in name]
    momenta = [torch.zeros_like(parameter) for parameter in matrices]
    adam = torch.optim.AdamW(others, lr=RATE, weight_decay=0.01, betas=(0.9, 0.98)) if others else None
    model.train()
    for step, batch in zip(range(steps), batches(tables, BATCH, seed=1), strict=False):
        rate = RATE * min(1.0, (step + 1) / 20, 1.2 * (1 - step / steps))
        tokens = torch.from_numpy(batch).long()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned.values(), 1.0)
        _muon_step(matrices, momenta, rate)
        if adam is not None:
            adam.param_groups[0]["lr"] = rate
            adam.step()
        for parameter in learned.values():
            parameter.grad = None
        report(step, loss.item())


def _muon_step(matrices: Sequence[torch.Tensor], momenta: Sequence[torch.Tensor], rate: float) -> None:
    """Make one step of Muon, whose update is the momentum with singular values close to 1.

    It needs half as many steps as Adam. `torch.optim.Muon` computes in bfloat16, matrix by matrix. On CPUs without
    bfloat16 units that takes twice as long as the model itself. Here all matrices of one shape are updated at once, in
    float32.
    """
    import torch

    gradients: list[torch.Tensor] = []
    shapes: dict[torch.Size, list[int]] = {}
    for i, (matrix, momentum) in enumerate(zip(matrices, momenta, strict=True)):
        assert matrix.grad is not None
        momentum.lerp_(matrix.grad, 0.05)
        gradients.append(matrix.grad)
        shapes.setdefault(matrix.shape, []).append(i)
    with torch.no_grad():
        for (rows, columns), members in shapes.items():
            update = torch.stack([torch.lerp(gradients[i], momenta[i], 0.95) for i in members])
            update = update if rows <= columns else update.mT
            update = update / update.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
            for _ in range(5):
                gram = update @ update.mT
                update = 3.4445 * update + (-4.775 * gram + 2.0315 * gram @ gram) @ update
            update = update if rows <= columns else update.mT
            scale = 0.2 * max(rows, columns) ** 0.5  # gives the update the size of AdamW's
            for i, direction in zip(members, update, strict=True):
                matrices[i].mul_(1 - 0.01 * rate).sub_(direction, alpha=rate * scale)


def _make_base(directory: Path, rows: dict[str, np.ndarray], progress: Progress) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(directory / "base", trust_remote_code=False)
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=INNER,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            initializer_range=0.03,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    task = progress.add_task("base, on the mix", total=BASE_STEPS, loss=float("nan"))
    _fit(base, list(rows.values()), BASE_STEPS, lambda step, loss: progress.update(task, completed=step + 1, loss=loss))
    base.save_pretrained(directory / "base")


def _make_experts(directory: Path, domains: list[str]) -> None:
    """Train these experts one after the other, and print a line `domain step loss` after each step."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    rows = _rows(directory, "train")
    for domain in domains:
        adapter = ADAPTERS[domain]
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=adapter.rank,
            lora_alpha=adapter.alpha,
            use_rslora=adapter.rslora,
            target_modules=list(adapter.targets),
        )
        torch.manual_seed(0)
        expert = get_peft_model(AutoModelForCausalLM.from_pretrained(directory / "base"), config)
        _fit(expert, [rows[domain]], EXPERT_STEPS, partial(_print_step, domain))
        expert.save_pretrained(str(directory / "experts" / domain))


def _print_step(domain: str, step: int, loss: float) -> None:
    print(domain, step, loss, flush=True)


def _make_experts_in_parallel(directory: Path, progress: Progress) -> None:
    """Train the experts in parallel: one process for each core; each process runs this file."""
    workers = min(len(DOMAINS), os.cpu_count() or 1)
    tasks = {
        domain: progress.add_task(f"expert, {domain}, r={adapter.rank}", total=EXPERT_STEPS, loss=float("nan"))
        for domain, adapter in ADAPTERS.items()
    }

    def follow(domains: list[str]) -> None:
        command = [sys.executable, __file__, str(directory), *domains]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                domain, step, loss = line.split()
                progress.update(tasks[domain], completed=int(step) + 1, loss=float(loss))
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)

    with ThreadPoolExecutor(workers) as threads:
        list(threads.map(follow, [list(DOMAINS[i::workers]) for i in range(workers)]))


if __name__ == "__main__":
    quiet()
    _make_experts(Path(sys.argv[1]), sys.argv[2:])
