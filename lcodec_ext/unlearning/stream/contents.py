"""Hashes of the contents of data sets, by which they are recognised."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lcodec_ext._progress import progress_bar
from lcodec_ext._torch.samples import Samples

_PROBE = 64  # samples that are compared where all would take too long


def data_record(samples: Samples, *, read: bool = True, progress: bool = False) -> dict[str, Any]:
    """What a ledger says of a data set: its size, and hashes of its contents if it may be read.

    "sha256" is over 64 samples across it, "content" over all. Both are SHA-256 of the hashes of the
    samples, one after the other.
    """
    n = len(samples)
    if not read:
        return {"n": n, "sha256": None}

    def hashes() -> Iterator[str]:
        with progress_bar(progress, total=n, desc="hashes", unit="sample") as bar:
            for sha256 in samples.each_hash():
                yield sha256
                bar.update()

    sha256, content = _hashes_of(n, hashes())
    return {"n": n, "sha256": sha256, "content": content}


def is_data(samples: Samples | None, known: Mapping[str, Any] | None) -> bool:
    """Whether a data set is that of a record, as far as `has_contents` looks."""
    if samples is None or known is None:
        return samples is None and known is None
    return len(samples) == known["n"] and has_contents(samples, known)


def has_contents(
    samples: Samples, known: Mapping[str, Any], hashes: Iterable[str] | None = None
) -> bool:
    """Whether a data set of the right size has the contents on record.

    All samples are compared where they are in memory or their hashes are given, else a probe.
    """
    n, content = len(samples), known.get("content")  # earlier versions recorded only the probe
    if known["sha256"] is None:
        return True
    if content is not None and (samples.resident or hashes is not None):
        return _hashes_of(n, samples.each_hash() if hashes is None else hashes)[1] == content
    return _joined_hash(samples.each_hash(_probe(n))) == known["sha256"]


def _hashes_of(n: int, hashes: Iterable[str]) -> tuple[str, str]:
    """Hashes over the probe, and over all samples."""
    probe, some = set(_probe(n)), []
    digest = hashlib.sha256()
    for k, sha256 in enumerate(hashes):
        digest.update(sha256.encode())
        if k in probe:
            some.append(sha256)
    return _joined_hash(some), digest.hexdigest()


def _joined_hash(hashes: Iterable[str]) -> str:
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def _probe(n: int) -> list[int]:
    return [k * n // _PROBE for k in range(_PROBE)] if n > _PROBE else list(range(n))
