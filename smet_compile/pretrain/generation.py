"""Writes text with the model of a run."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from smet_compile.pretrain.saved_run import SavedRun

CUT = "\ufffd"


class Printer:
    """Shows the text of tokens as they come, as a `streamer` of `generate`; a character waits for its last byte."""

    def __init__(self, decode: Callable[[list[int]], str], show: Callable[[str], object]) -> None:
        self._decode, self._show = decode, show
        self._tokens: list[int] = []
        self._num_shown = 0
        self._is_prompt = True

    def new_prompt(self) -> None:
        """Has the next tokens count as a prompt, which was shown before."""
        self._is_prompt = True

    def put(self, tokens: Tensor) -> None:
        """Takes the prompt, and then a token at a time."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self._tokens += tokens.flatten().tolist()
        text = self._decode(self._tokens).rstrip(CUT)
        self._show(text[self._num_shown :])
        self._num_shown = max(self._num_shown, len(text))

    def end(self) -> None:
        """Does nothing: what follows may be another piece of the same text."""


def generate_text(
    run: SavedRun, prompt: str, *, tokens: int, temperature: float, seed: int, show: Callable[[str], object]
) -> str:
    """Goes on with `prompt` for up to `tokens` tokens, and ends where a document ends; returns prompt and text.

    The model sees at most as many tokens as a sequence of its training had. Where the text is longer, it goes on from
    the last half of them. `show` gets pieces of the text as they come.

    Args:
        temperature: divides the logits before a token is drawn; 0 takes the likeliest one.
    """
    model: Any = run.load()
    start = run.tokenizer.encode(prompt).tolist()
    if run.tokenizer.end is not None:
        start = start[:-1] or [run.tokenizer.end]
    if not start:
        raise ValueError("PROMPT: expected some text, got none (the tokenizer has no token to begin with); pass text")
    torch.manual_seed(seed)
    draws = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    ends = {"eos_token_id": run.tokenizer.end, "pad_token_id": run.tokenizer.end or 0}
    printer = Printer(run.tokenizer.decode, show)
    show(prompt)
    found, window = list(start), run.config.sequence
    while (left := tokens - (len(found) - len(start))) > 0:
        seen = found if len(found) < window else found[-max(1, window // 2) :]
        printer.new_prompt()
        ids = torch.tensor([seen], device=run.config.device)
        length = min(left, window - len(seen))
        with torch.no_grad():
            made = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=length,
                streamer=cast(Any, printer),
                use_cache=True,
                **draws,
                **ends,
            )
        new = made[0, len(seen) :].tolist()
        found += new
        if not new or new[-1] == run.tokenizer.end:
            break
    return prompt + run.tokenizer.decode(found[len(start) :])
