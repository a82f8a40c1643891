"""How the ranks of a job are laid out: tensor innermost, then context, pipeline, data.

`rank = tp + TP * (cp + CP * (pp + PP * dp))`, the order of the Llama 3 paper (section 3.3.2): what talks
most sits closest. Nodes take consecutive ranks, so tensor parallel groups stay inside a node whenever TP
divides the slots of a node.
"""

from dataclasses import dataclass

from keepstep.core.ids import Rank


@dataclass(frozen=True, slots=True, kw_only=True)
class Coordinates:
    dp: int
    pp: int
    cp: int
    tp: int

    def __str__(self) -> str:
        context = f" cp={self.cp}" if self.cp else ""
        return f"tp={self.tp}{context} pp={self.pp} dp={self.dp}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Sizes of the four dimensions; their product is the world size."""

    dp: int = 1
    pp: int = 1
    cp: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        assert min(self.dp, self.pp, self.cp, self.tp) >= 1, self

    @property
    def world_size(self) -> int:
        return self.dp * self.pp * self.cp * self.tp

    @property
    def replica_size(self) -> int:
        """Ranks of one data-parallel replica, the smallest set that holds the whole model."""
        return self.pp * self.cp * self.tp

    def coordinates(self, rank: int) -> Coordinates:
        assert 0 <= rank < self.world_size, rank
        rest, tp = divmod(rank, self.tp)
        rest, cp = divmod(rest, self.cp)
        dp, pp = divmod(rest, self.pp)
        return Coordinates(dp=dp, pp=pp, cp=cp, tp=tp)

    def rank(self, *, dp: int = 0, pp: int = 0, cp: int = 0, tp: int = 0) -> Rank:
        return Rank(tp + self.tp * (cp + self.cp * (pp + self.pp * dp)))

    def group(self, dimension: str, rank: int) -> tuple[Rank, ...]:
        """The ranks that differ from `rank` only along `dimension` (dp, pp, cp or tp), in order."""
        at = self.coordinates(rank)
        place = {"dp": at.dp, "pp": at.pp, "cp": at.cp, "tp": at.tp}
        size: int = getattr(self, dimension)
        return tuple(self.rank(**{**place, dimension: k}) for k in range(size))

    def with_replicas(self, dp: int) -> "Layout":
        return Layout(dp=dp, pp=self.pp, cp=self.cp, tp=self.tp)

    def sources(self, old: "Layout", dp: int) -> range:
        """The replicas of another layout with what replica `dp` owns of a vector that both cut evenly."""
        return range(dp * old.dp // self.dp, -(-(dp + 1) * old.dp // self.dp))

    def __str__(self) -> str:
        context = f" x cp {self.cp}" if self.cp > 1 else ""
        return f"tp {self.tp}{context} x pp {self.pp} x dp {self.dp}"


def local_ranks(world_size: int, nodes: int, node_rank: int) -> range:
    """The consecutive ranks of one node of a gang with the same number of ranks on every node."""
    per_node, rest = divmod(world_size, nodes)
    assert rest == 0, f"{world_size} ranks on {nodes} nodes"
    return range(node_rank * per_node, (node_rank + 1) * per_node)


def stage_layers(layers: int, stages: int, stage: int) -> range:
    """The layers of a (virtual) stage: equally many where that can be.

    Else embedding and output count as a layer each, as in the paper (section 3.3.2): 126 layers on 16 stages
    are 7, 8 ... 8, 7. What is over goes to the later stages.
    """
    if layers % stages == 0:
        return range(layers // stages * stage, layers // stages * (stage + 1))
    first, stop = ((layers + 2) * k // stages - 1 for k in (stage, stage + 1))
    return range(max(0, first), min(layers, stop))
