"""The suites that set ours beside others, and latencies beside one another: what they claim."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from secateur.core.model import MultiTaskModel
from secateur.lower import export_onnx
from secateur.prune import count_macs
from torch import Tensor

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

from latency import run as latency
from peers import run as peers
from peers.jobs import HERE, PEERS, lines_of_code


def row(peer: str, keep: float, **bundles: tuple[float, float, float]) -> dict[str, Any]:
    """A job's row from (p50 in ms, delta T, worst task) per precision."""
    return {"peer": peer, "keep": keep, "bundles": {
        precision: {"latency_ms": {"p50": ms}, "delta_t": delta_t, "worst": worst}
        for precision, (ms, delta_t, worst) in bundles.items()
    }}  # fmt: skip


PARENT = row("parent", 1.0, fp32=(4.0, 0.0, 0.0))
OURS = [PARENT, row("secateur", 0.5, fp32=(2.6, -0.6, -1.0))]


@pytest.mark.parametrize(
    ("theirs", "better"),
    [
        ((2.5, -0.5, -0.9), [1, 1]),  # faster and more accurate
        ((2.64, -0.5, -1.5), [1, 0]),  # as fast within the tie; its worst task is worse
        ((2.7, 0.1, 0.2), [0, 0]),  # slower
        ((1.0, -0.7, -1.1), [0, 0]),  # faster and less accurate: another place on the front
    ],
)
@pytest.mark.parametrize(("ours", "peers_own"), [("fp32", "int8"), ("int8", "int8"),
                                                 ("int8", "fp32")])  # fmt: skip
def test_a_peer_that_is_as_fast_and_as_accurate_breaks_the_claim(
    theirs: tuple[float, float, float], better: list[int], ours: str, peers_own: str
) -> None:
    rows = [PARENT, row("secateur", 0.5, **{ours: (2.6, -0.6, -1.0)}),
            row("by hand", 0.3, **{peers_own: theirs})]  # fmt: skip
    shows = peers.claims(rows)
    assert [show.value for show in shows] == better
    assert [show.ok for show in shows] == [value == 0 for value in better]


def test_the_lead_is_over_the_best_peer_at_the_same_budget_and_precision() -> None:
    others = [row("by hand", 0.5, fp32=(3.0, -5.0, -6.0), int8=(2.0, 1.0, 1.0)),
              row("uniform", 0.5, fp32=(3.0, -2.0, -6.0)),
              row("by hand", 0.3, fp32=(3.0, 9.0, 9.0))]  # fmt: skip
    (lead,) = (s for s in peers.claims([*OURS, *others]) if "ahead" in s.claim)
    assert "(uniform), 50% of the MACs, fp32" in lead.claim
    assert lead.value == pytest.approx(1.4) and lead.ok


def test_macs_of_a_file_are_those_of_the_models_convolutions(
    tmp_path: Path, model: MultiTaskModel, example: Tensor
) -> None:
    export_onnx(model, example, tmp_path / "m.onnx")
    linear = 32 * 32 + 32 * 4  # of the head that classifies; the peers' network has none
    assert peers.conv_macs(tmp_path / "m.onnx") == count_macs(model, example) - linear


def test_lines_are_what_somebody_has_to_write(tmp_path: Path) -> None:
    script = tmp_path / "a.py"
    script.write_text(
        '"""Two\nlines."""\n\n# why\nx = 1\n\ndef f():\n    """Doc."""\n    return x\n'
    )
    assert lines_of_code(script) == 3
    recipe = tmp_path / "a.yaml"
    recipe.write_text("# what\nmodel:\n  factory: a:b\n")
    assert lines_of_code(recipe) == 2
    assert all((HERE / name).exists() for peer in PEERS.values() for name in peer.written)


def bench(p50: float, *, noisy: bool = False) -> dict[str, Any]:
    return {"p50_ms": p50, "noisy": noisy}


def test_medians_that_differ_break_the_claim_unless_they_are_flagged() -> None:
    (wide,) = latency.repeatability([bench(2.0), bench(2.05), bench(2.2)])
    assert not wide.ok and wide.value == pytest.approx(0.2 / 2.05)
    (flagged,) = latency.repeatability([bench(2.0), bench(2.05), bench(2.2, noisy=True)])
    assert flagged.ok and flagged.value == pytest.approx(0.05 / 2.025)
    assert "(2 of 3)" in flagged.claim


def test_a_protocol_that_disagrees_breaks_the_claim() -> None:
    ways = {"protocol": 2.0, "plain loop": 1.99, "protocol, profiled": 2.2,
            "runtime's profile": 2.0}  # fmt: skip
    assert [show.ok for show in latency.agreement(ways)] == [True, False]
