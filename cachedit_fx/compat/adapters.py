"""Block adapters: which transformers, and which of their block lists. Everything else about blocks is in the graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch

from cachedit_fx.compat.modifiers import ParamsModifier, check_modifier
from cachedit_fx.compat.ours import reject_other_package
from cachedit_fx.compat.patterns import PatchFunctor, check_pattern, leave_out
from cachedit_fx.config.rules import OptionError, check, choice, nearest
from cachedit_fx.runtime.registry import transformers_of, unwrapped


class BlockList(NamedTuple):
    """Neighbouring blocks of a list: all of them, or a slice."""

    name: str
    before: int = 0
    """Blocks of the list in front of the slice."""
    after: int = 0


WHOLE = BlockList("")
"""Any list without blocks outside."""


class Part(NamedTuple):
    """One transformer of an adapter."""

    module: torch.nn.Module
    lists: tuple[BlockList, ...] | None
    """Its block lists, in the adapter's order; None if they are found automatically."""


@dataclass
class BlockAdapter:
    """Names transformers and their block lists.

    Fields that are a list hold one entry for each transformer, or for each block list. Those about patterns, prefixes,
    suffixes and guidance are accepted, and not needed.

    Raises:
        OptionError: on block lists that the transformer does not have, or an unknown pattern.
    """

    pipe: Any = None
    transformer: torch.nn.Module | list[torch.nn.Module] | None = None
    """Default: every component of the pipeline named `transformer...`."""
    blocks: Any = None
    """A ModuleList of the transformer, a list of them, or for several transformers a list of those. Only these blocks
    are bypassed, and each list decides separately. A slice of a ModuleList raises F and B by the blocks in front of it
    and after it. Default: found automatically."""
    blocks_name: Any = None
    """Names, in place of `blocks`."""
    unique_blocks_name: Any = field(default_factory=list)
    dummy_blocks_names: list[Any] = field(default_factory=list)
    forward_pattern: Any = None
    params_modifiers: Any = None
    check_forward_pattern: bool | None = None
    check_num_outputs: bool = False
    patch_functor: PatchFunctor | None = None
    has_separate_cfg: bool = False
    auto: bool = False
    allow_prefixes: list[str] = field(default_factory=list)
    check_prefixes: bool = True
    allow_suffixes: list[str] = field(default_factory=list)
    check_suffixes: bool = False
    blocks_policy: str = "max"
    skip_post_init: bool = False

    def __post_init__(self) -> None:
        if self.skip_post_init:
            return
        check("blocks_policy", self.blocks_policy, choice("max", "min"))
        patterns = [] if self.forward_pattern is None else [check_pattern(each) for each in flat(self.forward_pattern)]
        lists = [each.name for part in self.parts() for each in part.lists or ()]
        for modifier in flat(self.params_modifiers) if self.params_modifiers is not None else ():
            check_modifier(modifier)
        if lists and len(patterns) > 1 and len(patterns) != len(lists):
            raise OptionError(
                f"forward_pattern has {len(patterns)} entries for {len(lists)} block lists ({', '.join(lists)}): give "
                "one for each, or one for all"
            )
        if self.patch_functor is not None:
            leave_out(self.patch_functor)

    def modules(self) -> list[torch.nn.Module]:
        """The transformers.

        Raises:
            OptionError: if there is neither a pipeline nor a transformer.
        """
        modules = flat(self.transformer) if self.transformer is not None else []
        if self.pipe is None and not modules:
            raise OptionError("BlockAdapter: pass a pipe or a transformer")
        return modules or transformers_of(self.pipe)

    def pipelines(self) -> list[Any]:
        """The pipeline, if it has components as those of diffusers have."""
        return [self.pipe] if isinstance(getattr(self.pipe, "components", None), dict) else []

    def parts(self) -> list[Part]:
        """The transformers, each with the names of its block lists."""
        modules = self.modules()
        blocks = self.blocks if self.blocks is not None else self.blocks_name
        if blocks is None:
            return [Part(module, None) for module in modules]
        shares = [blocks] if len(modules) == 1 else blocks
        if not isinstance(shares, (list, tuple)) or len(shares) != len(modules):
            raise OptionError(f"blocks: {len(modules)} transformers need a list of {len(modules)}, one entry for each")
        return [Part(module, _lists_of(share, module)) for module, share in zip(modules, shares, strict=True)]


def flat(values: Any) -> list[Any]:
    """The entries of nested lists; a single value is a list of one."""
    return [leaf for each in values for leaf in flat(each)] if isinstance(values, (list, tuple)) else [values]


