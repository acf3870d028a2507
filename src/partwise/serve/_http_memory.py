"""The memory of caches: bytes are taken before a request starts, and given back whatever becomes of it.

The sum of what the running request may need and of what conversations hold is never above the limit. One request runs at a time, so a request always finds
room: conversations make way for it, the one that was used longest ago first. A stored conversation is used again when a prompt continues exactly the
tokens that its cache has seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CacheMemory", "Conversation"]


@dataclass(eq=False)
class Conversation:
    """A cache and the tokens that it has seen.

    Parameters
    ----------
    tokens : Tensor of shape (tokens,), int64
        On the CPU.
    cache : Cache
        Belongs to one request or to the store, never to two.
    num_bytes : int
        What cache and tokens hold.
    used : float
        When it was used last, in seconds of ``clock``.
    """

    tokens: Tensor
    cache: Any
    num_bytes: int
    used: float


class CacheMemory:
    """Accounts for every byte of a cache. All methods run on the thread of the event loop.

    Parameters
    ----------
    limit : int
        Bytes that caches may hold together.
    idle : float
        Seconds after which an unused conversation leaves.
    clock : callable
        The time in seconds.
    """

    def __init__(self, limit: int, *, idle: float, clock: Callable[[], float]) -> None:
        self.limit, self.idle, self.clock = limit, idle, clock
        self.reserved = 0
        self.conversations: list[Conversation] = []  # the one used longest ago first
        self.num_forgotten = 0

    @property
    def stored(self) -> int:
        """Bytes of the stored conversations."""
        return sum(conversation.num_bytes for conversation in self.conversations)

    @property
    def used(self) -> int:
        """Bytes that are reserved or stored; never above the limit."""
        return self.reserved + self.stored

    def reserve(self, num_bytes: int) -> None:
        """Take bytes for a request that is about to start; conversations leave until they are there."""
        self.forget_idle()
        while self.used + num_bytes > self.limit and self.conversations:
            self._forget(self.conversations[0])
        if self.used + num_bytes > self.limit:  # the server checks at its start that one request fits, and lets one run at a time
            raise MemoryError(f"{num_bytes} bytes do not fit beside {self.reserved} of {self.limit}")
        self.reserved += num_bytes

    def release(self, num_bytes: int) -> None:
        """Give back what `reserve` took."""
        assert 0 <= num_bytes <= self.reserved, (num_bytes, self.reserved)
        self.reserved -= num_bytes

    def take(self, tokens: Tensor) -> Conversation | None:
        """Remove and return the conversation that ``tokens`` (tokens,) continues by at least one token; of several the longest."""
        self.forget_idle()
        matching = [conversation for conversation in self.conversations if continues(tokens, conversation.tokens)]
        if not matching:
            return None
        found = max(matching, key=lambda conversation: len(conversation.tokens))
        self.conversations.remove(found)
        return found

    def store(self, conversation: Conversation) -> None:
        """Keep a conversation for the next turn where it fits; one with the same tokens makes way."""
        tokens = conversation.tokens
        self.conversations = [other for other in self.conversations if len(other.tokens) != len(tokens) or not bool((other.tokens == tokens).all())]
        self.conversations.append(conversation)
        while self.used > self.limit:
            self._forget(self.conversations[0])

    def forget_idle(self) -> None:
        """Drop the conversations that nobody continued for a while."""
        oldest = self.clock() - self.idle
        for conversation in [conversation for conversation in self.conversations if conversation.used <= oldest]:
            self._forget(conversation)

    def _forget(self, conversation: Conversation) -> None:
        self.conversations.remove(conversation)
        self.num_forgotten += 1


def continues(tokens: Tensor, seen: Tensor) -> bool:
    """Whether ``tokens`` (tokens,) begins with ``seen`` and goes on."""
    return len(tokens) > len(seen) and bool((tokens[: len(seen)] == seen).all())
