"""Record what units and loss do when a deletion request is perturbed."""

from lcodec_ext.unlearning.record.perturb import TokenReplacement, perturbed
from lcodec_ext.unlearning.record.recording import Recording, record

__all__ = ["Recording", "TokenReplacement", "perturbed", "record"]
