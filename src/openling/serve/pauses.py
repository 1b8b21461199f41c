"""How long an engine has stood still: deadlines of replies do not run while nothing is computed."""

from __future__ import annotations

import time


class PauseClock:
    """Switched by the engine's thread, read by any."""

    def __init__(self) -> None:
        # Seconds of pauses that are over, and when the one under way began: one tuple, so that no reader sees half a change.
        self._state: tuple[float, float | None] = (0.0, None)

    @property
    def on(self) -> bool:
        """Whether the engine stands still."""
        return self._state[1] is not None

    @property
    def seconds(self) -> float:
        """All pauses together, the one under way included."""
        over, since = self._state
        return over if since is None else over + time.monotonic() - since

    def pause(self) -> None:
        """The engine stands still from now on."""
        if not self.on:
            self._state = (self._state[0], time.monotonic())

    def resume(self) -> None:
        """It goes on."""
        self._state = (self.seconds, None)
