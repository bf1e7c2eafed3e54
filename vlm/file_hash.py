"""Is this the same file as before? Size and hash; of very large files, of both ends."""

import hashlib
from pathlib import Path
from typing import Any

WHOLE_HASH_BYTES = 1 << 30  # larger files are told apart by size, first and last MiB
SAMPLE_BYTES = 1 << 20
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth"}


def hash_file(path: Path, whole_bytes: int = WHOLE_HASH_BYTES) -> dict[str, Any]:
    """Return a file's path, size and hash; of one larger than `whole_bytes`, that of its ends."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= max(whole_bytes, 2 * SAMPLE_BYTES):
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return {"path": str(path), "bytes": size, "sha256": digest}
        sample = hashlib.sha256(file.read(SAMPLE_BYTES))
        file.seek(size - SAMPLE_BYTES)
        sample.update(file.read())
    return {"path": str(path), "bytes": size, "sha256_of_ends": sample.hexdigest()}


def hash_weights(source: Path) -> dict[str, str]:
    """Return the hash of every file of weights in a folder, by name; of a file, its own."""
    files = [source] if source.is_file() else sorted(source.iterdir())
    hashes = {}
    for path in files:
        if path.suffix in WEIGHTS:
            found = hash_file(path)
            hashes[path.name] = found.get("sha256") or found["sha256_of_ends"]
    return hashes
