"""Shuffling as a function: where an index lands is computed, not stored.

The draws of a mixture must be the same on every machine, Python and numpy version, and cheap at any position of any
size of data, so nothing here keeps a generator's state.
"""

from __future__ import annotations

_MASK = (1 << 64) - 1
_ROUNDS = 6


def mixed(*numbers: int) -> int:
    """64 well-mixed bits that depend on all of ``numbers`` (SplitMix64's finaliser, chained; Steele et al. 2014)."""
    state = 0
    for number in numbers:
        state = (state + (number & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def shuffled_index(index: int, size: int, *key: int) -> int:
    """Where ``index`` goes in the permutation of ``0..size-1`` named by ``key``; constant memory at any size.

    A Feistel network over the next even number of bits, walked until it lands inside (Black and Rogaway 2002).
    """
    if not 0 <= index < size:
        raise IndexError(index)
    half = max(2, ((size - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    key_bits = mixed(*key, size)
    while True:
        left, right = index >> half, index & low
        for turn in range(_ROUNDS):
            left, right = right, left ^ (mixed(key_bits, turn, right) & low)
        index = (left << half) | right
        if index < size:
            return index
