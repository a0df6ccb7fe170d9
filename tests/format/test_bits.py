import torch
from hypothesis import given
from hypothesis import strategies as st

from smet_compile.format import pack_bits, unpack_bits


@given(st.lists(st.booleans(), min_size=1, max_size=200))
def test_bits_round_trip(flags: list[bool]) -> None:
    mask = torch.tensor(flags)
    bits = pack_bits(mask)
    assert bits.dtype == torch.uint8
    assert bits.numel() == (len(flags) + 7) // 8
    assert torch.equal(unpack_bits(bits, len(flags)), mask)


@given(st.lists(st.booleans(), min_size=1, max_size=200))
def test_one_bit_per_block(flags: list[bool]) -> None:
    bits = pack_bits(torch.tensor(flags))
    assert sum(byte.bit_count() for byte in bits.tolist()) == sum(flags)