def lists_of(module: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The module's lists of blocks by name, in the order of their registration."""
    containers = torch.nn.ModuleList, torch.nn.ModuleDict, torch.nn.Sequential
    return {name: child for name, child in unwrapped(module).named_modules() if isinstance(child, containers)}


def _lists_of(share: Any, module: torch.nn.Module) -> tuple[BlockList, ...]:
    """The block lists of a transformer's share of `blocks`."""
    lists = tuple(_list_of(each, module) for each in flat(share))
    names = Counter(each.name for each in lists)
    for name, count in names.items():
        if count > 1:
            raise OptionError(f"blocks: {name} is there twice; name a list once, whole or as one slice of neighbours")
    return lists


def _list_of(blocks: torch.nn.Module | str, module: torch.nn.Module) -> BlockList:
    """The block list of the module that is named, or that has these blocks next to each other."""
    lists, title = lists_of(module), type(unwrapped(module)).__name__
    if isinstance(blocks, str):
        if blocks not in lists:
            hint = f"; did you mean {nearest(blocks, lists)!r}?" if lists else ""
            raise OptionError(f"blocks_name={blocks!r}: {title} has no such block list, only {', '.join(lists)}{hint}")
        return BlockList(blocks)
    if not isinstance(blocks, tuple({type(each) for each in lists.values()}) or torch.nn.ModuleList):
        raise OptionError(f"blocks: a {type(blocks).__name__} is no list of blocks; {title} has {', '.join(lists)}")
    wanted = [*blocks._modules.values()]
    for name, each in lists.items():
        members = [*each._modules.values()]
        start = next((index for index, member in enumerate(members) if wanted and member is wanted[0]), None)
        if each is blocks:
            return BlockList(name)
        if start is not None and same_objects(members[start : start + len(wanted)], wanted):
            return BlockList(name, start, len(members) - start - len(wanted))
    raise OptionError(
        f"blocks: this {type(blocks).__name__} is none of {title}'s block lists, {', '.join(lists)}, and no neighbours "
        "of one of them"
    )


def same_objects(left: Sequence[Any], right: Sequence[Any]) -> bool:
    """Whether both have the very same members in the same order."""
    return len(left) == len(right) and all(one is other for one, other in zip(left, right, strict=True))


FAMILIES = {
    "Allegro": "AllegroTransformer3DModel",
    "AuraFlow": "AuraFlowTransformer2DModel",
    "Bria": "BriaTransformer2DModel",
    "BriaFibo": "BriaFiboTransformer2DModel",
    "Chroma": "ChromaTransformer2DModel",
    "ChronoEdit": "ChronoEditTransformer3DModel",
    "CogVideoX": "CogVideoXTransformer3DModel",
    "CogView3Plus": "CogView3PlusTransformer2DModel",
    "CogView4": "CogView4Transformer2DModel",
    "ConsisID": "ConsisIDTransformer3DModel",
    "Cosmos": "CosmosTransformer3DModel",
    "DiT": "DiTTransformer2DModel",
    "EasyAnimate": "EasyAnimateTransformer3DModel",
    "ErnieImage": "ErnieImageTransformer2DModel",
    "Flux": "FluxTransformer2DModel",
    "Flux2": "Flux2Transformer2DModel",
    "GlmImage": "GlmImageTransformer2DModel",
    "HunyuanDiT": "HunyuanDiT2DModel",
    "HunyuanVideo": "HunyuanVideoTransformer3DModel",
    "HunyuanVideo15": "HunyuanVideo15Transformer3DModel",
    "Kandinsky5": "Kandinsky5Transformer3DModel",
    "LTX": "LTXVideoTransformer3DModel",
    "LTX2": "LTX2VideoTransformer3DModel",
    "Latte": "LatteTransformer3DModel",
    "LongCatImage": "LongCatImageTransformer2DModel",
    "Lumina": "LuminaNextDiT2DModel",
    "Lumina2": "Lumina2Transformer2DModel",
    "Mochi": "MochiTransformer3DModel",
    "OmniGen": "OmniGenTransformer2DModel",
    "OvisImage": "OvisImageTransformer2DModel",
    "PRX": "PRXTransformer2DModel",
    "PixArt": "PixArtTransformer2DModel",
    "QwenImage": "QwenImageTransformer2DModel",
    "Sana": "SanaTransformer2DModel",
    "ShapE": "PriorTransformer",
    "SkyReelsV2": "SkyReelsV2Transformer3DModel",
    "StableAudio": "StableAudioDiTModel",
    "StableDiffusion3": "SD3Transformer2DModel",
    "VisualCloze": "FluxTransformer2DModel",
    "Wan": "WanTransformer3DModel",
    "WanVACE": "WanVACETransformer3DModel",
    "ZImage": "ZImageTransformer2DModel",
}
"""Beginning of pipelines' names -> their transformer. docs/models.md shows that each passes every check."""


class BlockAdapterRegister:
    """Adapters that users registered, by the beginning of a class's name. Others find their blocks automatically."""

    _adapters: ClassVar[dict[str, Callable[..., BlockAdapter]]] = {}

    @classmethod
    def register(cls, name: str, supported: bool = True) -> Callable[[Any], Any]:
        """A decorator that registers a function from a pipeline to an adapter, for classes named `name...`.

        For a transformer the function gets an object with the attribute `transformer`.
        """

        def decorate(function: Any) -> Any:
            if supported:
                cls._adapters.pop(name, None)  # the function registered last comes first
                cls._adapters[name] = function
            return function

        return decorate

    @classmethod
    def registered(cls, pipe_or_module: Any, **arguments: Any) -> BlockAdapter | None:
        """The adapter of the function registered last for the object's class; None without one."""
        title = type(pipe_or_module).__name__
        for name in reversed(cls._adapters):
            if title.startswith(name):
                alone = isinstance(pipe_or_module, torch.nn.Module)
                return cls._adapters[name](_Alone(pipe_or_module) if alone else pipe_or_module, **arguments)
        return None

    @classmethod
    def get_adapter(cls, pipe_or_module: Any, **arguments: Any) -> BlockAdapter:
        """The registered adapter of a pipeline or a module; without one, an adapter that finds the blocks."""
        adapter = cls.registered(pipe_or_module, **arguments)
        if adapter is not None:
            return adapter
        if isinstance(pipe_or_module, torch.nn.Module):
            return BlockAdapter(transformer=pipe_or_module, **arguments)
        return BlockAdapter(pipe=pipe_or_module, **arguments)

    @classmethod
    def is_supported(cls, pipe_or_module: Any) -> bool:
        """Whether the object has a transformer: no model needs an adapter."""
        try:
            return bool(transformers_of(pipe_or_module))
        except TypeError:
            return False

    @classmethod
    def supported_pipelines(cls, **_: Any) -> tuple[int, list[str]]:
        """`supported_pipelines()`."""
        names = [f"{name}*" for name in sorted({*FAMILIES, *cls._adapters})]
        return len(names), names


class _Alone:
    """In the place of a pipeline, for a transformer without one."""

    def __init__(self, transformer: torch.nn.Module) -> None:
        self.transformer = transformer
        self.components = {"transformer": transformer}


def adapter_of(pipe_or_adapter: Any) -> BlockAdapter:
    """The argument if it is an adapter, else `get_adapter` of it.

    Raises:
        OptionError: if it is of the package cache_dit.
        TypeError: if it is neither an adapter, nor a pipeline, nor a module.
    """
    if isinstance(pipe_or_adapter, BlockAdapter):
        return pipe_or_adapter
    reject_other_package(pipe_or_adapter)
    adapter = BlockAdapterRegister.registered(pipe_or_adapter)
    if adapter is not None:
        return adapter
    is_pipeline = isinstance(getattr(pipe_or_adapter, "components", None), dict)
    if not is_pipeline and not isinstance(pipe_or_adapter, torch.nn.Module):
        raise TypeError(
            "expected a pipeline of diffusers, a torch.nn.Module or a BlockAdapter, not "
            f"{type(pipe_or_adapter).__name__}"
        )
    return BlockAdapterRegister.get_adapter(pipe_or_adapter)


def supported_pipelines(**_: Any) -> tuple[int, list[str]]:
    """The number and the names of families of pipelines whose transformer passes every check, and of registered ones.

    Other models work too: no model needs an adapter.
    """
    return BlockAdapterRegister.supported_pipelines()


def supported_matrix() -> str:
    """The families of `supported_pipelines` and their transformers, as a Markdown table."""
    rows = [f"| {name} | {transformer} |" for name, transformer in FAMILIES.items()]
    return "\n".join(["| pipelines | transformer |", "| --- | --- |", *rows])


def get_adapter(pipe: Any) -> BlockAdapter:
    """`BlockAdapterRegister.get_adapter(pipe)`; an adapter as it is."""
    return adapter_of(pipe)


def shares_of(modifiers: Any, parts: Sequence[Part]) -> list[list[ParamsModifier]]:
    """The modifiers of each part, from one modifier, a list, or a list of lists, one for each part.

    A flat list is shared out: one modifier for each block list, in their order.

    Raises:
        OptionError: if a list of lists is not as long as there are transformers.
    """
    if isinstance(modifiers, (list, tuple)) and any(isinstance(each, (list, tuple)) for each in modifiers):
        if len(modifiers) != len(parts):
            raise OptionError(f"params_modifiers has {len(modifiers)} lists for {len(parts)} transformers")
        return [flat(each) for each in modifiers]
    rest = [] if modifiers is None else flat(modifiers)
    if len(parts) == 1:
        return [rest]
    shares = []
    for part in parts:
        count = 1 if part.lists is None else len(part.lists)
        shares.append(rest[:count])
        rest = rest[count:]
    if rest:
        raise OptionError(f"params_modifiers has {len(rest)} more entries than there are block lists")
    return shares
