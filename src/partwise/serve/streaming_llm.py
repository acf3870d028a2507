"""StreamingLLM: the first tokens, which gather attention that nothing else needs, and the last ones."""

from __future__ import annotations

from dataclasses import dataclass

from partwise.serve.sliding_window import SlidingWindow

__all__ = ["StreamingLLM"]


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(SlidingWindow):
    """Drop the oldest token but the first four: a baseline that looks at nothing and is hard to beat.

    Unlike the paper, keys keep the rotation of the place where they stood, as in every cache of this room.

    Parameters
    ----------
    recent : int or float, default=0
        The last tokens never leave; they would not anyway.
    num_sinks : int, default=4
        So many first tokens never leave.
    drop : int or float, default=1
        Tokens that leave at an eviction: their number, or their share of the budget.

    References
    ----------
    Xiao, Tian, Chen, Han, Lewis. Efficient Streaming Language Models with Attention Sinks. arXiv:2309.17453.
    """

    num_sinks: int = 4
