"""Predicts the held-out loss of dense and sparse language models by a published scaling law.

It is the law of "When Data Is Scarce: Scaling Sparse Language Models with Repeated Training" (arXiv 2606.01155), for
text that is read once:

    loss = E + A (d^ε + c (1 - d)^μ) / (d N)^α + B / D^α    in nats per token

N counts the weights of the dense twin without the output head (the sizes that the authors fit with are those of their
configurations so counted, to within 4% but for one), d is the density of its linear layers, D counts tokens. Embeddings
and head are dense in their runs, and d multiplies N all the same. Coefficients are those of their notebook
(github.com/boqian333/sparse-dc-scaling, fitting/fitting.ipynb, second stage), which fits 232 runs of LLaMAs with single
weights that move (SET), on C4 in bfloat16.
"""

from __future__ import annotations

import math

_A, _B, _E = math.exp(5.24073718), math.exp(6.10303089), math.exp(0.85355013)
EXPONENT = 0.32682177
"""α: losses fall with this power of weights and of tokens."""
_EPSILON, _MU, _C = -0.00968044, 0.84661793, -0.27288932

FITTED_WEIGHTS = 27e6, 1.99e9
FITTED_TOKENS = 0.1e9, 20.8e9
FITTED_DENSITIES = 0.0625, 1.0
"""The least and the most that the notebook lists for the runs that it fits."""
PREDICTION_ERROR = 0.021
"""The root mean square of the errors that the notebook prints for 11 runs outside the fit; the largest is 0.040.

All but one of these read their text several times, by a law with terms for that. The loss of the fit itself comes to as
much: about 0.02 for each run.
"""
LEAST_DIFFERENCE = 0.03
"""Smaller differences of two predictions say nothing: √2 times ``PREDICTION_ERROR``, for independent errors."""


def density_factor(density: float) -> float:
    """Returns the capacity term of a model of this density over that of a dense model with as many active weights."""
    return density**_EPSILON + _C * (1 - density) ** _MU


def predict_loss(num_weights: float, tokens: float, density: float = 1.0) -> float:
    """Returns the held-out loss in nats per token; the module says what the arguments count."""
    return least_loss(num_weights, density) + _B / tokens**EXPONENT


def least_loss(num_weights: float, density: float = 1.0) -> float:
    """Returns the loss that the model approaches with ever more tokens."""
    return _E + _A * density_factor(density) / (density * num_weights) ** EXPONENT


def tokens_to_reach(loss: float, num_weights: float, density: float = 1.0) -> float:
    """Returns the tokens after which a model has this loss; infinitely many where it never has."""
    left = loss - least_loss(num_weights, density)
    return math.inf if left <= 0 else (_B / left) ** (1 / EXPONENT)
