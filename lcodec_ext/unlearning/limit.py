"""The memory that a deletion takes at most where no max_memory is given."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lcodec_ext._torch.memory import available_memory
from lcodec_ext.unlearning.settings import Settings

SHARE = 0.75  # of the memory that is available: an estimate may be short by a third

#: What settings cost that are lowered for memory; the others cost time alone.
_COSTS = {
    "max_iterations": "a less exact step",
    "n_curvature": "curvature of fewer samples",
    "control_groups": "a strength that is less sure",
    "finish": "less of a finish",
    "repair_epochs": "less repair",
    "retries": "fewer attempts",
    "n_guard": "harm that is looked for on fewer samples",
    "n_recalibrate": "batch norms of fewer samples",
}


@dataclass(frozen=True)
class Limit:
    """A share of what is available."""

    available: int
    most: int

    @classmethod
    def of(cls, settings: Settings, device: torch.device) -> "Limit | None":
        """None where settings have a limit of their own, or cannot be lowered, or nothing tells."""
        if settings.max_memory is not None or settings.update == "certified":
            return None
        available = available_memory(device)
        return None if available is None else cls(available, max(1, int(SHARE * available)))

    def __str__(self) -> str:
        return (
            f"{self.most:,} bytes, {SHARE:.0%} of the {self.available:,} that are available "
            "(the default of max_memory)"
        )

    def told(self, chosen: Mapping[str, Any]) -> str:
        """What was lowered for it, and what that costs."""
        lowered = {name: value for name, value in chosen.items() if name != "max_memory"}
        costs = [_COSTS[name] for name in lowered if name in _COSTS]
        return (
            f"with all that was asked for the deletion would take more than {self}. Lowered to "
            f"fit: {', '.join(f'{k}={v}' for k, v in lowered.items()) or 'the history of L-BFGS'}. "
            f"It costs {', '.join(['time', *costs])}. For other settings pass max_memory, select "
            "fewer parameters (selection, max_parameters) or free memory"
        )
