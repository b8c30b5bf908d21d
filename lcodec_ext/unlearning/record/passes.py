"""Forward passes over several groups of samples at once, as if each group had gone alone."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lcodec_ext._torch.batches import Batch, map_tensors, part_of, tensors_of
from lcodec_ext._torch.loss import LossFunction, scalar_loss
from lcodec_ext.unlearning.record.activations import ALL, Call, Layout, Recorder, Site
from lcodec_ext.unlearning.record.perturb import Perturb, TokenReplacement

# Of a layer's activations in one forward pass, unless a single group has more. Larger ones leave
# the caches, and the C library releases and allocates their memory for every layer.
_PASS_BYTES = 2**24


class Passes:
    """Forward passes over groups of samples that follow each other in a batch.

    They give the mean activations and the loss of every group, as if it had gone alone. A probe
    finds out whether several groups can go at once.
    """

    def __init__(
        self,
        model: nn.Module,
        recorder: Recorder,
        calls: list[Call],
        loss_fn: LossFunction,
        perturb: Perturb | None,
    ) -> None:
        self._model, self._recorder, self._calls = model, recorder, calls
        self._loss_fn, self._perturb = loss_fn, perturb
        self._layouts: dict[Call, list[Layout]] = {}
        self._vmap = False
        self._bytes = 1  # of the largest view of one group

    def run(self, batch: Batch, groups: int) -> tuple[dict[Call, Any], Tensor]:
        """Mean activations of each call, one row a group, and losses, shape (groups,)."""

        def reduce(call: Call, site: Site, views: list[Tensor]) -> Any:
            layouts = [ALL] * len(views) if groups == 1 else self._layouts.get(call)
            if layouts is None:
                return None  # a call that the check below refuses
            pairs = zip(views, layouts, strict=True)
            return site.finish([site.means(view, layout, groups) for view, layout in pairs])

        outputs, means = self._call(batch, reduce)
        if list(means) != self._calls:
            raise ValueError("the layers that the model calls change from input to input")
        return means, self._losses(outputs, batch, groups)

    def _call(
        self, batch: Batch, take: Callable[[Call, Site, list[Tensor]], Any]
    ) -> tuple[Any, dict[Call, Any]]:
        """Call the model on perturbed inputs; on the given ones it has been called before."""
        try:
            return self._recorder.run(self._model, batch, take)
        except (IndexError, RuntimeError) as error:  # of embeddings, and of their bags
            if self._perturb is None or isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            raise ValueError(
                f"the model fails on perturbed inputs: {error}. {self._suspicion()}"
            ) from error

    def _suspicion(self) -> str:
        if not isinstance(self._perturb, TokenReplacement):
            return "perturb must return inputs that it takes"
        size, drawn = self._perturb.vocab_size, self._perturb.token_ids or ()
        given = f"tokens up to {max(drawn)} in token_ids" if size is None else f"vocab_size={size}"
        rows = [
            f"{name!r} {module.num_embeddings}"
            for name, module in self._model.named_modules()
            if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        ]
        known = f"; rows of the model's embeddings: {', '.join(rows[:4])}" if rows else ""
        return f"TokenReplacement may draw tokens that the model does not have: {given}{known}"

    def _losses(self, outputs: Any, batch: Batch, groups: int) -> Tensor:
        if groups == 1:
            return self._loss(outputs, batch.targets)[None]
        each = batch.size // groups
        if not self._vmap:
            slices = [slice(k * each, (k + 1) * each) for k in range(groups)]
            return torch.stack(
                [
                    self._loss(*part_of((outputs, batch.targets), batch.size, samples))
                    for samples in slices
                ]
            )
        both = outputs, batch.targets
        tensors = list(tensors_of(both))
        split = [tensor.ndim > 0 and len(tensor) == batch.size for tensor in tensors]
        parts = [
            torch.unflatten(tensor, 0, (groups, each)) if of_samples else tensor
            for tensor, of_samples in zip(tensors, split, strict=True)
        ]

        def loss(*parts: Tensor) -> Tensor:
            remaining = iter(parts)
            return self._loss(*map_tensors(lambda _: next(remaining), both))

        in_dims = tuple(0 if of_samples else None for of_samples in split)
        return torch.func.vmap(loss, in_dims)(*parts)

    def _loss(self, outputs: Any, targets: Any) -> Tensor:
        return scalar_loss(self._loss_fn, outputs, targets)

    def together(self, first: Batch, second: Batch, most: int) -> int:
        """How many groups like two different ones go together, at most; 1 if they cannot."""
        if not self._probe(first, second):
            return 1
        return max(1, min(most, _PASS_BYTES // self._bytes))

    def _probe(self, first: Batch, second: Batch) -> bool:
        """Find out how two different groups can go together; False if they cannot.

        They can if every activation and loss equals, up to rounding, that of the group alone.
        """

        def alone(call: Call, site: Site, views: list[Tensor]) -> list[tuple[torch.Size, Any]]:
            self._bytes = max(self._bytes, *(view.numel() * view.element_size() for view in views))
            return [(view.shape, site.means(view, ALL, 1)) for view in views]

        expected, taken = [], []
        for batch in (first, second):
            outputs, found_alone = self._call(batch, alone)
            taken.append(found_alone)
            expected.append(self._losses(outputs, batch, 1))
        one, two = taken

        def both_ways(
            call: Call, site: Site, views: list[Tensor]
        ) -> tuple[Site, list[dict[Layout, Any]]]:
            pairs = zip(one.get(call, ()), views, strict=False)
            return site, [
                {
                    layout: site.means(view, layout, 2)
                    for layout in _layouts(shape, view.shape, first.size)
                }
                for (shape, _), view in pairs
            ]

        both = Batch.joined([first, second])
        try:
            outputs, found = self._call(both, both_ways)
            losses = self._losses(outputs, both, 2)
        except Exception:  # a model may be made for one number of samples
            return False
        if not list(one) == list(two) == list(found):
            return False
        if not _agree(losses, torch.cat(expected)):
            return False
        for call, (site, options) in found.items():
            self._layouts[call] = []
            for means, (_, a), (_, b) in zip(options, one[call], two[call], strict=True):
                wanted = torch.cat([site.table(a, 1), site.table(b, 1)])
                errors = {
                    layout: (site.table(mean, 2) - wanted).abs().max().item()
                    for layout, mean in means.items()
                }
                best = min(errors, key=lambda layout: errors[layout], default=None)
                if best is None or not _agree(site.table(means[best], 2), wanted):
                    return False
                self._layouts[call].append(best)
        self._vmap = True
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # of operations that vmap runs one by one
                self._vmap = _agree(self._losses(outputs, both, 2), losses)
        except Exception:  # vmap cannot run every loss
            self._vmap = False
        return True


def _layouts(alone: Sequence[int], both: Sequence[int], size: int) -> list[Layout]:
    """Possible sample layouts of a view, from its shapes for `size` and 2 `size` samples."""
    if len(alone) != len(both):
        return []
    grown = [axis for axis in range(len(alone) - 1) if alone[axis] != both[axis]]
    if len(grown) > 1:
        return []
    if not grown:
        return [ALL]
    (axis,) = grown
    positions, rest = divmod(alone[axis], size)
    if rest or both[axis] != 2 * alone[axis]:
        return []
    return list(dict.fromkeys([Layout(axis), Layout(axis, positions)]))


def _agree(a: Tensor, b: Tensor) -> bool:
    """Whether two results are equal up to rounding; the larger entries count."""
    rtol = min(1e3 * torch.finfo(a.dtype).eps, 0.05)
    return bool((a - b).abs().max() <= rtol * b.abs().max())
