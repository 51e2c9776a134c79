"""What the processes that train one model together agree upon.

The chief decides, the others follow: how many steps come next, when to stop, what
callbacks have assigned. Where there is but one process, nothing is said.
"""

from __future__ import annotations

import pickle
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from loopscope import errors
from loopscope.backend.base import Team
from loopscope.errors import UsageError, WorkerError

Value = TypeVar("Value")

SAID, FAILED = "said", "failed"


class Together:
    """One of the processes that train a model.

    Args:
        team: How they talk.
    """

    def __init__(self, team: Team) -> None:
        self._team = team
        self.rank, self.size = team.rank, team.size
        self.chief = team.rank == 0
        self.several = team.size > 1
        self._alone = False

    def agreed(self, value: Value) -> Value:
        """The chief's value, on every worker; plain data. All of them ask.

        Raises:
            WorkerError: One of them is gone, or the chief has failed.
        """
        if not self.several:
            return value
        self.refuse_alone()
        kind, said = self._exchange((SAID, value))
        if kind == FAILED:
            raise _from_chief(*said)
        found: Value = said
        return found

    def gathered(self, data: bytes) -> list[bytes]:
        """What each worker has given, by rank: equally many bytes. All of them ask.

        Raises:
            WorkerError: One of them is gone.
        """
        self.refuse_alone()
        with self.guarded():
            return self._team.gather(data)

    def numbers(self, *mine: int) -> list[tuple[int, ...]]:
        """At most four whole numbers of each worker, by rank. All of them ask.

        Raises:
            WorkerError: One of them is gone.
        """
        form = f"<{len(mine)}q"
        found = self.gathered(struct.pack(form, *mine).ljust(32, b"\0"))
        return [struct.unpack_from(form, theirs) for theirs in found]

    def collected(self, data: bytes) -> list[bytes]:
        """What each worker has given, by rank, however long. All of them ask.

        Raises:
            WorkerError: One of them is gone.
        """
        lengths = [length for (length,) in self.numbers(len(data))]
        # Of a power of two of bytes, so that few programs are made.
        size = 1 << max(10, (max(lengths) - 1).bit_length())
        found = self.gathered(data.ljust(size, b"\0"))
        return [theirs[:n] for theirs, n in zip(found, lengths, strict=True)]

    def refuse_alone(self) -> None:
        """Refuse what all workers have to do, where the chief does something alone.

        Raises:
            UsageError: Nothing of it was begun.
        """
        if self._alone:
            raise UsageError(
                "Callbacks and other listeners run on the chief alone: the other "
                "workers do not know of what is trained or evaluated in there. Do so "
                "between two calls of `fit`, or in the body of `loop.epochs`."
            )

    def of_chief(self, find: Callable[[], Value]) -> Value:
        """What `find` gives on the chief, on every worker; what it raises, likewise."""
        with self.alone():
            value = find() if self.chief else None
        return self.agreed(value)  # type: ignore[return-value]

    @contextmanager
    def alone(self) -> Iterator[None]:
        """A block in which the chief does what the others only hear of.

        What it raises ends the training on every worker.
        """
        if not (self.several and self.chief) or self._alone:
            yield
            return
        self._alone = True
        try:
            yield
        except BaseException as error:
            self._exchange((FAILED, _told(error)))
            raise
        finally:
            self._alone = False

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """A block in which all of them compute: say clearly that one is gone.

        Raises:
            WorkerError: In the place of what the framework says.
        """
        try:
            yield
        except Exception as error:
            if self.several and self._team.lost(error):
                raise self._lost(error) from error
            raise

    def _exchange(self, message: tuple[str, Any]) -> tuple[str, Any]:
        with self.guarded():
            given = pickle.dumps(message) if self.chief else b""
            found: tuple[str, Any] = pickle.loads(self._team.agree(given))
            return found

    def _lost(self, error: Exception) -> WorkerError:
        # Frameworks begin with where in a graph it was, in braces.
        first = (re.sub(r"\{\{.*?\}\}", "", str(error)).split("\n") or [""])[0]
        why = first.strip()[:300]
        return WorkerError(
            f"Worker {self.rank} of {self.size} has lost another one: it was killed, "
            "has failed, or cannot be reached. Look at what the others have said last; "
            "then start all of them anew: a run goes on with `resume=True`. "
            f"{type(error).__name__} says: {why}"
        )


def _told(error: BaseException) -> tuple[str, str, Any]:
    """An exception as plain data."""
    code = error.code if isinstance(error, SystemExit) else None
    return type(error).__name__, str(error), code


def _from_chief(name: str, text: str, code: Any) -> BaseException:
    """What a worker raises where the chief has failed."""
    if name == "SystemExit":
        return SystemExit(code)
    if name == "KeyboardInterrupt":
        return KeyboardInterrupt(text)
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, UsageError):
        return kind(text)
    return WorkerError(f"The chief has ended the training. {name}: {text}")


__all__ = ["Together"]
