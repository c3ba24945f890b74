"""The counts behind the roofline estimates, against sums done by hand."""

import pytest

from eval.bench.roofline import (
    CHIPS,
    Call,
    based_backward,
    based_decode,
    based_forward,
)

PAPER = Call(1, 32768, 16, 16, 16, 64)


def test_forward_work_is_that_of_the_notes():
    """Per token and head at f 16, v 64, chunk 64: 64 * (16 + 65) for half a square, 4 * 153 * 65 for the state; 320 bytes
    of q, k, v, y and 4 of the denominator."""
    work = based_forward(PAPER)
    tokens = 32768 * 16
    assert work.flops == tokens * (64 * 81 + 4 * 153 * 65)
    assert work.bytes == tokens * 324 + 16 * 4 * 153 * 65
    assert work.seconds(CHIPS["H200"]) == pytest.approx(35.5e-6, rel=0.01)
    assert work.bound(CHIPS["H200"]) == "memory"


def test_backward_moves_twice_the_bytes():
    forward, backward = based_forward(PAPER), based_backward(PAPER)
    assert 1.9 < backward.bytes / forward.bytes < 2.1
    assert 2 < backward.flops / forward.flops < 3


def test_grouped_heads_read_their_keys_once():
    grouped = based_forward(Call(1, 1024, 16, 2, 16, 64))
    assert grouped.bytes < based_forward(Call(1, 1024, 16, 16, 16, 64)).bytes
    assert grouped.flops < based_forward(Call(1, 1024, 16, 16, 16, 64)).flops


def test_decoding_reads_and_writes_the_state():
    work = based_decode(Call(128, 1, 16, 16, 16, 64))
    assert work.bytes == 128 * (2 * 4 * 16 * 153 * 65 + 2 * 32 * 80)
