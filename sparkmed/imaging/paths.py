"""Path patterns: what a path says about the image in it."""

import re

from sparkmed.rejection import InputError

_TOKEN = re.compile(r"\{([^{}]*)\}|(\*\*/)|(\*+)|([{}])|([^{}*]+)")


class PathPattern:
    """A path with names in it, such as ``imagesTr/{subject}.nii.gz``; paths are relative, with forward slashes.

    ``{name}`` stands for one or more characters other than ``/``, as many as fit; the same name twice stands for the same
    text. ``*`` is any part of one path component, ``**`` anything, ``**/`` any folders or none. All else is literal.

    >>> PathPattern("{split}/{class}/*.png").match("train/abd/abd1.png")
    {'split': 'train', 'class': 'abd'}
    >>> PathPattern("labelsTr/{subject}.nii.gz").fill(subject="hippocampus_001")
    'labelsTr/hippocampus_001.nii.gz'
    """

    def __init__(self, pattern: str):
        if not pattern or pattern.startswith("/") or "://" in pattern:
            raise InputError(f"path pattern {pattern!r}: wanted a path relative to the archive")
        self.pattern = pattern
        self.names: tuple[str, ...] = ()
        self._parts: list[tuple[str, str]] = []  # ("name" | "text" | "glob", ...)
        expression = []
        pattern = pattern.removeprefix("./")
        for token in _TOKEN.finditer(pattern):
            name, folders, stars, brace, text = token.groups()
            if brace:
                raise InputError(f"path pattern {self.pattern!r}: unmatched {brace} at character {token.start() + 1}")
            if name is not None:
                expression.append(self._name(name))
            elif folders and (token.start() == 0 or pattern[token.start() - 1] == "/"):
                self._parts.append(("glob", folders))
                expression.append("(?:.*/)?")
            elif folders or stars:
                if len(stars or "**") > 2:
                    raise InputError(f"path pattern {self.pattern!r}: {stars} is neither * nor **")
                self._parts.append(("glob", folders or stars))
                expression.append(".*/" if folders else "[^/]*" if stars == "*" else ".*")
            else:
                self._parts.append(("text", text))
                expression.append(re.escape(text))
        self._expression = re.compile("".join(expression), re.DOTALL)

    def _name(self, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise InputError(f"path pattern {self.pattern!r}: {{{name}}} is not a name of letters, digits and _")
        if self._parts and self._parts[-1][0] == "name":
            raise InputError(f"path pattern {self.pattern!r}: {{{self._parts[-1][1]}}}{{{name}}} has no text between the names")
        self._parts.append(("name", name))
        if name in self.names:
            return f"(?P=g_{name})"
        self.names += (name,)
        return f"(?P<g_{name}>[^/]+)"

    def match(self, path: str) -> dict[str, str] | None:
        """What each name stands for in ``path``, or None when the path is another."""
        found = self._expression.fullmatch(path)
        return None if found is None else {name: found[f"g_{name}"] for name in self.names}

    def fill(self, **values: str) -> str:
        """The path for these values; further values are ignored. Raises :class:`InputError` for ``*`` and for missing values."""
        path = []
        for kind, text in self._parts:
            if kind == "glob":
                raise InputError(f"path pattern {self.pattern!r}: {text} stands for many paths, cannot be filled")
            if kind == "name":
                value = values.get(text)
                if not value or "/" in value:
                    raise InputError(f"path pattern {self.pattern!r}: {{{text}}} wants a text without /, got {value!r}")
                text = value
            path.append(text)
        return "".join(path)

    def __repr__(self) -> str:
        return f"PathPattern({self.pattern!r})"
