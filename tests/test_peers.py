"""The suites that set ours beside others, and latencies beside one another: what they claim."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, SPEC
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
    alone, strict = shows[:2], [show for show in shows if show.claim.startswith("peers' files")]
    assert [show.value for show in alone] == [1 - value for value in better]
    assert [show.value for show in strict] == better
    assert [show.ok for show in alone] == [show.ok for show in strict] == [not v for v in better]
    alike = [show.value for show in shows if show.claim == f"... of {ours} alone"]
    assert alike == (better if ours == peers_own else [0, 0])


def test_one_file_of_ours_on_the_front_is_enough_at_a_budget() -> None:
    """A peer's int8 beats our fp32; our int8 is beaten by none."""
    rows = [PARENT, row("secateur", 0.5, fp32=(3.0, -0.6, -1.0), int8=(2.4, -0.8, -1.4)),
            row("Olive", 1.0, int8=(2.8, -0.3, -0.3))]  # fmt: skip
    said = {show.claim: show for show in peers.claims(rows)}
    front = said["our files at 50% of the MACs that no peer's file matches in p50 and delta T"]
    assert front.value == 1 and front.ok
    claim = "peers' files at least as good as ours in p50 and in delta T, ours at 50% of the MACs, "
    assert [said[f"{claim}{p}"].ok for p in ("fp32", "int8")] == [False, True]


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
    ways = {"protocol": [2.0, 3.0, 4.1], "plain loop": [1.99, 3.0, 4.0],  # a machine that drifts
            "protocol, profiled": [2.2], "runtime's profile": [2.0],
            "call by call": [1.05, 1.06, 1.0]}  # fmt: skip
    plain, profile = latency.agreement(ways)
    assert plain.ok and plain.value == pytest.approx(2.0 / 1.99 - 1)
    assert not profile.ok and profile.value == pytest.approx(0.05)


@pytest.mark.filterwarnings("error")
def test_the_profile_is_of_the_very_same_calls(tmp_path: Path, model: MultiTaskModel) -> None:
    example = SPEC.example(1)
    export_onnx(model, example, tmp_path / "m.onnx")
    found = latency.profiled(tmp_path / "m.onnx", example.numpy())
    assert 1 < found["call by call"] < 3  # the profile leaves out what Python takes
    assert found["protocol, profiled"] > found["runtime's profile"] > 0
