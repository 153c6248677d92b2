"""The prefix of a recycling, put away where all rows are kept, and brought back where it runs.

Of several recyclings of one model, the last that asked for it governs; what the suffix of another reads stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from torchrecycle.bypass import Bypass, Offloaded, OffloadReport, device_of, only_in_prefix
from torchrecycle.fingerprint import Watch

__all__ = ["Away"]


class Away:
    """Whether a prefix is to be away, and where.

    Args:
        model: of which it is the prefix.
        bypass: says what divides the model now.
        watch: is told that a move is no change.
        others: says what divides the model for its other recyclings.
    """

    def __init__(
        self,
        model: nn.Module,
        bypass: Callable[[], Bypass],
        watch: Callable[[], Watch],
        others: Callable[[], Iterable[Bypass]],
    ) -> None:
        self._model, self._bypass, self._watch, self._others = model, bypass, watch, others
        self._folders: Sequence[str] | None = None
        self.offloaded: Offloaded | None = None
        """The parameters that are away, or were and may be again."""

    def ask(self, folders: Sequence[str]) -> OffloadReport:
        """Put it away, now and at each `put`.

        Args:
            folders: for the mapped file of a model on the CPU: the first of them that is on a disk is taken.

        Raises:
            StoreError: there is no room for the file.
        """
        self._folders = folders
        self.take_back()
        try:
            report = self.put()
        except BaseException:
            self.end()
            raise
        assert report is not None
        return report

    def end(self) -> None:
        """Have it back, for good."""
        self._folders = None
        self.take_back()

    def take_back(self) -> None:
        """Have it back until the next `put`."""
        interceptor = self._bypass().interceptor
        if self.offloaded is not None:
            self.offloaded.bring_back(for_good=True)
            if interceptor.offloaded is self.offloaded:
                interceptor.offloaded = None
            self.offloaded = None

    def put(self) -> OffloadReport | None:
        """If that is wanted, and no other recycling of the model has asked for it since."""
        bypass = self._bypass()
        interceptor = bypass.interceptor
        if self._folders is None:
            return None
        if self.offloaded is None:
            if interceptor.offloaded is not None:
                interceptor.offloaded.bring_back(for_good=True)
            parameters = only_in_prefix(self._model, bypass.plan, bypass.read_on_hits)
            self.offloaded = interceptor.offloaded = None
            offloaded = Offloaded(parameters, lambda: device_of(self._model), self._folders, self._watch)
            self.offloaded = interceptor.offloaded = offloaded
        if interceptor.offloaded is not self.offloaded:
            return None
        with interceptor.turns.take(lambda: True):  # nobody is running them
            return self.offloaded.put_away(self._read_by_others(self.offloaded.ids))

    def _read_by_others(self, own: frozenset[int]) -> frozenset[int]:
        """Those of these parameters that the suffix of another recycling of the model reads."""
        spared: set[int] = set()
        for bypass in self._others():
            spared |= own - {id(p) for p in only_in_prefix(self._model, bypass.plan, bypass.read_on_hits)}
        return frozenset(spared)

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """What is brought back within, for a moment, is put away again after."""
        offloaded = self.offloaded
        away = offloaded is not None and offloaded.away
        yield
        if offloaded is not None and away and offloaded is self.offloaded and not offloaded.away:
            self.put()
