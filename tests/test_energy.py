"""Energy per inference: counters and sensors of recorded trees, what is subtracted, what is not.

Trees are written by hand after real machines, each named; a player moves their figures on as the
machine would while something runs.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cli_run import run
from hypothesis import given
from hypothesis import strategies as st
from secateur.bench.energy import EnergyProtocol, Round, measure_energy, summarise_energy
from secateur.cli.verify import energy_line
from secateur.core.errors import DeviceError
from secateur.devices.energy import (
    EnergyCounters,
    NotMeasurable,
    PowerSensors,
    Spent,
    find_meter,
    growth,
    integral,
)
from secateur.flow.measure import energy_of

QUICK = EnergyProtocol(rounds=3, seconds=0.15, settle=0.02)
POWERCAP = "sys/class/powercap"


def zone(name: str, called: str, energy: int, wraps_at: int = 262143328850) -> dict[str, str]:
    folder = f"{POWERCAP}/{name}"
    return {
        f"{folder}/name": f"{called}\n",
        f"{folder}/energy_uj": f"{energy}\n",
        f"{folder}/max_energy_range_uj": f"{wraps_at}\n",
        f"{folder}/enabled": "1\n",
    }


def chip(index: int, name: str, **values: str | int) -> dict[str, str]:
    folder = f"sys/class/hwmon/hwmon{index}"
    return {f"{folder}/name": f"{name}\n"} | {f"{folder}/{k}": f"{v}\n" for k, v in values.items()}


# A server with two sockets, Linux 6.1: the package has its cores, memory is beside it
SERVER = {
    f"{POWERCAP}/intel-rapl/enabled": "1\n",
    **zone("intel-rapl:0", "package-0", 91_000_000_000),
    **zone("intel-rapl:0:0", "core", 11_000_000_000),
    **zone("intel-rapl:0:1", "dram", 31_000_000_000, 65712999613),
    **zone("intel-rapl:1", "package-1", 92_000_000_000),
    **zone("intel-rapl:1:0", "dram", 32_000_000_000, 65712999613),
}
# A laptop: platform and memory-mapped counters beside the package's own
LAPTOP = {
    **zone("intel-rapl:0", "package-0", 5_000_000),
    **zone("intel-rapl:0:0", "core", 2_000_000),
    **zone("intel-rapl:0:1", "uncore", 1_000_000),
    **zone("intel-rapl:1", "psys", 9_000_000),
    **zone("intel-rapl-mmio:0", "package-0", 5_000_100),
}
# Orin Nano 8 GB, JetPack 6.2 (L4T 36.4.3): hwmon1, labels on in1 to in3, shunts from in4 on
NANO_6 = chip(0, "pwmfan", pwm1=60) | chip(
    1, "ina3221", in1_label="VDD_IN", in1_input=5000, curr1_input=1000,
    in2_label="VDD_CPU_GPU_CV", in2_input=5000, curr2_input=400,
    in3_label="VDD_SOC", in3_input=5000, curr3_input=300,
    in4_input=5, in5_input=2, in6_input=1, in7_label="sum of shunt voltages", in7_input=8,
)  # fmt: skip
# The same module on JetPack 5.1 (L4T 35.6, kernel 5.10): another number, unused channels named NC
NANO_5 = chip(
    3, "ina3221", in1_label="VDD_IN", in1_input=5000, curr1_input=1000,
    in2_label="VDD_CPU_GPU_CV", in2_input=5000, curr2_input=400,
    in3_label="VDD_SOC", in3_input=5000, curr3_input=300,
    in7_label="sum of shunt voltages", in7_input=8, shunt1_resistor=5000,
)  # fmt: skip
# AGX Orin 64 GB, JetPack 5.1: no rail for the whole module, two chips
AGX_5 = chip(
    2, "ina3221", in1_label="VDD_GPU_SOC", in1_input=20000, curr1_input=100,
    in2_label="VDD_CPU_CV", in2_input=20000, curr2_input=50,
    in3_label="VIN_SYS_5V0", in3_input=5000, curr3_input=400,
) | chip(3, "ina3221", in1_label="NC", in1_input=0, in2_label="VDDQ_VDD2_1V8AO",
         in2_input=5000, curr2_input=100)  # fmt: skip


def write(root: Path, tree: dict[str, str]) -> Path:
    for name, text in tree.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def put(path: Path, value: int) -> None:
    """Change a file at once: nobody sees it half written, as in /sys."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(f"{value}\n")
    temporary.replace(path)


