"""Keeps quantized copies beside a module's weights, and makes them anew when a weight changes.

Weights are compared by identity and version whenever their copies are taken. Some writes change no version: those
through `.data`, which peft's fuse does. So samples of all weights are compared once in a generation.
"""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import fx, nn

from cachedit_fx.config.rules import OptionError
from cachedit_fx.passes.graph_cost import bytes_of_tensors
from cachedit_fx.passes.graph_values import value_of
from cachedit_fx.passes.insert_low_precision import COPY
from cachedit_fx.quantization.kinds import Kind
from cachedit_fx.quantization.layers import Request, linear_layers, quantization_of
from cachedit_fx.quantization.selection import check_torchao, quantized_layer, selections_of, warned_notes
from cachedit_fx.runtime.samples import differ, samples_of
from cachedit_fx.runtime.warning import warn

if TYPE_CHECKING:
    from cachedit_fx.runtime.session import Session


class _Copy(NamedTuple):
    weight: weakref.ref[torch.Tensor]
    form: tuple[Any, ...]
    """`_form` of the weight when the copy was made."""
    tensor: torch.Tensor


class WeightCopies:
    """Quantized copies of a module's weights. They are made when a graph takes them first.

    Args:
        module: holds the layers.
        request: the layers, and the kind of each.

    Raises:
        OptionError: if a kind does not run on the module's device, or if no layer is left to copy.
        ImportError: if torchao is not installed.
    """

    def __init__(self, module: nn.Module, request: Request) -> None:
        self._module, self._request = weakref.ref(module), request
        self._layers: list[tuple[weakref.ref[Any], Kind]] = []
        self._choose(module)
        self._copies: dict[int, _Copy] = {}
        """Identity of a weight -> its copy."""
        self._taken: set[int] = set()
        """Identities of the weights that a compiled graph takes a copy of."""
        self._samples: list[torch.Tensor] = []
        self._checked: weakref.WeakKeyDictionary[Session, int] = weakref.WeakKeyDictionary()
        """Session -> the generation in which samples of the weights were compared last."""
        self._lock = threading.RLock()

    def _choose_anew(self) -> None:
        """Choose the layers anew if some of them are no longer the module's."""
        module = self._module()
        present = {*linear_layers(module).values()} if module is not None else set()
        if module is None or all(reference() in present for reference, _ in self._layers):
            return
        try:
            self._choose(module)
        except OptionError as error:
            self._layers = []
            warn(f"all steps run in full precision, since layers were replaced: {error}")

    def _choose(self, module: nn.Module) -> None:
        """Choose the layers. A weight that layers share has one copy, so all of them must want the same kind."""
        check_torchao()
        (selection,) = selections_of([module], self._request)
        if not selection.kinds:
            raise OptionError(
                f"precision: another library has quantized {type(module).__name__}, and no layer is left to copy"
            )
        layers = linear_layers(module)
        warned_notes(module, selection)
        wanted: dict[int, set[Kind | None]] = defaultdict(set)
        for name, layer in layers.items():
            wanted[id(getattr(layer, "weight", None))].add(selection.kinds.get(name))
        self._layers = [
            (weakref.ref(layers[name]), kind)
            for name, kind in selection.kinds.items()
            if len(wanted[id(layers[name].weight)]) == 1
        ]

    @property
    def bytes_held(self) -> int:
        """Size of the present copies, in bytes."""
        return bytes_of_tensors([kept.tensor for kept in self._copies.values()])

    def mark(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
        """Let the passes see the copies of a captured graph's weights, as fake tensors.

        A weight that anything but linear layers reads gets no mark.
        """
        copies = self.of(inputs)
        for place, node in enumerate(gm.graph.find_nodes(op="placeholder")):
            copy = copies.get(place)
            if copy is not None and all(_reads_weight(user, node) for user in node.users):
                fake: Any = value_of(node)
                node.meta[COPY] = place, fake.fake_mode.from_tensor(copy, static_shapes=True)
        with self._lock:
            self._samples = self._samples or samples_of(self._weights())

    def keep(self, inputs: Sequence[Any], places: Sequence[int]) -> None:
        """Free the copies that were made for `mark` alone: those that no compiled graph takes.

        Args:
            inputs: of a graph that was marked.
            places: of the inputs that it takes a copy of, once it is compiled.
        """
        with self._lock:
            self._taken |= {id(inputs[place]) for place in places}
            self._copies = {key: kept for key, kept in self._copies.items() if key in self._taken}

    def of(self, inputs: Sequence[Any], places: Sequence[int] | None = None) -> dict[int, torch.Tensor]:
        """Place -> the copy, for each of the inputs that is a weight with a copy. Quantized weights have none.

        Args:
            inputs: of a graph.
            places: where to look; None looks everywhere.
        """
        copies: dict[int, torch.Tensor] = {}
        missing: dict[int, int] = {}
        for place in range(len(inputs)) if places is None else places:
            weight: Any = inputs[place]
            kept = self._copies.get(id(weight))
            if kept is None or kept.form != _form(weight) or kept.weight() is not weight:
                missing[id(weight)] = place
            else:
                copies[place] = kept.tensor
        if missing:
            with self._lock:
                self._choose_anew()
                for reference, kind in self._layers:
                    layer = reference()
                    if layer is not None and id(layer.weight) in missing and quantization_of(layer) is None:
                        copies[missing[id(layer.weight)]] = self._make(layer.weight, kind)
        return copies

    def check(self, session: Session) -> None:
        """Once in a generation of a session: drop all copies if samples tell that a weight has changed.

        It waits for the weights' device.
        """
        with self._lock:
            if self._checked.get(session) == session.generation:
                return
            self._checked[session] = session.generation
            samples = samples_of(self._weights())
            if self._samples and bool(differ(self._samples, samples)):
                self._copies.clear()
            self._samples = samples

    def _weights(self) -> list[nn.Parameter]:
        return [layer.weight for reference, _ in self._layers if (layer := reference()) is not None]

    def _make(self, weight: nn.Parameter, kind: Kind) -> torch.Tensor:
        with torch.inference_mode(False), torch.no_grad():
            tensor: torch.Tensor = quantized_layer(weight, kind).weight
        self._copies = {key: kept for key, kept in self._copies.items() if kept.weight() is not None}
        self._copies[id(weight)] = _Copy(weakref.ref(weight), _form(weight), tensor)
        return tensor


def _form(weight: torch.Tensor) -> tuple[Any, ...]:
    """What tells that a weight was written to, moved or cast; no version if it was made under inference mode."""
    return weight.device, weight.dtype, None if weight.is_inference() else weight._version


def _reads_weight(user: fx.Node, node: fx.Node) -> bool:
    """Whether `user` is a linear layer that multiplies by `node`, and does nothing else with it."""
    others = [user.args[0], *user.args[2:], *user.kwargs.values()] if user.args else []
    return user.target is torch.nn.functional.linear and user.args[1:2] == (node,) and node not in others
