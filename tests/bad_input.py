"""Drawn damage and values, for the tests of bad input (tests/unit/*/test_bad_*.py).

Any input either works or ends in one clear line, and overwrites nothing.
"""

from __future__ import annotations

import struct

from hypothesis import strategies as st

JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-2, 9),
        st.sampled_from([10**400, -1, 2**63, float("nan"), float("inf"), 1e308, "", "x", "5"]),
        st.text(max_size=5),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)


@st.composite
def damage(draw):
    """A function that damages bytes: flips, overwrites numbers, cuts, adds; mostly near an end."""
    kind = draw(st.sampled_from(["flip", "number", "cut", "add"]))
    share = draw(st.one_of(st.floats(0, 0.2), st.floats(0, 1), st.floats(0.8, 1)))
    number = draw(st.sampled_from([-1, 0, 1, 2, 3, 8, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1]))
    flip = draw(st.integers(1, 255))

    def apply(content: bytes) -> bytes:
        place = min(int(share * len(content)), max(len(content) - 1, 0))
        if kind == "cut":
            return content[:place]
        if kind == "add":
            return content[:place] + bytes([flip]) * 3 + content[place:]
        if kind == "flip":
            return content[:place] + bytes([content[place] ^ flip]) + content[place + 1 :]
        place -= place % 4  # where the numbers of MXNet's files stand
        return content[:place] + struct.pack("<q", number) + content[place + 8 :]

    return apply


def one_line(error: BaseException) -> str:
    text = str(error)
    assert text and len(text.splitlines()) == 1, text
    return text


class EndError(Exception):
    """In place of the end of the process."""
