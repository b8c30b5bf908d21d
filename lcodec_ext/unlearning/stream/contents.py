"""Hashes of the contents of data sets, by which they are recognised."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from lcodec_ext._progress import progress_bar
from lcodec_ext._torch.samples import Samples

_KEPT = 8  # bytes of a hash
_PROBE = 64  # samples that are compared where all would take too long


class Contents:
    """What the samples of a data set were when they were first read, by which changes show.

    8 bytes of the hash of each sample are kept.
    """

    def __init__(self) -> None:
        self._first = bytearray()

    def heard(self, hashes: Iterable[str]) -> Iterator[str]:
        """Pass on the hashes of all samples, and take note of them."""
        self._first.clear()
        for sha256 in hashes:
            self._first += bytes.fromhex(sha256[: 2 * _KEPT])
            yield sha256

    def check(self, samples: Samples, numbers: Sequence[int], name: str) -> None:
        """Refuse samples that are others now; nothing is known of data that were never all read."""
        if not self._first:
            return
        for i, sha256 in zip(numbers, samples.each_hash(numbers), strict=True):
            if self._first[_KEPT * i : _KEPT * (i + 1)] != bytes.fromhex(sha256[: 2 * _KEPT]):
                raise ValueError(
                    f"sample {i} of {name} has another content than at the start of the stream: "
                    "requests name samples by their number, in data that stay as they are. Give "
                    "data without random augmentation, and change none of those that stay"
                )


def data_record(
    samples: Samples,
    *,
    read: bool = True,
    progress: bool = False,
    contents: Contents | None = None,
) -> dict[str, Any]:
    """What a ledger says of a data set: its size, and hashes of its contents if it may be read.

    "sha256" is over 64 samples across it, "content" over all. Both are SHA-256 of the hashes of the
    samples, one after the other.
    """
    n = len(samples)
    if not read:
        return {"n": n, "sha256": None}

    def hashes() -> Iterator[str]:
        with progress_bar(progress, total=n, desc="hashes", unit="sample") as bar:
            each = samples.each_hash()
            for sha256 in each if contents is None else contents.heard(each):
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
    samples: Samples,
    known: Mapping[str, Any],
    hashes: Iterable[str] | None = None,
    contents: Contents | None = None,
) -> bool:
    """Whether a data set of the right size has the contents on record.

    All samples are compared where they are in memory or their hashes are given, else a probe.
    """
    n, content = len(samples), known.get("content")  # earlier versions recorded only the probe
    if known["sha256"] is None:
        return True
    if content is not None and (samples.resident or hashes is not None):
        each = samples.each_hash() if hashes is None else hashes
        return _hashes_of(n, each if contents is None else contents.heard(each))[1] == content
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
