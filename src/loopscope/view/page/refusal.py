"""What the page's server says when it does not do what it was asked."""

from __future__ import annotations

from typing import Any


class Refusal(Exception):
    """An answer that is none: a status, one sentence, and what to do.

    Args:
        status: Of HTTP: 400 for a wrong question, 403 refused, 404 no such thing, 409
            not now.
        error: What is wrong.
        do: What to do about it.
        code: A name for it: the page has words of other languages for some.
        **about: What those words need.
    """

    def __init__(
        self, status: int, error: str, do: str, *, code: str = "", **about: Any
    ) -> None:
        super().__init__(error)
        self.status = status
        self._said = as_error(error, do, code=code, **about)

    def as_dict(self) -> dict[str, Any]:
        """As the page gets it."""
        return self._said


def as_error(error: str, do: str, *, code: str = "", **about: Any) -> dict[str, Any]:
    """What went wrong, as the page gets it. Arguments are those of `Refusal`."""
    return {"error": error, "next": do, "code": code, "about": about}
