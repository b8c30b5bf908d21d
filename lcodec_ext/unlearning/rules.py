"""The rules that select units, by name: `lcodec_ext.unlearning.select` fills the table."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Rule:
    """A way to select units, or single parameters.

    `select` takes a `Question` and returns a `Choice`, both of `lcodec_ext.unlearning.select`.
    `size` is "given" if the rule fixes the number of units, "needed" if it needs n_units or
    max_parameters, "share" if it needs max_parameters, and "optional" if it stops by itself without
    them. A repeated rule selects again after every step.
    """

    select: Callable[[Any], Any]
    size: Literal["given", "needed", "optional", "share"]
    repeated: bool = False


#: Filled when `lcodec_ext.unlearning` is imported, so before anyone makes settings.
RULES: dict[str, Rule] = {}
