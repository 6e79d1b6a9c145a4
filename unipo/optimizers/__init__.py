"""Optimisers of policy gradients that a plain `torch.optim` cannot be: they measure in KL, or look ahead before sampling."""

from __future__ import annotations

from unipo.optimizers.momentum import (
    Decay,
    HessianAidedRecursive,
    ImplicitGradientTransport,
    NormalisedMomentum,
    StochasticGradient,
    gradient_difference,
)
from unipo.optimizers.repeated import RepeatedSteps
from unipo.optimizers.trust_region import TrustRegion, conjugate_gradient, hessian_vector_product