class Player:
    """Moves a tree on while something runs: ``move`` gets the seconds and calls so far."""

    def __init__(self, move: Callable[[float, int], None]) -> None:
        self.calls = 0
        self._move = move

    def inference(self) -> None:
        time.sleep(0.001)
        self.calls += 1

    @contextmanager
    def playing(self) -> Iterator[None]:
        done, start = threading.Event(), time.perf_counter()

        def play() -> None:
            while not done.is_set():
                self._move(time.perf_counter() - start, self.calls)
                done.wait(0.002)

        thread = threading.Thread(target=play)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


# What is found


def test_a_server_counts_its_packages_and_their_memory_once(tmp_path: Path) -> None:
    meter = find_meter(write(tmp_path, SERVER))
    assert isinstance(meter, EnergyCounters)
    assert meter.covers == ("package-0", "package-0 dram", "package-1", "package-1 dram")


def test_a_laptop_counts_neither_parts_nor_the_platform_nor_anything_twice(tmp_path: Path) -> None:
    meter = find_meter(write(tmp_path, LAPTOP))
    assert isinstance(meter, EnergyCounters)
    assert meter.covers == ("package-0",)


def test_memory_mapped_counters_serve_where_there_are_no_others(tmp_path: Path) -> None:
    meter = find_meter(write(tmp_path, zone("intel-rapl-mmio:0", "package-0", 7)))
    assert isinstance(meter, EnergyCounters) and meter.covers == ("package-0",)


