"""Perturbations of the inputs of a deletion request."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lcodec_ext._checks import check_integer, counted
from lcodec_ext._torch.batches import Batch, map_tensors, tensors_of

Perturb = Callable[[Any, np.random.Generator], Any]


@dataclass(frozen=True)
class TokenReplacement:
    """Replace a few random tokens of every text by random other ones, for the option `perturb`.

    Masked and special tokens stay, and no token becomes a special one.

    Parameters
    ----------
    vocab_size : int, optional
        Replacements are drawn from the tokens 0 to vocab_size - 1, or from token_ids; give one.
    token_ids : sequence of int, optional
        The tokens that replacements are drawn from.
    n_tokens : int, default 1
        Tokens of each sample that are replaced, the paper's one; fewer if a sample has fewer.
    special_ids : sequence of int, default ()
        Special tokens: padding, beginning, separators and so on (``tokenizer.all_special_ids``).
    input_key : str or int, default "input_ids"
        Name of the tokens in a dict of inputs, or position in a tuple.
    mask_key : str or int, default "attention_mask"
        The same for their mask, 1 for tokens that count, of the same shape; it may be missing.

    Raises
    ------
    ValueError, TypeError
        For options of another kind, and for vocabularies of fewer than two tokens.

    Examples
    --------
    >>> replace = TokenReplacement(vocab_size=100, special_ids=(0, 1, 2))
    >>> tokens = torch.tensor([[1, 17, 41, 2, 0, 0]])
    >>> changed = replace({"input_ids": tokens}, np.random.default_rng(0))["input_ids"]
    >>> (changed != tokens).int()
    tensor([[0, 0, 1, 0, 0, 0]], dtype=torch.int32)
    """

    vocab_size: int | None = None
    token_ids: Sequence[int] | None = None
    n_tokens: int = 1
    special_ids: Sequence[int] = ()
    input_key: str | int = "input_ids"
    mask_key: str | int = "attention_mask"

    def __post_init__(self) -> None:
        if (self.vocab_size is None) == (self.token_ids is None):
            raise ValueError(
                "give either vocab_size or token_ids, the tokens to draw from; got "
                f"vocab_size={self.vocab_size!r} and "
                f"{'no' if self.token_ids is None else len(self.token_ids)} token_ids"
            )
        if self.vocab_size is not None:
            check_integer(self.vocab_size, "vocab_size", 1)
        for name in ("token_ids", "special_ids"):
            value = getattr(self, name)
            if value is not None:
                checked = tuple(check_integer(token, f"a token of {name}", 0) for token in value)
                object.__setattr__(self, name, checked)
        check_integer(self.n_tokens, "n_tokens", 1)
        for name in ("input_key", "mask_key"):
            key = getattr(self, name)
            if isinstance(key, bool) or not isinstance(key, str | int):
                raise TypeError(f"{name} must be a name or a position; got {key!r}")
        if len(self._vocabulary) < 2:
            raise ValueError(
                "the vocabulary must have at least two tokens that are not special; it has "
                f"{len(self._vocabulary)}"
            )

    def to_dict(self) -> dict[str, Any]:
        """The options as JSON takes them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> "TokenReplacement":
        """Make the object that `to_dict` wrote."""
        return cls(**options)

    @cached_property
    def _vocabulary(self) -> NDArray[np.int64]:
        """The tokens that may be drawn, ascending."""
        tokens = range(self.vocab_size or 0) if self.token_ids is None else self.token_ids
        return np.setdiff1d(np.array(tokens), self.special_ids).astype(np.int64)

    def __call__(self, inputs: Any, rng: np.random.Generator) -> Any:
        """Replace tokens in the inputs of the model; the given ones are not changed."""
        ids = self._find(inputs, self.input_key)
        if ids is None:
            known = list(inputs) if isinstance(inputs, Mapping) else counted(len(inputs), "tensor")
            raise ValueError(
                f"input_key={self.input_key!r} names none of the inputs of the model: {known}"
            )
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise TypeError(f"the tokens must be integers; got a tensor of {ids.dtype}")
        tokens = ids.cpu().numpy().astype(np.int64)
        free = ~np.isin(tokens, self.special_ids)
        mask = None if isinstance(inputs, Tensor) else self._find(inputs, self.mask_key)
        if mask is not None:
            if mask.shape != ids.shape:
                raise ValueError(
                    f"the mask must have the shape of the tokens, {tuple(ids.shape)}; got "
                    f"{tuple(mask.shape)}"
                )
            free &= mask.cpu().numpy() != 0
        changed = torch.from_numpy(self._replace(tokens, free, rng)).to(ids)
        if isinstance(inputs, Tensor):
            return changed
        if isinstance(inputs, Mapping):
            return {**inputs, self.input_key: changed}
        position = range(len(inputs))[int(self.input_key)]
        return tuple(changed if k == position else part for k, part in enumerate(inputs))

    @staticmethod
    def _find(inputs: Any, key: str | int) -> Tensor | None:
        if isinstance(inputs, Tensor):
            return inputs
        try:
            return inputs[key]
        except (KeyError, IndexError, TypeError):  # a name where there are positions, too
            return None

    def _replace(
        self, tokens: NDArray[np.int64], free: NDArray[np.bool_], rng: np.random.Generator
    ) -> NDArray[np.int64]:
        shape = tokens.shape
        tokens, free = tokens.reshape(len(tokens), -1), free.reshape(len(tokens), -1)
        order = np.argsort(np.where(free, rng.random(tokens.shape), 2.0), axis=1)
        rows, columns = np.indices(order[:, : self.n_tokens].shape)
        places = rows, order[rows, columns]
        old, vocabulary = tokens[places], self._vocabulary
        at = np.searchsorted(vocabulary, old)
        known = vocabulary[np.minimum(at, len(vocabulary) - 1)] == old
        drawn = rng.integers(0, len(vocabulary) - known)
        new = vocabulary[drawn + (known & (drawn >= at))]  # any but the old one
        changed = tokens.copy()
        changed[places] = np.where(free[places], new, old)
        return changed.reshape(shape)


