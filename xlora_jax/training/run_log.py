"""Log of a run: metrics by step, and the progress bar."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from xlora_jax.routing.metrics import log_values
from xlora_jax.training.balance import Balance
from xlora_jax.training.config import TrainConfig
from xlora_jax.training.metrics import MetricsWriter, peak_memory

__all__ = ["RunLog", "progress_bar", "routing_line"]


class RunLog:
    """Times and metrics of the steps."""

    def __init__(
        self,
        config: TrainConfig,
        schedule: Callable[[Any], Any] | None,
        on_metrics: Callable[[int, str, Mapping[str, float]], None] | None,
        expert_names: tuple[str, ...] = (),
    ) -> None:
        self.config, self.schedule, self.on_metrics = config, schedule, on_metrics
        self.expert_names = expert_names
        self.balance = Balance(expert_names, config.balance_steps if jax.process_index() == 0 else 0)
        self.writer: MetricsWriter | None = None
        self.history: list[dict[str, Any]] = []
        self._start = self._mark = time.perf_counter()
        self._data = self._data_begun = 0.0
        self._all_data = self._all_tokens = self._all_learned = 0.0
        self._steps = 0
        self._losses: list[float] = []
        self._routing: dict[str, NDArray[np.float64]] = {}
        self._tokens = self._learned = 0.0
        self.latest: dict[str, float] = {}

    def begin_data(self) -> None:
        """Start the clock of the time spent waiting for data."""
        self._data_begun = time.perf_counter()

    def end_data(self) -> None:
        """Stop the clock of the time spent waiting for data."""
        self._data += time.perf_counter() - self._data_begun

    def step(self, number: int, metrics: Mapping[str, Any], tokens: int, last: bool = False) -> Mapping[str, float]:
        """Add one step's metrics and its number of tokens, learned or not; write an entry when it is due."""
        values = {name: float(value) for name, value in metrics.items() if name != "routing"}
        self._steps += 1
        self._tokens += tokens
        self._learned += values["tokens"]
        if values["finite"]:
            self._losses.append(values["loss"])
            self._add(number, metrics["routing"])
        if number % self.config.log_every == 0 or last:
            now = time.perf_counter()
            elapsed = max(now - self._mark, 1e-9)
            entry = {
                "loss": float(np.mean(self._losses)) if self._losses else float("nan"),
                **{name: value for name, value in values.items() if name in ("grad_norm", "regularization")},
                "tokens_per_second": self._tokens / elapsed,
                "learned_tokens_per_second": self._learned / elapsed,
                "data_share": self._data / elapsed,
                **(log_values(self._routing, self.expert_names) if self._routing else {}),
            }
            if self.schedule is not None:
                entry["learning_rate"] = float(self.schedule(number - 1))
            self.write(number, "train", entry)
            self.latest = entry
            self._all_tokens += self._tokens
            self._all_learned += self._learned
            self._all_data += self._data
            self._mark, self._data, self._tokens, self._learned, self._losses = now, 0.0, 0.0, 0.0, []
            self._routing = {}
        return {**self.latest, "loss": values["loss"]}

    def _add(self, number: int, routing: Mapping[str, Any]) -> None:
        """Add a step's sums of routing to those since the last entry."""
        sums = {name: np.asarray(value, np.float64) for name, value in routing.items()}
        self._routing = {name: self._routing.get(name, 0.0) + value for name, value in sums.items()}
        if sums["tokens"]:
            self.balance.step(number, sums["shares"] / sums["tokens"])

    def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Write one entry to the history, the files and the callback."""
        self.history.append({"step": step, "kind": kind, **values})
        if self.writer is not None:
            self.writer.write(step, kind, values)
        if self.on_metrics is not None:
            self.on_metrics(step, kind, values)

    def get_state(self) -> dict[str, Any]:
        """Return the losses and routing since the last entry, as JSON values."""
        routing = {name: value.tolist() for name, value in self._routing.items()}
        return {"losses": list(self._losses), "routing": routing, "balance": self.balance.get_state()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restore the state that :meth:`get_state` returned, so that the next entry averages over all its steps."""
        self._losses = [float(loss) for loss in state["losses"]]
        # Checkpoints of version 0.1 have no state of the routing.
        routing = state.get("routing", {})
        self._routing = {name: np.asarray(value, np.float64) for name, value in routing.items()}
        if "balance" in state:
            self.balance.set_state(state["balance"])

    def flush(self) -> None:
        """Flush the metrics files to disk."""
        if self.writer is not None:
            self.writer.flush()

    def summary(self) -> dict[str, float]:
        """Return the rates over the whole run."""
        elapsed = max(time.perf_counter() - self._start, 1e-9)
        return {
            "steps_per_second": self._steps / elapsed,
            "tokens_per_second": self._all_tokens / elapsed,
            "learned_tokens_per_second": self._all_learned / elapsed,
            "data_share": self._all_data / elapsed,
            **peak_memory(),
        }


def routing_line(values: Mapping[str, float]) -> str:
    """Return the top expert and the effective number of experts per token in a few words; empty without metrics."""
    gates = {name.removeprefix("gate/"): value for name, value in values.items() if name.startswith("gate/")}
    if not gates:
        return ""
    top = max(gates, key=lambda name: gates[name])
    shown = "".join(character if character.isprintable() else "?" for character in top)[:20]
    return f"{shown} {gates[top]:.0%}, {values['experts_per_token']:.1f} experts"


@contextmanager
def progress_bar(steps: int, started: int, show: bool) -> Iterator[Callable[..., None]]:
    """Show a progress bar, and yield a function of (step, values) that moves it."""
    if not show or jax.process_index() != 0:
        yield lambda *_: None
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = [
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TextColumn("{task.fields[rate]:,.0f} tokens/s, {task.fields[learned]:,.0f} learned"),
        TextColumn("{task.fields[share]:.0%} in data"),
        TextColumn("{task.fields[routing]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    ]
    with Progress(*columns) as bar:
        task = bar.add_task(
            "", total=steps, completed=started, loss=float("nan"), rate=0.0, learned=0.0, share=0.0, routing=""
        )

        def update(step: int, values: Mapping[str, float]) -> None:
            bar.update(
                task,
                completed=step,
                loss=values["loss"],
                rate=values.get("tokens_per_second", 0.0),
                learned=values.get("learned_tokens_per_second", 0.0),
                share=values.get("data_share", 0.0),
                routing=routing_line(values),
            )

        yield update
