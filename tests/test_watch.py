"""A device watched while it is measured: what its files say becomes power, energy and notes."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from secateur.cli.verify import state_lines
from secateur.devices import on_bench
from secateur.devices.connection import Output
from secateur.devices.local import LocalConnection
from secateur.devices.remote_run import ToldLook, ToldPhase
from secateur.devices.telemetry import Telemetry, parse_telemetry, read_telemetry
from secateur.flow.watch import Watch, begin_watch, end_watch, notes
from test_telemetry import NANO, THOR, gpu, planted


def current(milliamperes: int) -> dict[str, str]:
    """VDD_IN of the Orin Nano, at 5 V."""
    folder = "/sys/class/hwmon/hwmon1/"
    return {folder + "in1_input": "5000", folder + "curr1_input": str(milliamperes)}


def phase(name: str, seconds: float, calls: int, milliamperes: int, looks: int = 5) -> ToldPhase:
    times = [seconds * (index + 0.5) / looks for index in range(looks)]
    return ToldPhase(
        phase=name, seconds=seconds, calls=calls,  # type: ignore[arg-type]
        looks=[ToldLook(at=at, files=current(milliamperes)) for at in times],
    )  # fmt: skip


def nano(**changes: str) -> Telemetry:
    return parse_telemetry({f"/{name}": text.strip() for name, text in {**NANO, **changes}.items()})


class Recorded(LocalConnection):
    """A device of recorded files."""

    name = "ssh://nano"

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root

    def run(self, command: str, *, seconds: float = 60) -> Output:
        output = super().run(command.replace(" /", f" {self.root}/"), seconds=seconds)
        return replace(output, out=output.out.replace(str(self.root), ""))


def test_energy_is_what_is_spent_above_idle(tmp_path: Path) -> None:
    connection = Recorded(planted(tmp_path, NANO))
    began = begin_watch(connection)
    assert began.before == read_telemetry(tmp_path)
    phases = []
    for busy in (2000, 2100):  # 10 W and 10.5 W, for a second, 50 inferences; 5 W at rest
        phases += [phase("idle", 0.5, 9, 1000), phase("busy", 1.0, 50, busy),
                   phase("idle", 0.5, 9, 1000)]  # fmt: skip
    state, energy = end_watch(began, connection, phases)
    assert energy["per_inference_mj"] == pytest.approx((100 + 110) / 2)
    assert energy["standard_error_mj"] == pytest.approx(5)
    assert (energy["idle_w"], energy["busy_w"]) == pytest.approx((5, 10.25))
    assert energy["covers"] == ("VDD_IN",) and energy["within_noise"] is False
    busy_state = state["busy"]
    assert busy_state["power_w"] == pytest.approx(10.25) and busy_state["looks"] == 10
    assert busy_state["hottest_c"] == 51.5 and busy_state["gpu_mhz"] == [612, 612]
    assert busy_state["throttled"] is False
    assert state["before"]["mode"]["name"] == "25W" and json.dumps(state)
    said = state_lines(state)
    assert said[0] == "at work: power mode 25W, 10.2 W, 51.5 °C at most, GPU 612 to 612 MHz"
    assert said[1:] == ["note: the GPU's clock may move between 306 and 918 MHz: "
                        "`sudo jetson_clocks` holds it"]  # fmt: skip


@pytest.mark.parametrize(
    ("phases", "said"),
    [
        ([], "not watched long enough"),
        ([phase("idle", 1, 1, 1), phase("busy", 1, 1, 1, looks=2), phase("idle", 1, 1, 1)],
         r"\(VDD_IN\) answered 2 times in 1.00 s"),
        ([phase("busy", 1, 1, 1), phase("busy", 1, 1, 1), phase("idle", 1, 1, 1)], "was idle when"),
        ([phase("idle", 1, 1, 0), phase("busy", 1, 1, 0), phase("idle", 1, 1, 0)] * 2,
         "stands still"),
    ],
)  # fmt: skip
def test_looks_that_say_too_little_cost_the_energy_only(
    tmp_path: Path, phases: list[ToldPhase], said: str
) -> None:
    connection = Recorded(planted(tmp_path, NANO))
    state, energy = end_watch(begin_watch(connection), connection, phases)
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(energy["not_measurable"])
    assert state["after"]["mode_id"] == 1


def test_an_ordinary_machine_is_not_watched(tmp_path: Path) -> None:
    connection = Recorded(tmp_path)
    began = begin_watch(connection)
    assert began.order is None
    state, energy = end_watch(began, connection, [])
    assert "no sensors of a module's power that are known" in energy["not_measurable"]
    assert state["busy"] is None and state["notes"] == [] and state_lines(state) == []
    thor = Watch({}, parse_telemetry({f"/{name}": text for name, text in THOR.items()}))
    assert thor.order is not None and "/etc/nvpmodel.conf" not in thor.order["patterns"]


COOLING = "sys/class/thermal/cooling_device{}/cur_state"
EVENTS = "sys/class/hwmon/hwmon3/oc{}_event_cnt"
LOCKED = gpu("17000000.gpu", 918000000, 918000000, 918000000)


@pytest.mark.parametrize(
    ("before", "busy", "after", "said"),
    [
        ({}, {}, {}, []),
        ({}, {COOLING.format(2): "1"}, {},
         ["heat held clocks down (gpu-throttle-alert): cool the device, or lower its mode"]),
        ({}, {}, {EVENTS.format(2): "18"},
         ["the supply gave way meanwhile: average over-current, 3 times"]),
        ({}, {}, {"var/lib/nvpmodel/status": "pmode:0002"},
         ["the power mode was changed meanwhile"]),
        (gpu("17000000.gpu", 1020000000, 1020000000, 1020000000), {}, {},
         ["power mode 25W is set, but the clocks are not its: restart the device"]),
    ],
)  # fmt: skip
def test_notes_name_what_slowed_the_device(
    before: dict[str, str], busy: dict[str, str], after: dict[str, str], said: list[str]
) -> None:
    rows = [nano(**{**LOCKED, **changes}) for changes in (before, busy, after)]
    assert list(notes(rows[0], rows[1:2], rows[2])) == said


def test_looks_are_taken_while_it_works_and_while_it_idles(tmp_path: Path) -> None:
    now = ["nothing"]

    def work() -> None:
        now[0] = "busy"

    def rest() -> None:
        now[0] = "idle"
        on_bench.time.sleep(0.01)

    for call, name in ((work, "busy"), (rest, "idle")):
        call()
        looked = on_bench.look_during(call, 0.4, lambda: {"current": now[0]})
        assert looked["calls"] >= 1 and looked["seconds"] >= 0.4 and len(looked["looks"]) >= 3
        assert {look["files"]["current"] for look in looked["looks"]} == {name}
        assert [look["at"] for look in looked["looks"]] == sorted(
            each["at"] for each in looked["looks"]
        )
    patterns, root = Watch({}, nano()).order, planted(tmp_path, NANO)
    assert patterns is not None
    order: dict[str, Any] = {**patterns, "root": str(root), "rounds": 2, "settle": 0.01}
    phases = [ToldPhase.model_validate(row) for row in on_bench.watch(work, 0.2, **order)]
    assert [each.phase for each in phases] == ["idle", "busy", "idle"] * 2
    files = phases[0].looks[0].files
    assert files["/sys/class/hwmon/hwmon1/in1_label"] == "VDD_IN"
    assert parse_telemetry(files).gpu == nano().gpu
    assert asdict(parse_telemetry(files))["mode"] is None  # of the reading before


def test_the_agent_reads_what_is_asked_and_no_more(tmp_path: Path) -> None:
    (tmp_path / "sys").mkdir()
    (tmp_path / "sys" / "big").write_text("x" * 100_000)
    (tmp_path / "sys" / "other").write_text("secret")
    rows = on_bench.watch(lambda: on_bench.time.sleep(0.01), 0.1, ["/sys/b*"], str(tmp_path), 1, 0)
    texts = rows[0]["looks"][0]["files"]
    assert {name: len(text) for name, text in texts.items()} == {"/sys/big": on_bench.LONGEST_TEXT}
