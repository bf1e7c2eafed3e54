"""Which records share a row? Best fit among the records of a window.

The longest come first, each into the fullest row that still has room for it.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappush, heapreplace
from itertools import chain

import numpy as np

from connectors.config import check_positive

Pack = tuple[int, ...]  # positions of the mixture


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How rows are filled.

    Attributes:
        length: most tokens of a row; a longer record is a fault.
        window: upcoming records among which is chosen.
    """

    length: int
    window: int = 1024

    def __post_init__(self) -> None:
        check_positive("packed", length=self.length, window=self.window)


def best_fit(lengths: Sequence[int] | np.ndarray, most: int) -> list[list[int]]:
    """Return the numbers of the records that share each row, at most `most` tokens a row.

    A record that is longer (a fault, told when it is asked for) has a row of its own.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # tokens left and number of each row, in this order
    for record in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        length = min(int(lengths[record]), most)
        fullest = bisect_left(room, (length, -1))
        if fullest < len(room):
            left, row = room.pop(fullest)
        else:
            left, row = most, len(rows)
            rows.append([])
        rows[row].append(record)
        insort(room, (left - length, row))
    return rows


def take_apart(packs: list[Pack], count: int) -> list[Pack]:
    """Return `count` packs: halves follow one another in place of those with the most records.

    Args:
        packs: at least `count` records altogether, at most `count` packs.
        count: how many come out.
    """
    parts = [[pack] for pack in packs]  # what became of each
    largest = [(-len(pack), number, 0) for number, pack in enumerate(packs)]
    heapify(largest)
    for _ in range(count - len(packs)):
        _, number, place = largest[0]
        pack = parts[number][place]
        half = len(pack) // 2
        parts[number][place] = pack[:half]
        parts[number].append(pack[half:])
        heapreplace(largest, (-half, number, place))
        heappush(largest, (half - len(pack), number, len(parts[number]) - 1))
    return list(chain.from_iterable(parts))
