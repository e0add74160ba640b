"""Broken input is data: what was refused, where, and why."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rejection:
    """One file or volume that a stage refused.

    ``reason`` is a short upper-case code such as ``TRUNCATED``; ``message`` is one sentence with the numbers that show
    it. Neither ever holds a header value that identifies a person.
    """

    uri: str
    stage: str
    reason: str
    message: str


class Refused(Exception):
    """Raised by the core on broken input; a stage turns it into a :class:`Rejection` and goes on."""

    def __init__(self, reason: str, message: str):
        super().__init__(f"{reason}: {message}")
        self.reason = reason
        self.message = message

    def __reduce__(self):
        return Refused, (self.reason, self.message)

    def at(self, uri: str, stage: str) -> Rejection:
        return Rejection(uri, stage, self.reason, self.message)


class InputError(ValueError):
    """Wrong arguments or an archive that does not fit the config: said at the door in one sentence, exit status 2."""
