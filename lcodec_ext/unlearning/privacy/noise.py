"""What the noise of a release does to a model."""

import warnings

from lcodec_ext._torch.loss import is_much_worse
from lcodec_ext.unlearning.privacy import Guarantee


def warn_of_noise(
    before: float, after: float, guarantee: Guarantee, samples: str, *, stacklevel: int
) -> None:
    """Warn where noise raises a mean loss by much."""
    if is_much_worse(before, after):
        warnings.warn(
            f"the noise for epsilon={guarantee.epsilon:g}, delta={guarantee.delta:g}, whose "
            f"standard deviation is {guarantee.sigma:.3g}, raised the mean loss of {samples} from "
            f"{before:.3g} to {after:.3g}. A larger epsilon or weight decay takes less noise",
            stacklevel=stacklevel + 1,
        )
