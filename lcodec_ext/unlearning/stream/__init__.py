"""Streams of requests.

unlearner    `Unlearner`, which takes the requests
given        what the user gives: data, functions, settings; compared with the first entry
steps        one request: its samples, its seed, its step, its guarantee
store        ledger, history and checkpoints in one directory
ledger       `Ledger`, the file of entries
history      what the entries amount to
contents     hashes of data sets
checkpoints  weights by name
verify       `verify_ledger`
"""

from lcodec_ext.unlearning.stream.checkpoints import LedgerError
from lcodec_ext.unlearning.stream.history import History, Point
from lcodec_ext.unlearning.stream.ledger import LEDGER_FILE, Entry, Ledger
from lcodec_ext.unlearning.stream.unlearner import Unlearner
from lcodec_ext.unlearning.stream.verify import Verification, verify_ledger

__all__ = [
    "LEDGER_FILE",
    "Entry",
    "History",
    "Ledger",
    "LedgerError",
    "Point",
    "Unlearner",
    "Verification",
    "verify_ledger",
]
