"""JSON values, and files that are written whole or not at all."""

import contextlib
import dataclasses
import hashlib
import math
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

Content = bytes | str | Callable[[IO[bytes]], object]


def json_ready(
    value: Any,
    *,
    nonfinite: Callable[[float], Any] = lambda number: None,
    other: Callable[[Any], Any] = lambda value: value,
) -> Any:
    """Copy a value into the types that `json.dumps` takes with ``allow_nan=False``.

    Parameters
    ----------
    value : object
        Mappings get strings for keys. Tuples, sets, arrays and tensors become lists, their scalars
        numbers. Objects with a `to_dict`, and dataclasses, become dicts.
    nonfinite : callable, default None for each
        What NaN and infinity become.
    other : callable, by default what leaves it as it is
        What anything else becomes. `json.dumps` refuses what stays, or takes its `default` for it.
    """

    def ready(value: Any) -> Any:
        if value is None or isinstance(value, str | bool | int):
            return value
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else nonfinite(value)
        if isinstance(value, Mapping):
            return {str(key): ready(part) for key, part in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            return [ready(part) for part in value]
        if isinstance(value, type):
            return other(value)
        if hasattr(value, "tolist"):  # arrays and scalars of NumPy, tensors
            return ready(value.tolist())
        if hasattr(value, "to_dict"):
            return ready(value.to_dict())
        if dataclasses.is_dataclass(value):
            fields = dataclasses.fields(value)
            return {field.name: ready(getattr(value, field.name)) for field in fields}
        return other(value)

    return ready(value)


def ranges_of(numbers: Sequence[int] | NDArray[np.int64]) -> str:
    """Write ascending numbers as ranges, "0-15,17"."""
    if isinstance(numbers, range):
        runs = [(numbers.start, numbers.stop - 1)]
    else:
        array = np.asarray(numbers)
        ends = np.flatnonzero(np.diff(array) != 1)
        first = array[np.concatenate([[0], ends + 1])].tolist()
        last = array[np.concatenate([ends, [len(array) - 1]])].tolist()
        runs = list(zip(first, last, strict=True))
    return ",".join(f"{a}-{b}" if b > a else f"{a}" for a, b in runs)


def numbers_of(ranges: str) -> range | NDArray[np.int64]:
    """Read what `ranges_of` wrote; ValueError for other texts."""
    runs = [part.partition("-") for part in ranges.split(",")]
    spans = [range(int(a), int(b or a) + 1) for a, _, b in runs]
    if len(spans) == 1:
        return spans[0]
    return np.concatenate([np.arange(each.start, each.stop) for each in spans])


def short_digest(content: str | NDArray) -> str:
    """16 digits of the SHA-256 of a text, or of the numbers of an array."""
    if isinstance(content, str):
        return hashlib.sha256(content.encode()).hexdigest()[:16]
    if content.dtype.hasobject:  # pointers
        return short_digest(repr(content.tolist()))
    numbers = np.ascontiguousarray(content).reshape(-1).view(np.uint8)  # as they lie
    return hashlib.sha256(numbers.data).hexdigest()[:16]


def write_atomically(path: str | os.PathLike[str], content: Content) -> None:
    """Write a file that is there whole, and on the disk, or not at all.

    Parameters
    ----------
    path : str or path
        An existing file is replaced at once: a reader finds the old one or the new one.
    content : bytes, str (as UTF-8), or callable
        A callable gets the open binary file and writes to it. The file has another name until it is
        whole: ``.NAME.TOKEN.tmp`` in the same folder.
    """
    write_all_atomically({path: content})


def file_path(path: object) -> Path:
    """The path of a file as a user gave it; TypeError or ValueError if it cannot be one."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path must be a string or a path; got {type(path).__name__}")
    found = Path(path)
    if not found.name:
        raise ValueError(f"path must name a file; got {str(path)!r}")
    return found


def file_to_read(path: object) -> Path:
    """The path of a file that is there; TypeError, ValueError or OSError for others."""
    found = file_path(path)
    if found.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a folder: give the name of a file in it")
    if not found.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    return found


def file_to_write(path: object) -> Path:
    """The path of a file that can be written; TypeError, ValueError or OSError for others."""
    found = file_path(path)
    if found.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a folder: give the name of a file in it")
    if not found.parent.is_dir():
        raise FileNotFoundError(
            f"{str(path)!r} cannot be written: {str(found.parent)!r} is not a folder; make it first"
        )
    return found


def write_all_atomically(files: Mapping[str | os.PathLike[str], Content]) -> None:
    """Write several files; none is replaced before all are written.

    They take their places in the order of the mapping, each at once. IsADirectoryError or
    FileNotFoundError, with what to do, for paths that no file can be written to.
    """
    for name in files:
        file_to_write(name)
    written: dict[Path, Path] = {}
    token = secrets.token_hex(4)
    try:
        for name, content in files.items():
            path = Path(name)
            written[path] = path.with_name(f".{path.name}.{token}.tmp")
            with open(written[path], "xb") as file:
                if callable(content):
                    content(file)
                else:
                    file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
        for path in list(written):
            os.replace(written[path], path)
            del written[path]
    finally:
        for temporary in written.values():
            with contextlib.suppress(OSError):
                temporary.unlink()
    for folder in {Path(name).parent for name in files}:
        sync_folder(folder)


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Have the names in a folder on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
