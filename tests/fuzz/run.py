"""Fuzzing as a program: `python -m tests.fuzz.run [TARGET ...]`, with the settings of environment variables.

FUZZ_SECONDS is the time for each target, FUZZ_SEED the seed of the first round. Prints a JSON object for each target. A
failure leaves the damaged files in FUZZ_OUTPUT (by default a temporary folder).
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path
from types import FrameType
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.mutations import apply, mutations
from tests.fuzz.targets import TARGETS, copied, made

SECONDS_EACH = 10
BYTES_EACH = 2**30


class TooLongError(Exception):
    """One input took more than its time."""


def _alarm(number: int, frame: FrameType | None) -> None:
    raise TooLongError(f"more than {SECONDS_EACH} s of work")


def limit_memory() -> None:
    """Allow this process a further GiB of address space, and no more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    allowed = pages * resource.getpagesize() + BYTES_EACH
    resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))


def check(name: str, directory: Path) -> None:
    """Read damaged files: right, or an error that names a file, in bounded time."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS_EACH)
    try:
        TARGETS[name].read(directory)
    except (ValueError, OSError) as error:
        text = str(error)
        if str(directory) not in text:
            raise AssertionError(f"an error without the file's name: {type(error).__name__}: {text[:500]}") from error
        if len(text) > 5000:
            raise AssertionError(f"an error of {len(text)} characters: {text[:200]}") from error
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def fuzz(name: str, seconds: float, first_seed: int, folder: Path) -> dict[str, Any]:
    """Fuzz one target for some time: rounds of 25 inputs each, at least one."""
    source = made(name, folder)
    work = folder / "damaged" / source.name
    check(name, copied(source, work))
    count, round_, started = 0, 0, time.monotonic()
    while round_ == 0 or time.monotonic() - started < seconds:

        @seed(first_seed + round_)
        @settings(
            max_examples=25,
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        @given(mutations)
        def one(operations: list[Any]) -> None:
            nonlocal count
            count += 1
            copied(source, work)
            apply(operations, work)
            check(name, work)

        try:
            one()
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            kept = work.with_name(f"{work.name}-failed")
            copied(work, kept)
            import traceback

            return {"target": name, "failed": "".join(traceback.format_exception(error))[-6000:], "files": str(kept)}
        round_ += 1
    return {"target": name, "inputs": count, "seconds": round(time.monotonic() - started, 1)}


def main() -> int:
    names = sys.argv[1:] or list(TARGETS)
    seconds = float(os.environ.get("FUZZ_SECONDS", "2"))
    first_seed = int(os.environ.get("FUZZ_SEED", "0"))
    folder = Path(os.environ.get("FUZZ_OUTPUT") or tempfile.mkdtemp(prefix="fuzz-"))
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    import transformers

    transformers.logging.set_verbosity_error()
    for name in names:
        made(name, folder)
        check(name, copied(made(name, folder), folder / "damaged" / "valid"))
    limit_memory()
    signal.signal(signal.SIGPROF, _alarm)
    failed = False
    for name in names:
        result = fuzz(name, seconds, first_seed, folder)
        failed |= "failed" in result
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
