"""Several threads share an engine: one of them steps it, for the requests of all."""

from collections.abc import Callable
from threading import Condition, get_ident

from mcsd.errors import EngineBusy


class StepLock:
    """A lock that a thread stops waiting for once it needs no step: those of others advance its requests too.

    Which thread is next is not fixed. A thread that steps again at once mostly keeps the lock, and its pool of OpenMP
    threads; the others look after each step whether their requests are done.
    """

    def __init__(self) -> None:
        self._changed = Condition()
        self._owner: int | None = None
        self._released = 0

    def run(self, action: Callable[[], None], unless: Callable[[], bool]) -> None:
        """Call ``action`` with the lock, unless a condition is true by then. It is looked at after each action.

        Raises:
            EngineBusy: this thread has the lock. A logits processor, say, has called the engine that calls it.
        """
        if self._owner == get_ident():
            raise EngineBusy(
                "the engine was called from inside one of its own steps", "use another engine in a callback"
            )
        try:
            with self._changed:
                self._changed.wait_for(lambda: self._owner is None or unless())
                if unless():
                    return
                self._owner = get_ident()
            action()
        finally:
            self._release()

    def try_run(self, action: Callable[[], None]) -> None:
        """Call ``action`` if the lock is free. Never waits: garbage collection may call it during a step."""
        if self._owner is None:
            self.run(action, unless=lambda: self._owner is not None)

    def released_by_another(self) -> Callable[[], bool]:
        """A condition: since this call the lock was taken, and released again."""
        with self._changed:
            last = self._released + (self._owner is not None)
        return lambda: self._released > last

    def _release(self) -> None:
        """Give the lock back, if this thread has it, and wake the others."""
        with self._changed:
            if self._owner == get_ident():
                self._owner = None
                self._released += 1
                self._changed.notify_all()
