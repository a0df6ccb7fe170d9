"""Compares a sparse model with a dense one of as many bytes by predicted loss, at equal tokens and at equal time.

Everything here is arithmetic on the scaling law. ``equal_bytes`` finds the two models of a planned run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from smet_compile.plan.scaling_law import EXPONENT, least_loss, predict_loss, tokens_to_reach


@dataclass(frozen=True)
class Advantage:
    """Holds two models that take as many bytes, and what the law predicts of them.

    Differences are the dense model's loss less the sparse one's: above zero where sparse is ahead. The law knows single
    weights alone, so for tiles and runs they hold as far as those learn as well as as many single weights.

    Args:
        num_weights: the weights of the sparse model's dense twin, as the law counts them.
        density: the density of its linear layers.
        dense_weights: the weights of the dense model, as the law counts them.
        tokens: the tokens that the sparse model reads.
        time_ratio: the time of a token in the sparse model over that in the dense one, which reads so many times as
            many tokens in the same time.
    """

    num_weights: float
    density: float
    dense_weights: float
    tokens: float
    time_ratio: float = 1.0

    @property
    def sparse_loss(self) -> float:
        return predict_loss(self.num_weights, self.tokens, self.density)

    @property
    def dense_loss(self) -> float:
        """Returns the loss of the dense model after as many tokens."""
        return predict_loss(self.dense_weights, self.tokens)

    @property
    def dense_tokens_in_time(self) -> float:
        return self.tokens * self.time_ratio

    @property
    def dense_loss_in_time(self) -> float:
        """Returns the loss of the dense model after as much time."""
        return predict_loss(self.dense_weights, self.dense_tokens_in_time)

    @property
    def at_equal_tokens(self) -> float:
        """Returns the difference after as many tokens, which does not depend on how many these are."""
        return least_loss(self.dense_weights) - least_loss(self.num_weights, self.density)

    @property
    def at_equal_time(self) -> float:
        return self.dense_loss_in_time - self.sparse_loss

    @property
    def break_even_time(self) -> float:
        """Returns the ``time_ratio`` at which neither is ahead; infinity where dense never catches up."""
        return tokens_to_reach(self.sparse_loss, self.dense_weights) / self.tokens

    @property
    def dense_time_to_loss(self) -> float:
        """Returns the time that dense takes to the loss of the sparse model, over the time of the sparse model."""
        return self.break_even_time / self.time_ratio

    @property
    def break_even_share(self) -> float:
        """Returns the share of ``at_equal_tokens`` at which neither is ahead at equal time.

        Tiles may keep less of the advantage than single weights have, and sparse is ahead where they keep more than
        this share. It is 0 where a token takes no longer than in the dense model, and infinity where there is no
        advantage to keep.
        """
        if self.at_equal_tokens <= 0:
            return math.inf
        return max(0.0, self.dense_loss - self.dense_loss_in_time) / self.at_equal_tokens

    @property
    def tokens_to_break_even(self) -> float:
        """Returns the tokens of the sparse model from which on it is ahead at equal time; infinity where it never is.

        What the dense model gains by the time that is left to it falls with the number of tokens.
        """
        share = self.break_even_share
        return share if math.isinf(share) else self.tokens * share ** (1 / EXPONENT)