@pytest.mark.parametrize(
    ("tree", "rails"),
    [
        (NANO_6, ("VDD_IN",)),
        (NANO_5, ("VDD_IN",)),
        (AGX_5, ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0")),
        (SERVER | NANO_6, ("VDD_IN",)),
    ],
)
def test_a_module_is_read_from_the_rails_that_make_it_up(
    tmp_path: Path, tree: dict[str, str], rails: tuple[str, ...]
) -> None:
    meter = find_meter(write(tmp_path, tree))
    assert isinstance(meter, PowerSensors) and meter.covers == rails


@pytest.mark.parametrize(
    ("tree", "reason"),
    [
        ({}, "there is no counter of energy in /sys/class/powercap, and no sensor"),
        (zone("intel-rapl:0", "psys", 5), "there is no counter"),
        (zone("dtpm:0", "package-0", 5), "there is no counter"),
        (
            zone("intel-rapl:0", "package-0", 5) | {f"{POWERCAP}/intel-rapl:0/energy_uj": "?\n"},
            "intel-rapl:0/energy_uj holds no number",
        ),
        (
            {f"{POWERCAP}/intel-rapl:0/name": "package-0\n"},
            "intel-rapl:0/energy_uj cannot be read (No such file or directory)",
        ),
        (
            zone("intel-rapl:0", "package-0", 5)
            | {f"{POWERCAP}/intel-rapl:0/max_energy_range_uj": "\n"},
            "does not say where it wraps",
        ),
        (
            chip(1, "ina3221", in1_label="VDD_FAN", in1_input=5000, curr1_input=20),
            "rails VDD_FAN are not known to add up to a module's power; there is no counter",
        ),
    ],
)
def test_where_nothing_is_measurable_it_is_said_why(
    tmp_path: Path, tree: dict[str, str], reason: str
) -> None:
    found = find_meter(write(tmp_path, tree))
    assert isinstance(found, NotMeasurable) and reason in found.reason


def test_a_counter_for_root_only_is_told_with_the_command_that_opens_it() -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to others
        root = write(Path(folder), SERVER)
        root.chmod(0o755)
        (root / POWERCAP / "intel-rapl:0/energy_uj").chmod(0)
        script = (
            "import os, sys; from pathlib import Path;"
            "from secateur.devices.energy import find_meter;"
            "os.geteuid() or os.setuid(65534);"  # root may read everything, so it asks as nobody
            "print(find_meter(Path(sys.argv[1])).reason)"
        )
        said = subprocess.run(
            [sys.executable, "-c", script, root], capture_output=True, text=True, check=True
        ).stdout
    path = "/sys/class/powercap/intel-rapl:0/energy_uj"
    assert said.strip() == f"{path} is for root only: sudo chmod a+r {path}, or run as root"


# What is counted


@given(st.integers(1, 10**12), st.data())
def test_a_counter_that_wraps_loses_nothing(wraps_at: int, data: st.DataObject) -> None:
    before = data.draw(st.integers(0, wraps_at - 1))
    spent = data.draw(st.integers(0, wraps_at - 1))
    assert growth(before, (before + spent) % wraps_at, wraps_at) == spent


def test_counters_add_up_over_zones_and_across_their_ends(tmp_path: Path) -> None:
    root = write(tmp_path, SERVER)
    put(root / POWERCAP / "intel-rapl:0:1/energy_uj", 65_712_000_000)
    meter = find_meter(root)
    assert isinstance(meter, EnergyCounters)

    def work() -> None:
        time.sleep(0.01)
        put(root / POWERCAP / "intel-rapl:0/energy_uj", 91_003_000_000)  # 3 J
        put(root / POWERCAP / "intel-rapl:0:0/energy_uj", 99_000_000_000)  # within the package
        put(root / POWERCAP / "intel-rapl:0:1/energy_uj", 500_387)  # 1.5 J, over the end
        put(root / POWERCAP / "intel-rapl:1/energy_uj", 92_000_250_000)  # 0.25 J

    spent = meter.spent_by(work)
    assert spent.joules == pytest.approx(3 + 1.5 + 0.25, abs=1e-5)
    assert 0.01 <= spent.seconds < 1


@given(
    st.lists(st.floats(0.001, 0.999), min_size=1, max_size=20, unique=True),
    st.floats(0, 50), st.floats(-5, 5),
)  # fmt: skip
def test_looks_at_a_steady_or_sloping_power_add_up(
    times: list[float], watts: float, slope: float
) -> None:
    looks = [(t, watts + slope * t) for t in sorted(times)]
    first, last = looks[0], looks[-1]
    held = first[1] * first[0] + last[1] * (1 - last[0])
    between = (last[0] - first[0]) * (first[1] + last[1]) / 2
    assert integral(looks, 0.0, 1.0) == pytest.approx(held + between, abs=1e-9)


def test_energy_of_a_call_from_counters_is_above_idle(tmp_path: Path) -> None:
    root = write(tmp_path, zone("intel-rapl:0", "package-0", 8_900_000, 9_000_000))
    counter = root / POWERCAP / "intel-rapl:0/energy_uj"

    def move(seconds: float, calls: int) -> None:  # 2 W, and 5 mJ a call; it wraps on the way
        put(counter, int(8.9e6 + 2e6 * seconds + 5e3 * calls) % 9_000_000)

    player, meter = Player(move), find_meter(root)
    assert isinstance(meter, EnergyCounters)
    with player.playing():
        found = measure_energy(player.inference, meter, EnergyProtocol(3, 0.3, 0.02))
    assert found.per_inference_mj == pytest.approx(5, rel=0.4)
    assert found.standard_error_mj > 0 and found.rounds == 3
    assert found.busy_w > found.idle_w > 0 and not found.within_noise
    assert 3 <= found.inferences <= player.calls


@pytest.mark.parametrize("tree", [NANO_5, NANO_6])
def test_energy_of_a_call_from_sensors_is_above_idle(tmp_path: Path, tree: dict[str, str]) -> None:
    root = write(tmp_path, tree)
    (current,) = root.glob("sys/class/hwmon/*/curr1_input")
    seen = [0, 0.0]

    def move(seconds: float, calls: int) -> None:
        busy, seen[0] = calls > seen[0], calls  # 5 V: 1 A idle, 3 A at work
        if busy:
            seen[1] = seconds
        put(current, 3000 if seconds - seen[1] < 0.02 and calls else 1000)

    player = Player(move)
    with player.playing():
        found = energy_of(player.inference, EnergyProtocol(3, 0.3, 0.06), root)
    assert found["meter"] == "INA3221 sensors" and found["covers"] == ("VDD_IN",)
    assert found["idle_w"] == pytest.approx(5, rel=0.15)
    assert found["busy_w"] == pytest.approx(15, rel=0.15)
    each = found["per_inference_mj"] * found["inferences"] / 3 / 0.3 / 1000  # watts above idle
    assert each == pytest.approx(10, rel=0.2)


class Scripted:
    """A meter that runs the work and says what it was told to."""

    name, covers = "a script", ("all",)

    def __init__(self, *spent: Spent) -> None:
        self._spent = list(spent)

    def spent_by(self, work: Callable[[], object]) -> Spent:
        work()
        return self._spent.pop(0)


def test_the_figure_is_the_rounds_mean_above_their_own_idle_and_its_error_their_scatter() -> None:
    calls: list[int] = []
    meter = Scripted(
        Spent(5, 1), Spent(40, 2), Spent(7, 1),  # idle 6 W: 28 J above it
        Spent(8, 1), Spent(48, 2), Spent(8, 1),  # idle 8 W: 32 J above it
    )  # fmt: skip
    once = EnergyProtocol(rounds=2, seconds=0, settle=0)  # one call to settle and one counted
    found = measure_energy(lambda: calls.append(1), meter, once)
    assert found.per_inference_mj == pytest.approx(30_000)
    assert found.standard_error_mj == pytest.approx(2_000)
    assert (found.idle_w, found.busy_w) == (7, 22)
    assert found.inferences == 2 and len(calls) == 4 and not found.within_noise


def test_a_figure_within_the_noise_is_said_to_be() -> None:
    meter = Scripted(
        Spent(5, 1), Spent(11, 2), Spent(5, 1),  # 1 J above idle
        Spent(5, 1), Spent(9.5, 2), Spent(5, 1),  # half a joule below it
    )  # fmt: skip
    found = measure_energy(lambda: None, meter, EnergyProtocol(2, 0, 0))
    assert found.within_noise
    assert "mJ per inference, which is within this meter's noise" in energy_line(found.to_json())


def test_counters_that_stand_still_or_go_away_are_no_figure(tmp_path: Path) -> None:
    root = write(tmp_path, zone("intel-rapl:0", "package-0", 12345))
    found = energy_of(lambda: time.sleep(0.001), QUICK, root)
    assert found == {"not_measurable": "powercap (RAPL) stands still while the machine works"}
    counter = root / POWERCAP / "intel-rapl:0/energy_uj"

    def last() -> None:
        time.sleep(0.001)
        counter.unlink(missing_ok=True)

    gone = energy_of(last, QUICK, root)
    assert "gave no number while it was measured" in gone["not_measurable"]


def test_sensors_that_stop_answering_are_no_figure(tmp_path: Path) -> None:
    root = write(tmp_path, NANO_6)
    meter = find_meter(root)
    for path in root.glob("sys/class/hwmon/hwmon1/curr*"):
        path.unlink()
    with pytest.raises(DeviceError, match="answered 0 times"):
        meter.spent_by(lambda: time.sleep(0.1))


# What is told


def test_a_bench_has_the_energy_or_the_reason(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, "bench", bundle)
    written = json.loads((bundle / "bench.json").read_text())["energy"]
    assert code == 0
    assert energy_line(written) in out
    here = find_meter()
    if isinstance(here, NotMeasurable):
        assert written == {"not_measurable": here.reason}
    else:
        assert written["covers"] == list(here.covers)


def test_a_figure_is_told_with_its_error_and_what_it_covers() -> None:
    found = {
        "per_inference_mj": 12.345, "standard_error_mj": 0.4321, "within_noise": False,
        "idle_w": 9.05, "busy_w": 24.1, "inferences": 900, "rounds": 5,
        "meter": "powercap (RAPL)", "covers": ("package-0", "package-0 dram"),
    }  # fmt: skip
    assert energy_line(found) == (
        "energy: 12.3 ± 0.43 mJ per inference above idle (standard error of 5 rounds; "
        "powercap (RAPL): package-0, package-0 dram; idle 9.05 W, busy 24.1 W)"
    )


def test_a_sensor_that_stands_at_one_power_shows_no_energy() -> None:
    rest = Spent(joules=9.25, seconds=1.0)
    work = Spent(joules=9.25 * (1 + 2e-16), seconds=1.0)  # what sums of the same readings differ by
    found = summarise_energy([Round(rest, work, 5)] * 2, "INA3221", ("VDD_IN",))
    assert found.per_inference_mj > 0 and found.standard_error_mj == 0
    assert found.within_noise
    more = Spent(joules=9.26, seconds=1.0)
    assert not summarise_energy([Round(rest, more, 5)] * 2, "INA3221", ("VDD_IN",)).within_noise
