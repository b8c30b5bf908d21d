"""What scripts cannot pass, and `install` sets for them."""

from dataclasses import dataclass

from lcodec_ext._checks import check_bool


@dataclass
class Switch:
    """Settings for calls that do not give their own."""

    reference_bugs: bool = False
    approx_type: str | None = None  # instead of params.approxType


SWITCH = Switch()


def bugs(given: bool | None) -> bool:
    """Whether to do what the published code does: as it is given, else as `install` set it."""
    if given is None:
        return SWITCH.reference_bugs
    check_bool(given, "reference_bugs")
    return given
