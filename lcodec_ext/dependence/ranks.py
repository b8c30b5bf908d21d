"""The ranks of a process group that a user passes; this process alone without one."""

from typing import TYPE_CHECKING, Any, TypeAlias

from lcodec_ext._one_rank import OneRank, one_rank

if TYPE_CHECKING:
    from lcodec_ext._torch.group import Ranks

AnyRanks: TypeAlias = "Ranks | OneRank"


def ranks_of(group: Any, function: str) -> AnyRanks:
    """The ranks of `group`; torch is loaded only where there is one."""
    if group is None:
        return one_rank()
    try:
        from lcodec_ext._torch.group import Ranks
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError("group= needs PyTorch: pip install 'lcodec_ext[torch]'") from None
    return Ranks(group, function)
