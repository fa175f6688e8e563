"""Ideas, one at a time: name -> the recipe with what differs."""

from __future__ import annotations

import functools

from benchmarks.quality import peers
from benchmarks.quality.competitors import Competitor, once

VARIANTS: dict[str, Competitor] = {
    "ours, start 0.05": functools.partial(once, recipe={"start": 0.05}),
    "tp_magnitude, each": functools.partial(peers.cut_once, each=True),
}
