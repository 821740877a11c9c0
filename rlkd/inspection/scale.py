"""The colour scale of token rewards: the step that a number falls into. The colours are in assets/scale.css."""

from __future__ import annotations

from bisect import bisect_right

# Lower edges of the steps on either side of 0, in nats; steps are orange below 0 and blue above.
EDGES = (0.1, 0.5, 1.0, 2.0, 4.0, 8.0)


def step(number: float | None) -> str:
    """The CSS class of a number: n6 .. n1 below 0, z around 0, p1 .. p6 above; u if unknown."""
    if number is None or number != number:
        return "u"
    k = bisect_right(EDGES, abs(number))
    return "z" if k == 0 else f"{'n' if number < 0 else 'p'}{k}"


def legend(*, above_zero: bool = True) -> list[tuple[str, str]]:
    """(class, range of numbers) of every step, or of those up to 0, in ascending order."""
    bounds = [(f"{low:g}", f"{high:g}" if high else None) for low, high in zip(EDGES, [*EDGES[1:], None], strict=True)]
    above = [(f"p{k}", f"{low} to {high}" if high else f"{low} or more") for k, (low, high) in enumerate(bounds, 1)]
    below = [(f"n{k}", f"-{low} to -{high}" if high else f"-{low} or less") for k, (low, high) in enumerate(bounds, 1)]
    return [*reversed(below), ("z", f"within {EDGES[0]:g} of 0"), *(above if above_zero else [])]
