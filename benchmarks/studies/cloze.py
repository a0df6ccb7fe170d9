"""Asks a model for identifiers that stood before in the same window of held-out text.

A place is the second or a later occurrence of an identifier of at least five characters that is no keyword, whole
within the window; in natural language it is a word. Given all text before it, the model has to predict each of its
tokens. Greedy decoding writes the identifier exactly where each of them has the highest score with the true ones before
it, so that one pass over the window answers for all places in it. With byte pairs only places count that begin and end
with a token; the first token may have a space before. The places are the same for every model and seed.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.studies.corpus import Corpus

MOST_WINDOWS = 512
_IDENTIFIER = re.compile(rb"[A-Za-z_][A-Za-z0-9_]*")
_LEAST_LENGTH = 5
_KEYWORDS = {word.encode() for word in (*keyword.kwlist, *keyword.softkwlist)}
_WINDOWS_AT_ONCE = 32


@dataclass(frozen=True)
class Place:
    """Says which tokens of a window, from ``first`` to before ``end``, write an identifier of ``num_bytes``."""

    first: int
    end: int
    num_bytes: int


def places(window: Sequence[bytes]) -> Iterator[Place]:
    """Yields the places of a window, which is given by the bytes of each of its tokens."""
    text = b"".join(window)
    token_at, offset = {}, 0
    for token, piece in enumerate(window):
        token_at[offset] = token
        offset += len(piece)
    token_at[offset] = len(window)
    known = set()
    for found in _IDENTIFIER.finditer(text):
        name, (start, stop) = found.group(), found.span()
        if start == 0 or stop == len(text) or len(name) < _LEAST_LENGTH or name in _KEYWORDS:
            continue  # what touches an edge may be cut
        if name in known:
            first = token_at.get(start - 1 if text[start - 1 : start] == b" " and start not in token_at else start)
            end = token_at.get(stop)
            if first and end:
                yield Place(first, end, len(name))
        known.add(name)


@dataclass(frozen=True)
class Cloze:
    """Holds windows (W, sequence) int64 and the places of each."""

    windows: Tensor
    places: list[list[Place]]

    @classmethod
    def of(cls, corpus: Corpus, most: int = MOST_WINDOWS) -> Cloze:
        """Finds the windows of the held-out text that have places, and takes ``most`` evenly spaced ones at most."""
        windows = corpus.all_held_out()
        found = [list(places([corpus.pieces[token] for token in window])) for window in windows.tolist()]
        rows = [row for row, each in enumerate(found) if each]
        spaced = torch.linspace(0, len(rows) - 1, min(len(rows), most)).long().tolist()
        taken = [rows[place] for place in spaced]
        return cls(windows[taken].long(), [found[row] for row in taken])

    @torch.no_grad()
    def ask(self, model: nn.Module, device: str) -> dict:
        """Returns the number of places, the share that is predicted exactly, and the nats per byte of identifiers."""
        exact, nats, num_bytes, num_places = 0, 0.0, 0, 0
        for start in range(0, len(self.windows), _WINDOWS_AT_ONCE):
            windows = self.windows[start : start + _WINDOWS_AT_ONCE].to(device)
            scores = model(input_ids=windows).logits[:, :-1].double()
            wanted = windows[:, 1:]
            losses = functional.cross_entropy(scores.transpose(1, 2), wanted, reduction="none").cpu()
            hits = (scores.argmax(-1) == wanted).cpu()
            for row, each in enumerate(self.places[start : start + _WINDOWS_AT_ONCE]):
                for place in each:
                    span = slice(place.first - 1, place.end - 1)  # token t is predicted at t - 1
                    exact += int(hits[row, span].all())
                    nats += float(losses[row, span].sum())
                    num_bytes += place.num_bytes
            num_places += sum(map(len, self.places[start : start + _WINDOWS_AT_ONCE]))
        if not num_places:
            return {"places": 0, "exact": None, "nats_per_byte": None}
        return {"places": num_places, "exact": exact / num_places, "nats_per_byte": nats / num_bytes}
