"""``xlora-jax generate``: generate text from a prompt, or from a file of prompts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from xlora_jax.cli.options import Adapters, Base, Quantize, Quiet, json_object, named_paths
from xlora_jax.cli.progress import working
from xlora_jax.cli.routing_view import show_text
from xlora_jax.cli.terminal import say
from xlora_jax.routing.text import Part, RoutedText, pieces_of

__all__ = ["command"]

Option = typer.Option


def command(
    base: Base,
    prompt: Annotated[
        str | None, Option("--prompt", "-p", help="The prompt; '-' reads it from standard input.")
    ] = None,
    prompts: Annotated[
        Path | None, Option(help="A file of prompts: one a line, or JSON strings where it ends in .jsonl.")
    ] = None,
    checkpoint: Annotated[
        str | None, Option(help="Trained X-LoRA, PEFT's layout or the original. Without it the base model speaks.")
    ] = None,
    adapter: Adapters = None,
    gate: Annotated[
        list[str] | None,
        Option(
            metavar="NAME=WEIGHT",
            help="Constant weight of an expert, in place of the trained gate. Repeatable; experts not named get 0.",
        ),
    ] = None,
    chat: Annotated[bool, Option("--chat", help="Put each prompt into the tokenizer's chat template.")] = False,
    system: Annotated[str | None, Option(help="System message of the chat.")] = None,
    max_new_tokens: Annotated[int | None, Option(help="Tokens to generate at most.")] = None,
    sample: Annotated[
        bool | None, Option("--sample/--greedy", help="Draw tokens, or take the most probable. Default: the model's.")
    ] = None,
    temperature: Annotated[float | None, Option(help="Divides the logits of a draw.")] = None,
    top_k: Annotated[int | None, Option(help="Draw among the k most probable tokens; 0 for all.")] = None,
    top_p: Annotated[float | None, Option(help="Draw among those that together reach this probability.")] = None,
    min_p: Annotated[float | None, Option(help="Draw among those this many times as probable as the first.")] = None,
    repetition_penalty: Annotated[float | None, Option(help="Above 1 makes repetition less probable.")] = None,
    num_return_sequences: Annotated[int | None, Option("--n", help="Texts for each prompt.")] = None,
    stop: Annotated[list[str] | None, Option(help="A string to stop before. Repeatable.")] = None,
    seed: Annotated[int, Option(help="Of the draws.")] = 0,
    draft: Annotated[bool, Option(help="Draft tokens ahead: the same text, faster.")] = True,
    frozen_after: Annotated[
        int | None, Option(help="APPROXIMATE: keep the gates after so many new tokens; one pass per token from there.")
    ] = None,
    dtype: Annotated[str | None, Option(help="float32, bfloat16 or float16; default: the checkpoint's.")] = None,
    quantize: Quantize = None,
    prefill_chunk: Annotated[int | None, Option(help="Tokens of a prompt that run at once.")] = None,
    stream: Annotated[
        bool | None, Option(help="Print while generating. Default: if there is one text to print.")
    ] = None,
    show_routing: Annotated[
        bool, Option("--show-routing", help="Print prompt and text with each token in the color of its leading expert.")
    ] = False,
    stats: Annotated[bool, Option("--stats", help="Print tokens/s, acceptance and reads of the weights.")] = False,
    generation_config: Annotated[
        Path | None, Option(help="Read this file in place of the model's generation_config.json.")
    ] = None,
    settings: Annotated[
        str,
        Option(
            "--set",
            help="Other fields of generation_config.json or GenerationConfig, as JSON: "
            '\'{"no_repeat_ngram_size": 0, "beyond_context": true}\'.',
        ),
    ] = "{}",
    quiet: Quiet = False,
) -> None:
    """Generate text with an X-LoRA model, or with its base model alone.

    Defaults come from the model's generation_config.json.
    """
    # Imported here so that `--help` answers at once.
    from interop import load_base, load_xlora
    from interop.hf.auto import load_tokenizer, warn_of_added_tokens
    from interop.hf.generation_config import load_generation_config
    from xlora_jax.generation.text import StopStrings, TextStream

    texts = _read_prompts(prompt, prompts)
    tokenizer = load_tokenizer(base)

    def decode(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens), skip_special_tokens=True))

    stops = StopStrings(tuple(stop), decode) if stop else None
    given: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "do_sample": sample,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "num_return_sequences": num_return_sequences,
        "stop_at": stops,
        "frozen_after": frozen_after,
        "prefill_chunk": prefill_chunk,
    }
    config = dataclasses.replace(
        load_generation_config(base, file=generation_config, changes=json_object(settings, "--set")),
        seed=seed,
        draft=draft,
        **{name: value for name, value in given.items() if value is not None},
    )
    adapters = named_paths(adapter, "--adapter") or None
    weights = _weights(gate)
    if adapters and checkpoint is None and weights is None:
        raise ValueError("--adapter needs --checkpoint or --gate: experts without a trained classifier have no gates")
    if weights is not None and not adapters and checkpoint is None:
        raise ValueError("--gate needs --checkpoint or --adapter: the base model alone has no experts")
    if show_routing and checkpoint is None:
        raise ValueError("--show-routing needs --checkpoint: the base model alone has no experts")
    if show_routing and stream:
        raise ValueError("--show-routing prints the whole text at its end: leave --stream out")
    with working(f"loading {base}", quiet=quiet):
        # Separate blocks compile more slowly than stacked ones, but generate faster.
        options: dict[str, Any] = {"dtype": dtype, "scan_layers": False, "quantize": quantize}
        model: Any = (
            load_base(base, **options)
            if checkpoint is None and not adapters
            else load_xlora(base, checkpoint=checkpoint, adapters=adapters, **options)
        )
        warn_of_added_tokens(tokenizer, model.module.config.vocab_size)
    ids, mask = _encode(tokenizer, texts, chat=chat, system=system)
    rows = len(ids) * config.num_return_sequences
    if stream and rows > 1:
        raise ValueError(f"--stream prints one text, got {rows}: leave it out")
    constant = {} if weights is None else {"experts": weights}
    if stream or (stream is None and rows == 1 and not show_routing):
        text = TextStream(decode, stops)
        for (tokens,) in model.stream(ids, mask, config=config, **constant):
            say(text.push(tokens), nl=False)
        say(text.close())
    else:
        with working("generating", quiet=quiet):
            out = np.asarray(model.generate(ids, mask, config=config, **constant))[:, ids.shape[1] :]
        for row, tokens in enumerate(out.tolist()):
            if rows > 1:
                say(f"--- {texts[row // config.num_return_sequences]!r}", dim=True)
            if show_routing:
                prompt_row = row // config.num_return_sequences
                given_ids = ids[prompt_row][mask[prompt_row] != 0].tolist()
                show_text(_routed(model, tokenizer, given_ids, _before_end(tokens, config.eos)))
                continue
            written = decode(_before_end(tokens, config.eos))
            say(written if stops is None else stops.cut(written))
    if stats:
        say(_describe(model.get_generation_stats()), dim=True, err=True)


def _weights(entries: Sequence[str] | None) -> dict[str, float] | None:
    weights = {}
    for name, text in named_paths(entries, "--gate", "WEIGHT").items():
        try:
            weights[name] = float(text)
        except ValueError:
            raise ValueError(f"--gate: {name}: expected a number, got {text!r}") from None
    return weights or None


def _read_prompts(prompt: str | None, prompts: Path | None) -> list[str]:
    if (prompt is None) == (prompts is None):
        raise ValueError("give either --prompt or --prompts")
    if prompts is None:
        assert prompt is not None
        return [typer.get_text_stream("stdin").read() if prompt == "-" else prompt]
    try:
        content = prompts.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{prompts}: expected UTF-8 ({error}); convert the file") from error
    # Only a newline ends a prompt. `splitlines` would also split at form feeds and U+2028, which are text.
    lines = [(number, line.removesuffix("\r")) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{prompts}: no prompts; expected one a line")
    if prompts.suffix != ".jsonl":
        return [line for _, line in lines]
    return [_json_string(line, f"{prompts}, line {number}") for number, line in lines]


def _json_string(line: str, where: str) -> str:
    try:
        text = json.loads(line)
        if not isinstance(text, str):
            raise TypeError(f"a {type(text).__name__}")
        text.encode()
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{where}: expected a JSON string of whole characters, got {line[:200]!r} ({error})"
        ) from error
    return text


def _encode(tokenizer: Any, texts: Sequence[str], *, chat: bool, system: str | None) -> tuple[Any, Any]:
    """Return token ids and mask, int32 ``[B, T]``, padded on the left."""
    if system is not None and not chat:
        raise ValueError("--system needs --chat")
    from interop.hf.auto import encode_text
    from interop.hf.templates import renderer_of
    from xlora_jax.training.chats import Chat

    if chat:
        if not tokenizer.chat_template:
            raise ValueError("--chat: this model's tokenizer has no chat template")
        before = [] if system is None else [{"role": "system", "content": system}]
        render = renderer_of(tokenizer)
        chats = [Chat([*before, {"role": "user", "content": text}]) for text in texts]
        written = [render(chat, [(len(chat.messages), True)])[0] for chat in chats]
        for text in written:
            if isinstance(text, Exception):
                raise text
        texts = [str(text) for text in written]
    # The chat template adds the special tokens itself.
    encoded = [encode_text(tokenizer, text, add_special_tokens=not chat) for text in texts]
    width = max(map(len, encoded))
    ids, mask = np.zeros((2, len(encoded), width), np.int32)
    for row, tokens in enumerate(encoded):
        if not tokens:
            raise ValueError(f"prompt {texts[row]!r} has no tokens, and this tokenizer adds none: give some text")
        ids[row, width - len(tokens) :] = tokens
        mask[row, width - len(tokens) :] = 1
    return ids, mask


def _before_end(tokens: list[int], eos: Sequence[int]) -> list[int]:
    """Return the tokens before the first end-of-sequence token."""
    return tokens[: next((place for place, token in enumerate(tokens) if token in eos), len(tokens))]


def _routed(model: Any, tokenizer: Any, prompt: list[int], new: list[int]) -> RoutedText:
    """Return a prompt and its generated text with the gates of their tokens."""

    def decode(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    return RoutedText(
        pieces_of([*prompt, *new], decode),
        model.gates_of(np.array([[*prompt, *new]]))[0],
        model.expert_names,
        model.routing_layers,
        (Part(0, "prompt"), Part(len(prompt), "generated")),
    )


def _describe(stats: Any) -> str:
    decoded = max(stats.new_tokens - stats.rows, 0)
    lines = [
        f"prefill  {stats.prompt_tokens} tokens in {stats.prefill_seconds:.2f} s: "
        f"{stats.prompt_tokens / stats.prefill_seconds:.1f} tokens/s (compilation included)",
        f"decode   {decoded} tokens in {stats.decode_seconds:.2f} s: {decoded / stats.decode_seconds:.1f} tokens/s "
        "(compilation included)",
        f"reads    {stats.reads_per_token:.2f} reads of the weights per token",
    ]
    if stats.acceptance is not None:
        lines.append(f"drafts   {stats.acceptance:.1%} accepted")
    if stats.guessed:
        lines.append(f"guessed  {stats.guessed:.1%} of the new tokens, from the text before")
    lines.append(
        f"caches   {stats.cache_bytes / 2**20:.1f} MiB, {stats.cache_bytes_per_token:,} bytes per token and row"
    )
    return "\n".join(lines)
