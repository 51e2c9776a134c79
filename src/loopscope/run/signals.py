"""SIGTERM and SIGINT while a run is recorded: finish the chunk, save, leave."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def caught(tell: Callable[[int], None]) -> Iterator[None]:
    """Call `tell` with the signal's number for the duration of a block.

    A second signal acts as it would have without this. Without effect outside of the
    main thread, and on a signal that is ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers: dict[int, Any] = {}

    def heard(number: int, frame: Any) -> None:
        signal.signal(number, handlers[number])
        tell(number)

    for known in SIGNALS:
        number = int(known)
        handler = signal.getsignal(number)
        if handler is not None and handler is not signal.SIG_IGN:
            handlers[number] = handler
            signal.signal(number, heard)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
