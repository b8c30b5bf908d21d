"""Noise for releases, what it guarantees, and how releases add up.

A release is the weights after a deletion plus Gaussian noise on every coordinate. It is
(epsilon, delta)-indistinguishable from retraining plus the same noise if the noise covers the
distance between the two. docs/privacy.md has the derivations.

gaussian   how much noise: `gaussian_sigma`, `gaussian_delta`
bounds     the distance between one Newton step and retraining: `removal_bound`
guarantee  whether that bound applies: `removal_guarantee`
noise      `add_noise` draws it
budget     `PrivacyBudget` adds up releases
linear     `CertifiedLinear`, which puts the noise into training
"""

from lcodec_ext.unlearning.privacy.bounds import (
    LossConstants,
    RemovalBound,
    logistic_constants,
    removal_bound,
    sekhari_sensitivity,
)
from lcodec_ext.unlearning.privacy.budget import PrivacyBudget, PrivacyBudgetExceeded
from lcodec_ext.unlearning.privacy.gaussian import gaussian_delta, gaussian_sigma
from lcodec_ext.unlearning.privacy.guarantee import Guarantee, Kind, removal_guarantee
from lcodec_ext.unlearning.privacy.linear import CertifiedLinear, RemovalRecord
from lcodec_ext.unlearning.privacy.noise import add_noise, standard_normals, warn_of_noise

__all__ = [
    "CertifiedLinear",
    "Guarantee",
    "Kind",
    "LossConstants",
    "PrivacyBudget",
    "PrivacyBudgetExceeded",
    "RemovalBound",
    "RemovalRecord",
    "add_noise",
    "gaussian_delta",
    "gaussian_sigma",
    "logistic_constants",
    "removal_bound",
    "removal_guarantee",
    "sekhari_sensitivity",
    "standard_normals",
    "warn_of_noise",
]
