"""Streams of requests: ledger, checkpoints, verification."""
