"""Rows that share a prefix: one goes ahead, so that the service's cache has it, and the others follow."""

from collections import OrderedDict, deque
from collections.abc import Iterable

from batcher.records import Turn

LEAD = 2.0
"""Seconds that the others wait for the first one's answer: one that hangs holds up nobody for longer."""
LIFETIME = 300.0
"""Seconds that a prefix is kept after its last use: what Cerebras guarantees."""
MOST_HELD = 10_000
"""Rows that may wait for others of their group; beyond that nobody is held."""


class _Group:
    """One prefix: when it was last used, who leads, and who waits for that."""

    __slots__ = ("held", "leader", "used")

    def __init__(self, leader: Turn, now: float) -> None:
        self.leader: Turn | None = leader
        self.used = now
        self.held: list[Turn] = []


class Groups:
    """Which rows of a lane may go by their groups. Those that may not yet are kept here."""

    def __init__(self) -> None:
        self.held = 0
        self._groups: OrderedDict[str, _Group] = OrderedDict()
        """By when they were last used; none whose prefix is no longer kept."""
        self.leading: deque[tuple[float, str, Turn]] = deque()
        """Until when each leader is waited for, in that order."""

    def first(self, fresh: deque[Turn], now: float) -> Turn | None:
        """The first row that may go; rows before it that wait for their leader are taken out of `fresh`."""
        if self.leading:
            self._give_up(fresh, now)
        while fresh:
            turn = fresh[0]
            if turn.group is None or self.held >= MOST_HELD:
                return turn
            group = self._groups.get(turn.group)
            if group is None or group.leader is None:
                return turn
            group.held.append(fresh.popleft())
            self.held += 1
        return None

    def follows(self, turn: Turn, now: float) -> bool:
        """Whether the cache should have what a row shares with others, if it goes now."""
        group = None if turn.group is None else self._groups.get(turn.group)
        return group is not None and now - group.used < LIFETIME

    def sent(self, turn: Turn, now: float) -> None:
        """A row goes: it leads where nobody of its group has gone lately."""
        while self._groups and now - next(iter(self._groups.values())).used >= LIFETIME:
            self._groups.popitem(last=False)
        assert turn.group is not None
        group = self._groups.get(turn.group)
        turn.leads = group is None
        if group is None:
            self._groups[turn.group] = _Group(turn, now)
            self.leading.append((now + LEAD, turn.group, turn))
            return
        group.used = now
        self._groups.move_to_end(turn.group)

    def ended(self, turn: Turn, answered: bool, fresh: deque[Turn]) -> None:
        """Something came of a row. After a leader's answer the others go next; where it failed, one of them leads."""
        group = None if turn.group is None else self._groups.get(turn.group)
        if group is None or group.leader is not turn:
            return
        group.leader = None
        self._go(group.held, fresh)
        group.held = []
        if not answered:
            assert turn.group is not None
            del self._groups[turn.group]

    @property
    def until(self) -> float:
        """When the first of the leaders that are out is no longer waited for. Only while somebody is held."""
        return self.leading[0][0]

    def _give_up(self, fresh: deque[Turn], now: float) -> None:
        """Let go whose leaders have been waited for long enough."""
        while self.leading:
            until, name, turn = self.leading[0]
            group = self._groups.get(name)
            waited_for = group is not None and group.leader is turn
            if waited_for and until > now:
                return
            self.leading.popleft()
            if waited_for:
                self.ended(turn, True, fresh)

    def _go(self, held: Iterable[Turn], fresh: deque[Turn]) -> None:
        """These go next, in their order."""
        for turn in reversed(list(held)):
            fresh.appendleft(turn)
            self.held -= 1
