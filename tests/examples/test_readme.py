"""The README and the documentation say nothing that does not run or does not exist."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.helpers import reference

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]


def test_the_code_of_the_readme_runs_as_written(base, experts, tmp_path, monkeypatch):
    """In a directory with a base model and two adapters under the names that the code has."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    source = base("llama")
    math, programs = experts(source, "unequal")[:2]
    (tmp_path / "adapters").mkdir()
    for name, path in {"base": source, "adapters/math": math, "adapters/code": programs}.items():
        (tmp_path / name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    ids = np.random.default_rng(0).integers(3, 20, (2, 12))
    names = {"batches": [{"input_ids": ids, "labels": ids}] * 2}
    exec(compile(code, "README.md", "exec"), names)
    assert np.isfinite(float(names["metrics"]["loss"]))
    assert names["tokens"].shape == (1, 3 + 64)
    assert names["model"].expert_names == ("math", "code")
    theirs = reference.peft_run(reference.reload_in_peft(source, tmp_path / "trained"), input_ids=ids)[0]
    assert reference.relative_error(names["model"](ids).logits, theirs) < 1e-5


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        assert (page.parent / path).exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", (page.parent / path).read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
            assert anchor in anchors, target


def test_ci_runs_on_every_python_that_the_package_names():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [entry.split(" :: ")[-1] for entry in project["classifiers"] if re.search(r":: 3\.\d+$", entry)]
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    assert jobs["ci"]["strategy"]["matrix"]["python"] == named
    assert project["requires-python"] == f">={named[0]}"
