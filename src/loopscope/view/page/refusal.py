"""What the page's server says when it does not do what it was asked."""

from __future__ import annotations


class Refusal(Exception):
    """An answer that is none: a status, one sentence, and what to do.

    Args:
        status: Of HTTP: 400 for a wrong question, 403 refused, 404 no such thing, 409
            not now.
        error: What is wrong.
        do: What to do about it.
    """

    def __init__(self, status: int, error: str, do: str) -> None:
        super().__init__(error)
        self.status, self.error, self.do = status, error, do

    def as_dict(self) -> dict[str, str]:
        """As the page gets it."""
        return {"error": self.error, "next": self.do}
