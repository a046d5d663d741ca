"""Finds stop strings in text that comes in pieces."""

import re
from collections.abc import Sequence

__all__ = ["StopChecker"]


class _Matcher:
    """Knuth-Morris-Pratt: how much of one stop string the text read so far ends in."""

    __slots__ = ("_borders", "matched", "stop")

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.matched = 0
        """Length of the longest proper or whole prefix of `stop` that the text ends in."""
        self._borders = [0, 0]
        """By length of a prefix: its longest proper prefix that is also its suffix. Grows with `matched`."""

    def feed(self, character: str) -> bool:
        """Reads one character; True if it completes the stop string."""
        stop, borders, matched = self.stop, self._borders, self.matched
        while matched and stop[matched] != character:
            matched = borders[matched]
        if stop[matched] == character:
            matched += 1
            if matched == len(borders):
                border = borders[matched - 1]
                while border and stop[border] != character:
                    border = borders[border]
                borders.append(border + (stop[border] == character))
        self.matched = matched
        return matched == len(stop)


class StopChecker:
    """Cuts one completion's text at the first stop string, wherever the pieces begin and end.

    The match that ends first counts; of several that end at the same character the longest. Text is
    held back only as long as it may be the beginning of a stop string. Once a stop has been found, or
    after `finish`, the object is spent. Time is linear in the text, whatever the stop strings.
    """

    __slots__ = ("_first", "_held", "_include", "_matchers", "rest")

    def __init__(self, stops: Sequence[str], include_in_output: bool = False) -> None:
        self._matchers = [_Matcher(stop) for stop in stops if stop]
        self._first = re.compile("[" + re.escape("".join({m.stop[0] for m in self._matchers})) + "]").search
        self._include = include_in_output
        self._held = ""
        self.rest = ""
        """After a match: the text already given that comes after the stop string."""

    def push(self, text: str) -> tuple[str, str | None]:
        """Takes the next piece; gives the text that is safe to show, and the stop string found, if any."""
        start = 0
        if not self._held:
            found = self._first(text)
            if found is None:
                return text, None
            start = found.start()
        held = len(self._held)
        whole = self._held + text
        matchers = self._matchers
        for end in range(held + start, len(whole)):
            character = whole[end]
            stop = ""
            for matcher in matchers:
                if matcher.feed(character) and len(matcher.stop) > len(stop):
                    stop = matcher.stop
            if stop:
                self._held = ""
                self.rest = whole[end + 1 :]
                return whole[: end + 1 if self._include else end + 1 - len(stop)], stop
        safe = len(whole) - max(matcher.matched for matcher in matchers)
        self._held = whole[safe:]
        return whole[:safe], None

    def finish(self, text: str = "") -> tuple[str, str | None]:
        """Takes the last piece and gives back all that was held."""
        text, stop = self.push(text)
        if stop is None:
            text, self._held = text + self._held, ""
        return text, stop
