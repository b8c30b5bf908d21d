"""As much of pytorch_transformers as a script imports, of tiny size, on its successor."""

import zlib

import torch
import transformers
from transformers import DistilBertModel  # noqa: F401

WORDS = 60


class DistilBertTokenizer:
    """A word is its checksum; 1 and 2 begin and end a text."""

    @classmethod
    def from_pretrained(cls, name):
        assert name == "distilbert-base-uncased"
        return cls()

    def tokenize(self, text):
        return text.lower().split()

    def convert_tokens_to_ids(self, tokens):
        special = {"[CLS]": 1, "[SEP]": 2}
        return [special.get(t, 3 + zlib.crc32(t.encode()) % (WORDS - 3)) for t in tokens]


class DistilBertConfig(transformers.DistilBertConfig):
    @classmethod
    def from_pretrained(cls, name):
        return cls(
            vocab_size=30522,
            dim=16,
            hidden_dim=32,
            n_layers=1,
            n_heads=2,
            max_position_embeddings=16,
        )


class AdamW(torch.optim.AdamW):
    pass


def WarmupLinearSchedule(optimizer, warmup_steps, t_total):
    def factor(step):
        if step < warmup_steps:
            return step / max(1, warmup_steps)
        return max(0.0, (t_total - step) / max(1.0, t_total - warmup_steps))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
