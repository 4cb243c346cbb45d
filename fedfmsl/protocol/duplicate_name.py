"""Which of several running processes with one name is the newest (ours).

Each process publishes its status, retained, under the name that they share, and receives every status published there.
The broker puts these statuses into one order. A status that arrives before a process's own is from an earlier process,
usually the one before a restart. A status that arrives after its own is from a newer process. So exactly one process,
the newest, finds no newer one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class DuplicateNameGuard:
    """`instance` identifies this process. `earlier`: processes that started before it. `confirmed`: the broker has
    returned this process's own status."""

    instance: str
    earlier: frozenset[str] = frozenset()
    confirmed: bool = False

    def observe(self, instance: str) -> DuplicateNameGuard:
        """The guard after a status of `instance` has been received."""
        if instance == self.instance:
            return replace(self, confirmed=True)
        return self if self.confirmed else replace(self, earlier=self.earlier | {instance})

    def is_newer(self, instance: str) -> bool:
        """Whether `instance` started after this process and takes its name over."""
        return self.confirmed and instance != self.instance and instance not in self.earlier
