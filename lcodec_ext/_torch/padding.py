"""Texts without what pads them to the length of the longest one."""

from torch import Tensor
from torch.nn.functional import pad

from lcodec_ext._torch.batches import Batch, tensors_of


def padded_length(batch: Batch) -> int:
    """The length to which the texts of a batch are padded, by "attention_mask"; 0 without one."""
    mask = batch.kwargs.get("attention_mask")
    return mask.shape[1] if isinstance(mask, Tensor) and mask.ndim == 2 else 0


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
