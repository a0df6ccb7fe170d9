"""The cloze test finds identifiers that stood before, and models with known answers get what they deserve."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from benchmarks.studies.cloze import Cloze, Place, places
from benchmarks.studies.corpus import Corpus
from benchmarks.studies.scale import SCALES
from benchmarks.studies.trainer import build_model
from tests.benchmarks.studies.test_training import CASE


def by_bytes(text: bytes) -> list[bytes]:
    return [text[i : i + 1] for i in range(len(text))]


def test_places_by_hand() -> None:
    text = b" count = other + count; return_ return return Count other(cou); country count"
    found = list(places(by_bytes(text)))
    second, third = text.index(b"count;"), text.index(b"other(")
    assert found == [Place(second, second + 5, 5), Place(third, third + 5, 5)]  # the last count touches the edge


def test_keywords_short_names_and_cut_names_are_left_out() -> None:
    assert list(places(by_bytes(b" self self while while abcd abcd match match "))) == []
    assert list(places(by_bytes(b"names = names + "))) == []  # the first one may be the end of another name
    assert [place.first for place in places(by_bytes(b" names = names + "))] == [9]


def test_places_of_byte_pairs_begin_and_end_with_tokens() -> None:
    head = [b" ", b"names", b" =", b" "]
    assert list(places([*head, b"names", b"."])) == [Place(4, 5, 5)]
    assert list(places([*head[:3], b" na", b"mes", b"."])) == [Place(3, 5, 5)]  # a space may come before
    assert list(places([*head, b"names."])) == []
    assert list(places([*head[:3], b" (na", b"mes", b"."])) == []
    assert list(places([b" names", b" names", b"."])) == [Place(1, 2, 5)]


class Scored(nn.Module):
    """Gives the true next token the score ``right`` where ``knows`` says so, any other token a larger one elsewhere."""

    def __init__(self, right: float, knows: Tensor) -> None:
        super().__init__()
        self.right, self.knows = right, knows

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        following = torch.roll(input_ids, -1, dims=1)
        logits = torch.zeros(*input_ids.shape, 256)
        wrong = (following + 1) % 256
        known = self.knows[: len(input_ids)]
        best = torch.where(known, following, wrong)
        logits.scatter_(2, best[..., None], self.right)
        return SimpleNamespace(logits=logits)


TEXT = b" names = names + other(names) - other "
WINDOW = torch.tensor([list(TEXT)])


def ask(knows: Tensor, right: float = 3.0) -> dict:
    return Cloze(WINDOW, [list(places(by_bytes(TEXT)))]).ask(Scored(right, knows), "cpu")


def test_a_model_that_knows_all() -> None:
    found = ask(torch.ones_like(WINDOW, dtype=torch.bool))
    assert found["places"] == 3 and found["exact"] == 1.0
    assert found["nats_per_byte"] == pytest.approx(math.log(math.exp(3.0) + 255) - 3.0)


def test_a_model_that_knows_nothing() -> None:
    found = ask(torch.zeros_like(WINDOW, dtype=torch.bool))
    assert found["exact"] == 0.0 and found["nats_per_byte"] == pytest.approx(math.log(math.exp(3.0) + 255))


def test_every_byte_of_an_identifier_counts_and_no_other() -> None:
    second = TEXT.index(b"names +")
    knows = torch.zeros_like(WINDOW, dtype=torch.bool)
    knows[0, second - 1 : second + 4] = True  # a token is predicted by the one before it
    found = ask(knows)
    assert found["exact"] == pytest.approx(1 / 3)
    total = math.log(math.exp(3.0) + 255)
    assert found["nats_per_byte"] == pytest.approx((5 * (total - 3.0) + 10 * total) / 15)
    knows[0, second + 2] = False
    assert ask(knows)["exact"] == 0.0


def test_exact_is_what_greedy_decoding_writes() -> None:
    """Decodes byte by byte with an untrained model, which hits rarely, on windows that it has answers for."""
    model = build_model(CASE)
    windows = Corpus(16, 0).held_out(64)
    with torch.no_grad():
        for row, window in enumerate(windows):
            if row % 2:
                window[6] = model(input_ids=window[None, :6]).logits[0, -1].argmax()  # a byte that it does predict
    asked = [[Place(6, 7, 1)] for _ in windows]
    hits = 0
    with torch.no_grad():
        for window in windows:
            hits += int(model(input_ids=window[None, :6]).logits[0, -1].argmax() == window[6])
    found = Cloze(windows, asked).ask(model, "cpu")
    assert found["exact"] == hits / 64 and 0.5 <= found["exact"] < 1


def test_places_are_the_same_for_every_seed() -> None:
    first, other = (Cloze.of(Corpus(64, seed)) for seed in (0, 1))
    assert torch.equal(first.windows, other.windows) and first.places == other.places
    assert len(first.windows) == 512 and all(first.places)
    for window, each in zip(first.windows.tolist(), first.places, strict=True):
        for place in each:
            name = bytes(window[place.first : place.end])
            assert name.isascii() and len(name) >= 5 and name in bytes(window[: place.first])


def test_a_text_without_places() -> None:
    empty = Cloze(WINDOW[:0], [])
    assert empty.ask(build_model(CASE), SCALES["quick"].small.device) == {
        "places": 0, "exact": None, "nats_per_byte": None,
    }  # fmt: skip