def perturbed(
    batch: Batch, seed: int, index: int, *, noise_std: float = 0.1, perturb: Perturb | None = None
) -> Batch:
    """Draw one perturbation of the inputs of a batch, a function of seed and index alone.

    Parameters
    ----------
    batch : Batch
        Whose targets stay.
    seed, index : int
        The draws come from NumPy's Philox under the key seed, its counter starting at
        index * 2**192.
    noise_std : float, default 0.1
        Of the Gaussian noise that every floating-point input gets, the paper's value.
    perturb : callable, optional
        What to do instead: ``perturb(inputs, rng)`` is given the inputs as the model takes them, a
        tensor, a tuple of tensors or a dict of them, and returns them perturbed: the same
        structure, shapes and dtypes. All it draws must come from rng, a `numpy.random.Generator`.

    Raises
    ------
    TypeError
        If no input is floating-point and perturb is not given.
    ValueError, TypeError
        For what perturb returns, if it is of another kind.
    """
    philox = np.random.Philox(key=seed, counter=[0, 0, 0, index])
    rng = np.random.Generator(philox)
    inputs: Any = batch.kwargs or (batch.args[0] if len(batch.args) == 1 else batch.args)
    if perturb is None:
        if not any(tensor.is_floating_point() for tensor in tensors_of(inputs)):
            raise TypeError(
                "Gaussian noise needs floating-point inputs, and the model takes none: give "
                "perturb=TokenReplacement(vocab_size, special_ids=...) for text, or a callable "
                "perturb(inputs, rng) for other integer inputs"
            )

        def add_noise(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor
            noise = noise_std * rng.standard_normal(tuple(tensor.shape))
            return tensor + torch.from_numpy(noise).to(tensor)

        changed = map_tensors(add_noise, inputs)
    else:
        changed = perturb(map_tensors(torch.clone, inputs), rng)
        _check_perturbed(inputs, changed)
    if batch.kwargs:
        return dataclasses.replace(batch, kwargs=dict(changed))
    args = (changed,) if len(batch.args) == 1 else tuple(changed)
    return dataclasses.replace(batch, args=args)


def _check_perturbed(inputs: Any, changed: Any, where: str = "") -> None:
    """Refuse perturbed inputs of another structure, shape, dtype or device."""

    def kind(value: Any) -> str:
        if isinstance(value, Tensor):
            return f"a tensor of shape {tuple(value.shape)}, {value.dtype}, on {value.device}"
        if isinstance(value, Mapping):
            return f"a dict with {sorted(map(str, value))}"
        if isinstance(value, tuple | list):
            return counted(len(value), "value")
        return type(value).__name__

    expected, given = kind(inputs), kind(changed)
    if expected != given:
        raise ValueError(
            "perturb must return inputs of the same structure, shapes and dtypes"
            f"{where and f'; at {where}'}: expected {expected}, got {given}"
        )
    if isinstance(inputs, Mapping):
        for key in inputs:
            _check_perturbed(inputs[key], changed[key], f"{where}[{key!r}]")
    elif isinstance(inputs, tuple | list):
        for k, (part, other) in enumerate(zip(inputs, changed, strict=True)):
            _check_perturbed(part, other, f"{where}[{k}]")
