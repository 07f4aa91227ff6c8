"""Whole heads of attention blocks as channel groups.

A block is taken as timm, and much code after it, writes it: one ``qkv`` layer whose rows are
(query | key | value, head, head's channels), ``num_heads``, and a ``proj`` layer that reads the
heads side by side.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from secateur.core.channels import ChannelGroup, Member
from secateur.core.flops import counted
from secateur.core.model import MultiTaskModel


def head_groups(model: MultiTaskModel) -> tuple[ChannelGroup, ...]:
    """Return the heads of each block that looks like one; ``trial`` finds whether they can go.

    A group's channels are the heads of one block, ``heads_of``; each is many positions wide.
    """
    return tuple(
        _group(name, block.num_heads, block.proj.in_features // block.num_heads)
        for name, block in model.named_modules()
        if _is_attention(block)
    )


def head_macs(
    model: MultiTaskModel, groups: Sequence[ChannelGroup], example: Tensor
) -> dict[str, int]:
    """Return, by block, what one head multiplies beside the projections: q k^T and a v."""
    groups = [group for group in groups if group.heads_of]
    if not groups:
        return {}
    counts = counted(model, example).get_flop_counts()

    def macs(name: str) -> int:
        ran = counts.get(f"{type(model).__name__}.{name}", {})  # none, if forward leaves it out
        return sum(ran.values()) // 2 // example.shape[0]

    return {
        group.heads_of: (macs(group.heads_of) - sum(macs(m.layer) for m in group.members))
        // group.width
        for group in groups
    }


def _is_attention(block: nn.Module) -> bool:
    qkv, proj = (getattr(block, part, None) for part in ("qkv", "proj"))
    heads = getattr(block, "num_heads", None)
    if not (isinstance(qkv, nn.Linear) and isinstance(proj, nn.Linear) and isinstance(heads, int)):
        return False
    fits = proj.in_features % heads == 0 and qkv.out_features == 3 * proj.in_features
    return heads > 1 and fits


def _group(block: str, heads: int, width: int) -> ChannelGroup:
    read = tuple(tuple(range(h * width, (h + 1) * width)) for h in range(heads))
    made = tuple(tuple(part * heads * width + i for part in range(3) for i in at) for at in read)
    members = (Member(f"{block}.proj", "in", read), Member(f"{block}.qkv", "out", made))
    name = f"{block.removeprefix('network.')}.heads"
    return ChannelGroup(name, f"{block}.qkv", tuple(range(heads)), members, heads_of=block)
