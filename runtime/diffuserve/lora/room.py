"""How many adapters the requests under way may have in memory: those beyond it wait until others are done."""

from __future__ import annotations

from collections.abc import Hashable

__all__ = ["AdapterRoom"]


class AdapterRoom:
    """Counts adapters by their users, within `budget` bytes. Not safe to call from several threads.

    One that is larger than the budget is let in alone.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._adapters: dict[Hashable, int] = {}
        self._users: dict[Hashable, Hashable] = {}

    @property
    def bytes(self) -> int:
        return sum(self._adapters.values())

    def take(self, user: Hashable, adapter: Hashable, size: int, *, may_grow: bool = True) -> bool:
        """Whether the user has its adapter's place now; without `may_grow` only beside those that have it already."""
        if adapter not in self._adapters:
            fits = not self._adapters or self.bytes + size <= self._budget
            if not (fits and may_grow):
                return False
            self._adapters[adapter] = size
        self._users[user] = adapter
        return True

    def release(self, user: Hashable) -> bool:
        """Whether there is more room, now that the user is done."""
        adapter = self._users.pop(user, None)
        if adapter is None or adapter in self._users.values():
            return False
        del self._adapters[adapter]
        return True
