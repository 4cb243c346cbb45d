"""Results that a device computes several times in a run (ours).

The global expert stays the same through stage 2, and each round scores it on the same held-out samples more than once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from fedfmsl.algorithms.arrays import Floats

MEMO_BYTES = 2**22


class Memo:
    """The most recently used arrays, within `limit` bytes."""

    def __init__(self, limit: int = MEMO_BYTES) -> None:
        self._limit = limit
        self._arrays: OrderedDict[str, Floats] = OrderedDict()

    def recall(self, key: str, compute: Callable[[], Floats]) -> Floats:
        """The array of this key. Computes it if it is not known. The key has to name everything that it depends on."""
        found = self._arrays.pop(key, None)
        if found is None:
            found = compute()
            found.flags.writeable = False
        self._arrays[key] = found
        while sum(array.nbytes for array in self._arrays.values()) > self._limit:
            self._arrays.popitem(last=False)
        return found
