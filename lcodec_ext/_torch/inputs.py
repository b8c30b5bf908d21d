"""What a model is called with, by name, and what of it is too large for the model's tables."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

_BY_NAME = inspect.Parameter.POSITIONAL_OR_KEYWORD
_POSITIONS = ("position_embeddings", "wpe", "embed_positions")  # names in transformers
_TOKENS = ("input_ids", "decoder_input_ids")


class TextsError(ValueError):
    """Texts have more tokens, or others, than the model has embeddings for."""


def by_name(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The inputs by the names that the forward pass has for them; None where it tells none."""
    try:
        parameters = inspect.signature(model.forward).parameters.values() if args else ()
    except (TypeError, ValueError):  # of no Python function
        return None
    names = [each.name for each in parameters if each.kind is _BY_NAME]
    return dict(zip(names, args, strict=False)) | {**kwargs} if len(args) <= len(names) else None


def beyond_the_model(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Which tokens, or texts, are beyond the model's embeddings of them, if any; for messages."""
    inputs = by_name(model, args, kwargs) or kwargs
    for name in _TOKENS:
        ids = inputs.get(name)
        if isinstance(ids, Tensor) and ids.ndim == 2 and ids.numel():
            try:
                found = _unknown_tokens(model, name, ids)
            except RuntimeError:  # a CUDA device that an error has ended
                found = ""
            found = found or _too_long(model, name, ids.shape[1])
            if found:
                return found
    return ""


def _unknown_tokens(model: nn.Module, name: str, ids: Tensor) -> str:
    find: Any = getattr(model, "get_input_embeddings", None)
    try:
        rows = len(find().weight)
    except (AttributeError, NotImplementedError, TypeError):
        return ""
    least, most = int(ids.min()), int(ids.max())
    if 0 <= least and most < rows:
        return ""
    return (
        f"{name} go from {least} to {most}, and the model has embeddings of tokens 0 to "
        f"{rows - 1}: they are of another tokenizer, or padded with a token that the model lacks"
    )


def _too_long(model: nn.Module, name: str, length: int) -> str:
    most = min(_lengths(model), default=length)
    if length <= most:
        return ""
    return (
        f"{name} have {length:,} tokens to a text, and the model has positions for {most:,}: cut "
        f"the texts, as by tokenizer(..., truncation=True, max_length={most})"
    )


def _lengths(model: nn.Module) -> Iterator[int]:
    """The tokens of a text that there are positions for; none of a model that computes them."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _POSITIONS:
            # RoBERTa counts from behind the padding's position, BART from an offset.
            padded = 0 if module.padding_idx is None else module.padding_idx + 1
            yield module.num_embeddings - getattr(module, "offset", padded)
