"""Texts without what pads them to the length of the longest one."""

from torch import Tensor
from torch.nn.functional import pad

from lcodec_ext._torch.batches import Batch, tensors_of


def padded_length(batch: Batch) -> int:
    """The length to which the texts of a batch are padded, by "attention_mask"; 0 without one."""
    mask = batch.kwargs.get("attention_mask")
    return mask.shape[1] if isinstance(mask, Tensor) and mask.ndim == 2 else 0


def words_of(batch: Batch) -> Tensor | None:
    """Which places of its texts hold words, by "attention_mask", bool of shape (n, length)."""
    mask = batch.kwargs.get("attention_mask")
    return mask != 0 if isinstance(mask, Tensor) and mask.ndim == 2 else None


def labels_of(batch: Batch, ignored: int = -100) -> Tensor | None:
    """Which of the labels of its texts count, bool of shape (n, length)."""
    labels = batch.targets
    if not isinstance(labels, Tensor) or labels.ndim != 2 or labels.is_floating_point():
        return None
    return labels != ignored


def counted_in(batch: Batch, decoder: bool) -> list[Tensor]:
    """Which places count, bool of shape (n, length): of texts, and of what a decoder is given."""
    found = [words_of(batch), labels_of(batch) if decoder else None]
    return [mask for mask in found if mask is not None and len(mask) == batch.size]


def moved_to_front(batch: Batch, length: int) -> list[Tensor]:
    """The tensors of a batch, which are the same for a text however it was padded.

    Parameters
    ----------
    batch : Batch
    length : int
        Of all texts in the result, at least `padded_length`; where this is 0 nothing changes.

    Returns
    -------
    list of Tensor
        In those that have a place for each word, padded words are zeros at the end.
    """
    tensors = list(tensors_of(batch.data))
    before = padded_length(batch)
    if not before:
        return tensors
    masked = batch.kwargs["attention_mask"] == 0
    order = masked.int().argsort(dim=1, stable=True)
    masked = masked.gather(1, order)

    def moved(tensor: Tensor) -> Tensor:
        if tensor.ndim < 2 or tensor.shape[1] != before:
            return tensor
        of = (*order.shape, *[1] * (tensor.ndim - 2))
        front = tensor.gather(1, order.view(of).expand_as(tensor))
        front = front.masked_fill(masked.view(of), 0)
        return pad(front, (*[0, 0] * (tensor.ndim - 2), 0, length - before))

    return [moved(tensor) for tensor in tensors]
