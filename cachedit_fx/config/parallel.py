"""Defines the settings by which several ranks share the work on one sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from cachedit_fx.config.rules import OptionError, Rule, choice, integer, optional, setting
from cachedit_fx.runtime.grid import Grid, Mesh, Sizes, all_ranks, grid_of, is_mesh, sizes_of

UlyssesInputs: TypeAlias = Literal["equal", "first_rank"]
Parallel: TypeAlias = Literal["auto"]
UlyssesFloat8: TypeAlias = bool | Literal["with_keys"]


@dataclass(frozen=True)
class ParallelOptions:
    """The options of context parallelism."""

    parallel: Parallel | None = setting(None, optional(choice(*get_args(Parallel))))
    """"auto" = all ranks of torch.distributed share the work on one sample. The first call chooses how: the fastest way
    by formulas of the graph's work, guidance, the number of ranks, and data sheets of the cards. It stands for
    `cfg_parallel`, `ring_size`, `ulysses_size` and `ulysses_async`. `explain` says what was chosen and why. None = as
    those options say."""
    ulysses_size: int = setting(None, optional(integer(1, "ranks")))
    """How many ranks of torch.distributed share the work on one sample: each computes a part of the tokens, and
    attention exchanges tokens for heads (Ulysses). 1 = each rank works alone. Consecutive ranks form a group, so the
    number must divide that of all ranks. All ranks of a group must call the model with equal inputs. None becomes the
    size of `ulysses_mesh`, or 1."""
    ring_size: int = setting(None, optional(integer(1, "ranks")))
    """How many ranks share the keys and values of attention, which travel around them in turn (ring). Each computes a
    part of the tokens, with all heads. With `ulysses_size` the two make a grid: `ring_size * ulysses_size` ranks share
    a sample. None becomes the size of the dimension "ring" of `ulysses_mesh`, or 1."""
    cfg_parallel: bool = setting(False, Rule(lambda value: isinstance(value, bool), "True or False"))
    """Whether two halves of a sample's ranks share the branches of classifier-free guidance: each half computes one
    branch of a step, and sends its result to the other. A batch is cut in two instead, unless the pipeline names each
    call as one branch. It doubles the number of ranks that share a sample."""
    ulysses_mesh: Mesh | None = setting(
        None,
        optional(
            Rule(
                is_mesh,
                'a DeviceMesh of one dimension, or of the dimensions "cfg", "ring" and "ulysses", or a ProcessGroup, '
                "with this process in it",
            )
        ),
    )
    """The ranks that share the work on one sample, if they are not consecutive: a dimension of a DeviceMesh,
    `mesh["ulysses"]`, or a process group. A mesh of several dimensions names them "cfg", "ring" and "ulysses". None =
    consecutive ranks."""
    ulysses_inputs: UlyssesInputs = setting("equal", choice(*get_args(UlyssesInputs)))
    """Which inputs the ranks that share a sample take. "equal" = their own, which must be equal: they are compared to
    the bit where a generation begins, and up to rounding at every other call. "first_rank" = at every call the tensors
    of the group's first rank, so that all ranks return its result. Each call then sends all its tensors; other inputs
    must be equal. It has no effect on one rank."""
    ulysses_float8: UlyssesFloat8 = setting(
        False, Rule(lambda value: isinstance(value, bool) or value == "with_keys", "True, False or 'with_keys'")
    )
    """Whether queries, values and results of attention travel between ranks in float8, with a scale for each head of a
    token. "with_keys" = keys too, less their mean. False = all in the model's dtype. It has no effect with
    ulysses_size=1."""
    ulysses_async: bool = setting(False, Rule(lambda value: isinstance(value, bool), "True or False"))
    """Whether exchanges between ranks run beside the computation: each starts as soon as its value is made, and is
    waited for where its result is read. No bit changes. It has no effect with ulysses_size=1."""

    @property
    def sizes(self) -> Sizes:
        """How many ranks share a sample, in each dimension."""
        return Sizes(2 if self.cfg_parallel else 1, self.ring_size, self.ulysses_size)

    @property
    def is_alone(self) -> bool:
        """Whether each rank works alone."""
        return self.parallel is None and self.sizes.total == 1

    def grid(self) -> Grid | None:
        """The ranks that share a sample with this one; None if it works alone. All processes must call it together.

        Raises:
            OptionError, RankMissing: as `grid_of`.
        """
        if self.parallel is not None:
            return all_ranks(f"parallel={self.parallel!r}")
        return grid_of(self.sizes, self.ulysses_mesh)

    def _canonical_sizes(self) -> dict[str, Any]:
        """The sizes, with those of the mesh for those that are left out."""
        mesh = self.ulysses_mesh
        sizes = sizes_of(mesh) if mesh is not None and is_mesh(mesh) else Sizes()
        return {
            "ulysses_size": sizes.ulysses if self.ulysses_size is None else self.ulysses_size,
            "ring_size": sizes.ring if self.ring_size is None else self.ring_size,
            "cfg_parallel": self.cfg_parallel or sizes.cfg > 1,
        }

    def _check_sizes(self) -> None:
        """Raise if the sizes are not those of the mesh, or are given and to be chosen too."""
        if self.parallel is not None:
            words = ["ulysses_mesh"] if self.ulysses_mesh is not None else []
            words += [self.sizes.words] if self.sizes.total > 1 else []
            words += ["ulysses_async=True"] if self.ulysses_async else []
            if words:
                raise OptionError(
                    f"parallel={self.parallel!r} chooses how ranks share a sample, and {words[0]} says it: leave out "
                    "one of them"
                )
        if self.ulysses_mesh is not None and self.sizes != (sizes := sizes_of(self.ulysses_mesh)):
            raise OptionError(
                f"ulysses_mesh makes {sizes.words or 'ulysses_size=1'}, and with the other options it is "
                f"{self.sizes.words or 'ulysses_size=1'}: leave those out. Dimensions of the mesh that are named "
                "'cfg', 'ring' and 'ulysses' say which is which"
            )
