"""The emulator finds what it is there to find."""

from __future__ import annotations

import ctypes

import pytest


def run(library: ctypes.CDLL, which: int, seed: int = 0) -> tuple[int, str, list[int]]:
    library.wrong_message.restype = ctypes.c_char_p
    out = (ctypes.c_int * 64)()
    error = library.run_wrong(which, ctypes.c_uint64(seed), out)
    return error, library.wrong_message().decode(), list(out)


@pytest.mark.parametrize(
    ("which", "text"),
    [
        (0, "illegal access"),
        (1, "illegal access"),
        (2, "misaligned access"),
        (3, "a barrier that some threads"),
        (4, "a warp intrinsic that not all lanes"),
        (5, "threads wait for what nobody does"),
        (8, "misaligned access"),
        (9, "an access that nothing orders"),
        (10, "an access that nothing orders"),
    ],
)
def test_mistakes_are_errors(wrong_kernels, which, text):
    error, message, _ = run(wrong_kernels, which)
    assert error
    assert text in message


def test_a_race_shows_in_the_schedules(wrong_kernels):
    results = {tuple(run(wrong_kernels, 6, seed)[2]) for seed in range(8)}
    assert len(results) > 1


def test_a_right_kernel_passes(wrong_kernels):
    want = [63 - i + 32 for i in range(64)]
    for seed in range(8):
        error, message, out = run(wrong_kernels, 7, seed)
        assert (error, message, out) == (0, "", want)
