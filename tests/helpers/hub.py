"""A hub cache made by hand, for tests without a hub."""

from pathlib import Path

COMMIT, OTHER = "0123456789abcdef0123456789abcdef01234567", "89abcdef0123456789abcdef0123456789abcdef"


def lay_out(cache: Path, repo: str, commit: str, files: dict[str, bytes], refs: tuple[str, ...] = ("main",)) -> Path:
    """Write `models--org--name/{refs,snapshots,blobs}`: the files are blobs, and the snapshot has links to them."""
    root = cache / ("models--" + repo.replace("/", "--"))
    for ref in refs:
        (root / "refs").mkdir(parents=True, exist_ok=True)
        (root / "refs" / ref).write_text(commit)
    (root / "blobs").mkdir(parents=True, exist_ok=True)
    snapshot = root / "snapshots" / commit
    for number, (name, content) in enumerate(files.items()):
        blob = root / "blobs" / f"{commit[:8]}{number}"
        blob.write_bytes(content)
        link = snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(*[".."] * len(link.relative_to(root).parent.parts)) / "blobs" / blob.name)
    return snapshot
