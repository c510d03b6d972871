"""Puts the weights of one module on its device or on the host, for `time_weights="host"`.

enable_cache, the module on the host    all weights wait there, so that `to` moves none in vain
first call on a device                  captured without running: weights behind the timestep alone stay on the
                                        host, or leave the device, and all others go to it
disable_cache                           all weights go to the device
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from cachedit_fx.backend import rewrite
from cachedit_fx.capture import CAPTURE_ERRORS, capturing, ends_at_break, isolated_compile, uncompiled
from cachedit_fx.config.options import Options
from cachedit_fx.passes.base import Traced
from cachedit_fx.passes.hoist_invariants import Hoisted
from cachedit_fx.runtime.host_tensor import HOST, HostWeight

BROKEN = "a call is not captured as one graph, and code outside may read any weight"
NONE_ALONE = "none was found that serves the timestep's values alone"


class Holder(NamedTuple):
    """A place of a parameter: the module that holds it, its name there, and the name in the whole module."""

    owner: torch.nn.Module
    name: str
    layer: str
    parameter: torch.nn.Parameter


class Placement:
    """Places the weights of a module at its first call on a device, and when the device changes.

    Args:
        options: of the module.
        traced: knowledge about the module from outside its graphs.
        warn_once: warns, once for each message.
    """

    def __init__(self, options: Options, traced: Traced, warn_once: Callable[[str], None]) -> None:
        self.options, self.traced, self.warn_once = options, traced, warn_once
        self._device: torch.device | None = None
        self._lock = threading.Lock()

    def __call__(self, module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """A call comes, with these inputs."""
        device = _device_of(module, args, kwargs)
        if device == self._device:
            return
        with self._lock:
            if device != self._device and self._place(module, device, args, kwargs):
                self._device = device

    def _place(
        self, module: torch.nn.Module, device: torch.device, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> bool:
        """Place the weights. False if the next call is to do it anew: this one could not be captured."""
        name = type(module).__name__
        if not is_accelerator(device):
            bring_back(module)
            self.warn_once(f"time_weights='host' changes nothing: {name} runs on the device {device.type!r}")
            return True
        graphs = self._time_weights(module, args, kwargs)
        weights = graphs[0] if len(graphs) == 1 else None
        keep_on_host(module, weights or ())
        if not weights:
            reason = BROKEN if weights is None else NONE_ALONE
            self.warn_once(f"time_weights='host': all weights of {name} stay on {device}, since {reason}")
        return bool(graphs)

    def _time_weights(
        self, module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> list[list[torch.Tensor] | None]:
        """For each graph of a call, the weights that only pieces behind the timestep read. Runs no kernel.

        None for a graph that a break follows: the capture ends there.
        """
        graphs: list[list[torch.Tensor] | None] = []

        def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
            hoisted = rewrite(gm, self.options, self.traced).facts.get(Hoisted)
            places = hoisted.time_weights if hoisted is not None else ()
            graphs.append(None if ends_at_break(gm) else [example_inputs[place] for place in places])
            return _stop

        with torch.no_grad(), uncompiled(module), capturing(), contextlib.suppress(_Captured, *CAPTURE_ERRORS):
            isolated_compile(module, backend)(*args, **kwargs)
        results = list(graphs)
        graphs.clear()  # dynamo keeps the backend, which would keep the weights when the module is gone
        return results


class _Captured(Exception):
    """Ends a capture before its graph runs."""


def _stop(*_: Any) -> Any:
    raise _Captured


def is_accelerator(device: torch.device) -> bool:
    """Whether a weight on the host takes no memory of this device."""
    return device.type not in (HOST.type, "meta")


def wait_on_host(module: torch.nn.Module) -> None:
    """Let all weights of a module on the host stay there when the module moves, until its first call places them."""
    weights = module.parameters()
    keep_on_host(module, [weight for weight in weights if isinstance(weight, HostWeight) or weight.device == HOST])


def bring_back(module: torch.nn.Module) -> None:
    """Take all weights of a module to its device: the module's own parameters, as they were."""
    keep_on_host(module, ())


def keep_on_host(module: torch.nn.Module, weights: Collection[torch.Tensor]) -> None:
    """Let these weights lie on the host, and all others on the module's device.

    Weights that the host cannot stand in for stay on the device: tensors of other kinds (quantized ones), and those
    that share their memory with others.
    """
    wanted = {id(weight) for weight in weights}
    storages = Counter(_storage(tensor) for tensor in (*module.parameters(), *module.buffers()))
    places: dict[torch.nn.Parameter, list[Holder]] = {}
    for holder in holders(module):
        places.setdefault(holder.parameter, []).append(holder)
    for parameter, shared in places.items():
        placed: torch.Tensor = parameter
        if isinstance(parameter, HostWeight):
            placed = parameter if id(parameter) in wanted else parameter.parameter()
        elif id(parameter) in wanted and _is_plain(parameter) and storages[_storage(parameter)] == 1:
            placed = HostWeight.of(parameter, shared[0].layer)
        for holder in shared:
            holder.owner._parameters[holder.name] = cast(torch.nn.Parameter, placed)
    for owner in module.modules():
        _put_into_state_dict(owner)


def holders(module: torch.nn.Module) -> list[Holder]:
    """Every place of a parameter in a module."""
    return [
        Holder(owner, name, f"{prefix}.{name}".lstrip("."), parameter)
        for prefix, owner in module.named_modules()
        for name, parameter in owner._parameters.items()
        if parameter is not None
    ]


def _is_plain(parameter: torch.nn.Parameter) -> bool:
    is_plain = type(parameter) is torch.nn.Parameter and type(parameter.data) is torch.Tensor
    return is_plain and parameter.layout is torch.strided


def _storage(tensor: torch.Tensor) -> int:
    return id(tensor) if isinstance(tensor, HostWeight) else tensor.untyped_storage()._cdata


def _device_of(module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.device:
    """The device of a call: an accelerator among its inputs, or else the module's."""
    tensors = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
    devices = [tensor.device for tensor in tensors]
    weight = next(module.parameters(), None)
    return next(filter(is_accelerator, devices), HOST if weight is None else weight.device)


def _put_into_state_dict(owner: torch.nn.Module) -> None:
    """Let a layer's state dict have plain tensors on the host for its weights that lie there."""
    for key, hook in list(owner._state_dict_hooks.items()):
        if hook is _plain_tensors:
            del owner._state_dict_hooks[key]
    if any(isinstance(parameter, HostWeight) for parameter in owner._parameters.values()):
        owner.register_state_dict_post_hook(_plain_tensors)


def _plain_tensors(owner: torch.nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name in owner._parameters:
        value = state.get(prefix + name)
        if isinstance(value, HostWeight):
            state[prefix + name] = value.host
