"""Which split of a denoising step over several ranks is the fastest, by a model of its cost. Nothing is run or sent.

descriptions    what a step is, what cards are, what a split is
cards           kinds of cards, and which one a device is taken for
costs           seconds of a step, by a formula for each part
choice          every split of a number of ranks, the fastest first, with reasons
counts          reads a model's description off its graph
"""

from __future__ import annotations
