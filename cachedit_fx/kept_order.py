"""Makes inductor keep the order of a piece's calls: its fusions and its own order would undo that of collectives.

    linear, start, linear, start, wait, wait, attention     the graph, as `overlap_collectives` leaves it
    linear, linear, start, wait, start, wait, attention     inductor: one kernel for both norms, waits early

Linear layers, attention and collectives are calls of their own in inductor's schedule. Each is made to depend on the
one before it. So no fusion and no reordering can take one past another. Kernels for other operations move as before,
and stay between the calls that they need and the calls that need them.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from torch._inductor.custom_graph_pass import CustomSchedulerPass, get_hash_for_files
from torch._inductor.dependencies import WeakDep

if TYPE_CHECKING:
    from torch._inductor.scheduler import BaseSchedulerNode


class KeepCalls(CustomSchedulerPass):
    """Makes each call depend on the one before it, for order alone: no buffer lives longer."""

    def __call__(self, nodes: list[BaseSchedulerNode]) -> list[BaseSchedulerNode]:
        calls = [node for node in nodes if node.is_extern() or node.is_template()]
        if not calls or any(node.is_foreach() for node in nodes):  # inductor finds no ancestors of grouped nodes
            return nodes
        for before, after in itertools.pairwise(calls):
            made = next(iter(before.get_buffer_names()))
            after.add_fake_dep(WeakDep(made, after.get_name(), is_fake=True))  # as of a call that writes to no buffer
        calls[0].scheduler.compute_ancestors()
        return nodes

    def uuid(self) -> bytes:
        """What inductor's cache knows the pass by."""
        return get_hash_for_files((__file__,))


SETTINGS: dict[str, Any] = {
    "_pre_fusion_custom_pass": KeepCalls(),
    "reorder_for_locality": False,  # it moves a value's maker next to the first reader, so past collectives
}
"""Settings of inductor under which it keeps the order of calls."""
