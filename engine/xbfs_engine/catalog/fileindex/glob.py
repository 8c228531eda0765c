"""Patterns that names and paths are searched by. Pure; matching takes time in proportion to what is matched.

``*`` and ``?`` stand for any characters and any one but a slash, ``[…]`` and ``[!…]`` for one of a set, and a component
``**`` for any number of components, also none. Bytes that are no UTF-8 count as one character each.
"""

from __future__ import annotations

import re
from typing import Final

from xbfs_engine.core.errors import UsageError

_ANY: Final = None
"""In a path: the component ``**``."""


class Pattern:
    """A glob on names if it has no slash; else on absolute paths: from the root if it begins with a slash, or anywhere.

    Raises UsageError for an empty pattern, or a set that is none.
    """

    def __init__(self, text: str, *, ignore_case: bool = False) -> None:
        parts = [part for part in text.split("/") if part]
        if not parts:
            raise UsageError(f"{text!r} is no pattern of a name or path", hint="such as '*.conf' or '/etc/**/*.conf'")
        self.on_path = "/" in text
        if self.on_path and not text.startswith("/"):
            parts.insert(0, "**")
        flags = re.DOTALL | (re.IGNORECASE if ignore_case else 0)
        self._parts = [_ANY if self.on_path and part == "**" else _compiled(part, flags) for part in parts]
        self._last = self._parts[-1]

    def may_match(self, name: bytes) -> bool:
        """Whether a path that ends with this name can match; for a pattern on names that is the whole answer."""
        return self._last is _ANY or self._last.fullmatch(name.decode(errors="surrogateescape")) is not None

    def matches(self, path: bytes) -> bool:
        """Whether an absolute path matches."""
        names = path.strip(b"/").split(b"/")
        if not self.on_path:
            return self.may_match(names[-1])
        states = self._closed({0})
        for name in names:
            text = name.decode(errors="surrogateescape")
            after = set()
            for state in states:
                part = self._parts[state] if state < len(self._parts) else _END
                if part is _ANY:
                    after.add(state)
                elif part.fullmatch(text):
                    after.add(state + 1)
            states = self._closed(after)
            if not states:
                return False
        return len(self._parts) in states

    def _closed(self, states: set[int]) -> set[int]:
        """With what is reached by letting each ``**`` stand for nothing."""
        for state in sorted(states):
            following = state
            while following < len(self._parts) and self._parts[following] is _ANY:
                following += 1
                states.add(following)
        return states


_END: Final = re.compile(r"(?!)")
"""Matches nothing: the pattern is used up."""


def escaped(text: str) -> str:
    """A pattern that stands for ``text`` alone."""
    return re.sub(r"([*?\[])", r"[\1]", text)


def _compiled(glob: str, flags: int) -> re.Pattern[str]:
    """One component. What stands between two stars is matched where it first fits and not tried again: no backtracking
    that a hostile name could make long."""
    pieces = [""]
    at = 0
    while at < len(glob):
        char = glob[at]
        at += 1
        if char == "*":
            if len(pieces) == 1 or pieces[-1]:
                pieces.append("")
        elif char == "?":
            pieces[-1] += "."
        elif char == "[":
            piece, at = _set(glob, at)
            pieces[-1] += piece
        else:
            pieces[-1] += re.escape(char)
    first, *others = pieces
    if not others:
        return re.compile(first, flags)
    *middle, last = others
    return re.compile(first + "".join(f"(?>.*?{piece})" for piece in middle) + ".*" + last, flags)


def _set(glob: str, start: int) -> tuple[str, int]:
    """The regular expression of the set that begins after ``[``, and where the glob goes on."""
    begin = start + (glob[start : start + 1] in {"!", "^"})
    end = glob.find("]", begin + 1)
    if end < 0:
        return r"\[", start
    inside = glob[begin:end]
    negated = "^" if begin > start else ""
    parts = []
    at = 0
    while at < len(inside):
        if inside[at + 1 : at + 2] == "-" and at + 2 < len(inside):
            low, high = inside[at], inside[at + 2]
            if low > high:
                raise UsageError(f"the set [{inside}] has a range from {low!r} down to {high!r}")
            parts.append(f"{re.escape(low)}-{re.escape(high)}")
            at += 3
        else:
            parts.append(re.escape(inside[at]))
            at += 1
    return f"[{negated}{''.join(parts)}]", end + 1
