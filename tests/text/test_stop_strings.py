"""The stop checker against a search through the whole text."""

import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from asyncengine.text.stop_strings import StopChecker

words = st.text("ab", min_size=1, max_size=5)


def expected(text, stops, include):
    """What is shown, the stop found, and the text after it: the match that ends first, then the longest."""
    for end in range(1, len(text) + 1):
        matches = [stop for stop in stops if text[:end].endswith(stop)]
        if matches:
            stop = max(matches, key=len)
            return text[: end if include else end - len(stop)], stop, text[end:]
    return text, None, ""


def run(pieces, stops, include, last=""):
    checker = StopChecker(stops, include)
    shown = ""
    for number, piece in enumerate(pieces):
        text, stop = checker.push(piece)
        shown += text
        if stop is not None:
            return shown, stop, checker.rest + "".join(pieces[number + 1 :]) + last
        # Only what can begin a stop is held back, and all of it.
        given_text = "".join(pieces[: number + 1])
        begins = [n for stop in stops for n in range(1, len(stop)) if given_text.endswith(stop[:n])]
        assert len(given_text) - len(shown) == max(begins, default=0)
    text, stop = checker.finish(last)
    return shown + text, stop, checker.rest


@given(
    pieces=st.lists(st.text("abc", max_size=4), max_size=14),
    stops=st.lists(words, min_size=1, max_size=4),
    include=st.booleans(),
    last=st.text("abc", max_size=3),
)
@example(pieces=["aa", "ab"], stops=["aab"], include=False, last="")
@example(pieces=["x", "ab"], stops=["b", "ab"], include=False, last="")
@example(pieces=["aba", "ba"], stops=["ababb", "bab"], include=True, last="b")
def test_equals_a_search_in_the_whole_text(pieces, stops, include, last):
    assert run(pieces, stops, include, last) == expected("".join(pieces) + last, stops, include)


@given(text=st.text(max_size=40), stop=st.text(min_size=1, max_size=3), data=st.data())
def test_any_characters(text, stop, data):
    cut = data.draw(st.integers(0, len(text)))
    assert run([text[:cut], text[cut:]], [stop], False) == expected(text, [stop], False)


@pytest.mark.parametrize("stop", ["]", "^", "-]", "\\", "[a", "😀"])
def test_characters_that_mean_something_in_patterns(stop):
    assert run(["x-^\\", stop, "y"], [stop], False) == expected("x-^\\" + stop + "y", [stop], False)


def test_a_stop_over_many_pieces_is_never_shown():
    checker = StopChecker(["</answer>"])
    assert [checker.push(piece) for piece in ["42", "<", "/a", "nsw", "er"]] == [("42", None)] + [
        ("", None)
    ] * 4
    assert checker.push("> more") == ("", "</answer>")
    assert checker.rest == " more"


def test_finish_completes_a_stop_or_gives_back_what_was_held():
    checker = StopChecker(["END"])
    assert checker.push("the E") == ("the ", None)
    assert checker.finish("ND.") == ("", "END")
    checker = StopChecker(["END"])
    assert checker.push("the EN") == ("the ", None)
    assert checker.finish() == ("EN", None)


def test_time_is_linear_for_the_worst_stop_strings():
    checker = StopChecker(["a" * 4095 + "b"] + ["a" * n + "b" for n in range(2000, 2007)])
    start = time.perf_counter()
    for _ in range(2500):
        checker.push("aaaa")
    assert time.perf_counter() - start < 5.0  # quadratic work takes minutes
