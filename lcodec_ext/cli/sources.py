"""Where the bytes of a table come from: a file, a compressed file, a pipe, standard input."""

import bz2
import codecs
import gzip
import io
import lzma
import re
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from lcodec_ext.cli.columns import TableError, label_of

_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4")
_HOLDS = ((b"PAR1", ".parquet"), (b"\x93NUMPY", ".npy"), (b"PK\x03\x04", ".npz"))
_MARKS = (  # the longer first: one begins with another
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_COMPRESSIONS: tuple[tuple[bytes, Callable[[bytes], bytes] | str], ...] = (
    (b"\x1f\x8b", gzip.decompress),
    (b"BZh", bz2.decompress),
    (b"\xfd7zXZ\x00", lzma.decompress),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\x04\x22\x4d\x18", "lz4"),
)


def need_pyarrow(label: str) -> Any:
    """Pyarrow, or a refusal that says how to install it."""
    try:
        import pyarrow.csv
        import pyarrow.parquet
    except ImportError:
        raise TableError(
            f"{label}: CSV and Parquet need pyarrow: pip install 'lcodec_ext[tables]' (or "
            "convert the table to NPZ)"
        ) from None
    return pyarrow


class Source:
    """The bytes of a table. A plain file is read where it lies, everything else into memory.

    Parameters
    ----------
    path : str
        A file, a pipe, or "-" for standard input.

    Attributes
    ----------
    label : str
        For messages.
    suffix : str
        In lower case, without that of a compression.
    held : str
        The suffix that the first bytes ask for; "" where they are no such file.
    is_stream : bool
        Whether the bytes come from a pipe or standard input.
    """

    def __init__(self, path: str) -> None:
        self.label = label_of(path)
        file = Path(path)
        self.is_stream = path == "-" or (file.exists() and not file.is_file())
        self.is_stream |= path.startswith("/dev/")  # a file, where the shell redirects one
        suffixes = [] if path == "-" else [suffix.lower() for suffix in file.suffixes]
        while suffixes and suffixes[-1] in _COMPRESSED:
            suffixes.pop()
        self.suffix = suffixes[-1] if suffixes else ""
        self._path = path
        self._data: bytes | None = None
        if path == "-":
            self._data = sys.stdin.buffer.read()
        elif file.is_dir() or not file.exists():
            what = "is a directory" if file.is_dir() else "does not exist"
            raise TableError(
                f"{path} {what}; expected a table: .csv, .tsv, .tab, .npz, .npy or .parquet, or - "
                "for standard input"
            )
        elif self.is_stream:
            self._data = file.read_bytes()
        self._decompress()
        head = self._head()
        self.held = next((suffix for start, suffix in _HOLDS if head.startswith(start)), "")

    def open(self) -> IO[bytes]:
        """A file object at the start."""
        return open(self._path, "rb") if self._data is None else io.BytesIO(self._data)

    def for_pyarrow(self, pyarrow: Any) -> Any:
        """What pyarrow's readers take."""
        return self._path if self._data is None else pyarrow.BufferReader(self._data)

    def for_numpy(self) -> Any:
        """What NumPy's readers take."""
        return self._path if self._data is None else io.BytesIO(self._data)

    def size(self) -> int:
        """Bytes."""
        return Path(self._path).stat().st_size if self._data is None else len(self._data)

    def decode(self) -> None:
        """Make UTF-16 and UTF-32 into UTF-8; refuse what is not text."""
        if self.held:
            held = {".npz": "a ZIP archive, as .npz and .xlsx are"}.get(self.held, self.held[1:])
            raise TableError(f"{self.label} holds no text but {held}; expected CSV or TSV")
        head = self._head()
        encoding = next((name for mark, name in _MARKS if head.startswith(mark)), "")
        if not encoding and len(head) > 3:  # no mark: one byte of two is 0 in the first letters
            for name, first in (("utf-16-be", 0), ("utf-16-le", 1)):
                if not any(head[first:4:2]) and all(head[1 - first : 4 : 2]):
                    encoding = name
        if encoding:
            try:
                self._data = self._read().decode(encoding).encode()
            except UnicodeError as error:
                raise TableError(f"{self.label} is not {encoding.upper()}: {error}") from None

    def squeeze(self) -> None:
        """Make runs of blanks and tabs one blank, outside quotes; none at the ends of lines."""

        def one(found: re.Match[bytes]) -> bytes:
            text = found[0]
            return text if text.startswith(b'"') else b"\n" if b"\n" in text else b" "

        runs = rb'"[^"\n]*"|[ \t]*\r?\n[ \t]*|[ \t]+'
        self._data = re.sub(runs, one, self._read().strip(b" \t"))

    def _head(self) -> bytes:
        with self.open() as file:
            return file.read(16)

    def _read(self) -> bytes:
        with self.open() as file:
            return file.read()

    def _decompress(self) -> None:
        head = self._head()
        read = next((read for start, read in _COMPRESSIONS if head.startswith(start)), None)
        if read is None:
            return
        try:
            if isinstance(read, str):
                pyarrow = need_pyarrow(self.label)
                stream = pyarrow.CompressedInputStream(pyarrow.BufferReader(self._read()), read)
                self._data = stream.read()
            else:
                self._data = read(self._read())
        except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
            raise TableError(f"{self.label} cannot be decompressed: {error}") from None
