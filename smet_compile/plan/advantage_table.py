"""Prints on which side a planned run is, by predicted loss beside the dense model of as many bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator

from smet_compile.plan.equal_bytes import EqualBytes, count_text
from smet_compile.plan.scaling_law import LEAST_DIFFERENCE, PREDICTION_ERROR
from smet_compile.plan.stored import bytes_text
from smet_compile.tables import table_lines


def table_of(found: EqualBytes) -> str:
    """Returns the two comparisons, what breaks even, and what is assumed."""
    one = found.advantage
    title = (
        f"beside a dense model of as many bytes ({bytes_text(found.num_bytes)}): {found.width:.3g} times as wide, "
        f"{count_text(one.dense_weights)} weights for {count_text(one.num_weights)} at density {one.density:.3g}"
    )
    rows = [
        ("predicted loss", "sparse", "dense", "difference", ""),
        _row("equal tokens", one.sparse_loss, one.dense_loss),
        _row("equal time", one.sparse_loss, one.dense_loss_in_time),
    ]
    return "\n".join([title, *table_lines(rows, left=(0, 4)), *_break_even(found), *_assumptions(found)])


def side(difference: float) -> str:
    """Says who is ahead, from the dense model's loss less the sparse one's."""
    if abs(difference) < LEAST_DIFFERENCE:
        return "too close to tell"
    return "sparse is ahead" if difference > 0 else "dense is ahead"


def _row(name: str, sparse: float, dense: float) -> tuple[str, ...]:
    return name, f"{sparse:.3f}", f"{dense:.3f}", f"{dense - sparse:+.3f}", side(dense - sparse)


def _break_even(found: EqualBytes) -> Iterator[str]:
    one = found.advantage
    yield (
        f"tokens: {count_text(one.tokens)}, and {count_text(one.dense_tokens_in_time)} of the dense model in equal "
        f"time: a token takes {one.time_ratio:.3g} times as long in the sparse one"
    )
    if math.isinf(one.dense_time_to_loss):
        yield "to the loss of the sparse model: the dense one never comes"
    else:
        yield f"to the loss of the sparse model: the dense one takes {one.dense_time_to_loss:.3g} times its time"
    if one.at_equal_tokens <= 0:
        yield "dense is predicted to be no worse at equal tokens, and so at equal time unless sparse is faster"
        return
    longest = "however long" if math.isinf(one.break_even_time) else f"up to {one.break_even_time:.3g} times as long"
    yield f"at equal time sparse is no worse with tokens that take {longest}"
    if not math.isinf(found.break_even_efficiency):
        yield f"or with sparse products at {found.break_even_efficiency:.2g} of the rate of dense ones"
    yield f"or from {count_text(one.tokens_to_break_even)} tokens on, at the ratio of times above"
    if found.blocks != "single weights":
        yield f"{found.blocks} have to keep {one.break_even_share:.2f} of what as many single weights gain"


def _assumptions(found: EqualBytes) -> Iterator[str]:
    yield (
        "assumed: the scaling law of arXiv 2606.01155 (LLaMAs with single weights, C4, each token read once), in nats "
        "per token"
    )
    if found.sparse_efficiency is None:
        speed = "products take as long as those of a dense model as wide"
    else:
        speed = f"sparse products run at {found.sparse_efficiency:g} of the rate of dense ones"
    learn = "" if found.blocks == "single weights" else f"{found.blocks} learn like as many single weights, "
    yield f"assumed: {learn}{speed}, time goes with operations"
    yield "assumed: one recipe for both, no gradients that updates in backward use up; activations are not counted"
    yield (
        f"uncertain: the law missed runs outside its fit by {PREDICTION_ERROR:g} (root mean square), so differences "
        f"below {LEAST_DIFFERENCE:g} are not told apart"
    )
    if found.outside_fit:
        yield f"outside the fit: {'; '.join(found.outside_fit)}"
