"""Readers of device files and tool outputs, on samples written after each module's own format.

Samples are written by hand after public logs and NVIDIA's configuration files; each says which
module and JetPack it imitates. Values were chosen so that every one is told from the others.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from secateur.bundle import engine_device
from secateur.devices import nvpmodel, probe, tegrastats, telemetry, tree
from secateur.devices.target import load_target, target_names
from secateur.devices.telemetry import Clock, read_telemetry
from secateur.devices.version import in_series, parse_version

# Orin Nano 8 GB Super, JetPack 6.2 (L4T 36.4.3), 25 W; cut down, with the caps of
# nvpmodel_p3767_0003_super.conf
NANO_CONF = """\
# a comment may name sections: < POWER_MODEL ID=9 NAME=not_a_mode >
< PARAM TYPE=FILE NAME=CPU_ONLINE >
CORE_0 /sys/devices/system/cpu/cpu0/online
<PARAM TYPE=CLOCK NAME=EMC >
MAX_FREQ_KNEXT /sys/kernel/nvpmodel_clk_cap/emc

< POWER_MODEL ID=0 NAME=15W >
CPU_ONLINE CORE_0 1
CPU_ONLINE CORE_1 1
TPC_POWER_GATING TPC_PG_MASK 240
GPU_POWER_CONTROL_ENABLE GPU_PWR_CNTL_EN on
CPU_A78_0 MIN_FREQ 729600
CPU_A78_0 MAX_FREQ 1497600
CPU_A78_1 MAX_FREQ 1497600
GPU MIN_FREQ 0
GPU MAX_FREQ 612000000
EMC MAX_FREQ 2133000000

< POWER_MODEL ID=1 NAME=25W >
CPU_ONLINE CORE_0 1
CPU_ONLINE CORE_1 1
CPU_A78_0 MAX_FREQ 1344000
CPU_A78_1 MAX_FREQ 1344000
GPU MAX_FREQ 918000000
EMC MAX_FREQ 3199000000

< POWER_MODEL ID=2 NAME=MAXN_SUPER >
CPU_ONLINE CORE_0 1
CPU_ONLINE CORE_1 1
CPU_A78_0 MAX_FREQ -1
GPU MAX_FREQ -1
EMC MAX_FREQ -1

< PM_CONFIG DEFAULT=1 >
"""


def cpu(index: int, now: int, low: int, high: int) -> dict[str, str]:
    folder = f"sys/devices/system/cpu/cpu{index}"
    return {
        f"{folder}/online": "1\n",
        f"{folder}/cpufreq/scaling_cur_freq": f"{now}\n",
        f"{folder}/cpufreq/scaling_min_freq": f"{low}\n",
        f"{folder}/cpufreq/scaling_max_freq": f"{high}\n",
        f"{folder}/cpufreq/scaling_governor": "schedutil\n",
    }


def gpu(name: str, now: int, low: int, high: int) -> dict[str, str]:
    folder = f"sys/class/devfreq/{name}"
    return {
        f"{folder}/cur_freq": f"{now}\n",
        f"{folder}/min_freq": f"{low}\n",
        f"{folder}/max_freq": f"{high}\n",
        f"{folder}/governor": "nvhost_podgov\n",
    }


def chip(index: int, name: str, **values: str | int) -> dict[str, str]:
    folder = f"sys/class/hwmon/hwmon{index}"
    return {f"{folder}/name": f"{name}\n"} | {f"{folder}/{k}": f"{v}\n" for k, v in values.items()}


def zone(index: int, name: str, temperature: str) -> dict[str, str]:
    folder = f"sys/class/thermal/thermal_zone{index}"
    return {f"{folder}/type": f"{name}\n", f"{folder}/temp": f"{temperature}\n"}


def cooling(index: int, name: str, state: int) -> dict[str, str]:
    folder = f"sys/class/thermal/cooling_device{index}"
    return {f"{folder}/type": f"{name}\n", f"{folder}/cur_state": f"{state}\n"}


# Orin Nano 8 GB Super, JetPack 6.2, in 25 W and warm
NANO = {
    **chip(0, "pwmfan", pwm1=60),
    **chip(1, "ina3221", in1_label="VDD_IN", in1_input=4984, curr1_input=1856,
           in2_label="VDD_CPU_GPU_CV", in2_input=4976, curr2_input=600,
           in3_label="VDD_SOC", in3_input=4968, curr3_input=400,
           in4_input=1, in7_label="sum of shunt voltages", in7_input=7),
    **chip(3, "soctherm_oc", oc1_event_cnt=0, oc2_event_cnt=15, oc3_event_cnt=37),
    **zone(0, "cpu-thermal", "51250"), **zone(1, "gpu-thermal", "50031"),
    **zone(2, "cv0-thermal", "-256000"), **zone(8, "tj-thermal", "51500"),
    **cooling(0, "pwm-fan", 2), **cooling(1, "cpu-throttle-alert", 0),
    **cooling(2, "gpu-throttle-alert", 0), **cooling(3, "cpufreq-cpu0", 0),
    **cooling(10, "devfreq-17000000.gpu", 0),
    **gpu("17000000.gpu", 612000000, 306000000, 918000000),
    **cpu(0, 1344000, 729600, 1344000), **cpu(1, 960000, 729600, 1344000),
    "sys/devices/system/cpu/cpu5/online": "0\n",
    "var/lib/nvpmodel/status": "pmode:0001 fmode:quiet\n",
    "etc/nvpmodel.conf": NANO_CONF,
}  # fmt: skip

# AGX Orin 64 GB, JetPack 5.1 (kernel 5.10: the GPU is 17000000.ga10b), jetson_clocks, too hot
AGX = {
    **chip(2, "ina3221", in1_label="VDD_GPU_SOC", in1_input=19968, curr1_input=1000,
           in2_label="VDD_CPU_CV", in2_input=20000, curr2_input=500,
           in3_label="VIN_SYS_5V0", in3_input=5000, curr3_input=900),
    **chip(3, "ina3221", in1_label="NC", in1_input=0,
           in2_label="VDDQ_VDD2_1V8AO", in2_input=5000, curr2_input=100),
    **zone(0, "CPU-therm", "98000"),
    **cooling(4, "gpu-throttle-alert", 1), **cooling(5, "cpufreq-cpu4", 3),
    **gpu("17000000.ga10b", 1300500000, 1300500000, 1300500000),
    **cpu(0, 2201600, 2201600, 2201600),
    "var/lib/nvpmodel/status": "pmode:0000\n",
}  # fmt: skip

# Thor T5000, JetPack 7.1 (L4T 38.4): GPU idle and without power, so its sensor answers nothing
THOR = {
    **chip(5, "ina3221", in1_label="VDD_GPU", in1_input=12040, curr1_input=640,
           in2_label="VDD_CPU_SOC_MSS", in2_input=12040, curr2_input=960,
           in3_label="VIN_SYS_5V0", in3_input=5088, curr3_input=1740),
    **chip(6, "ina238", power1_input=26686000),
    **zone(0, "tj-thermal", "55125"), **zone(1, "gpu-thermal", ""),
    **zone(10, "soc345-thermal", "53700"),
    **gpu("gpu-gpc-0", 1575000000, 315000000, 1575000000),
    **gpu("gpu-nvd-0", 1692000000, 315000000, 1692000000),
    **cooling(0, "cpu-throttle-alert", 0),
}  # fmt: skip


def planted(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_orin_nano(tmp_path: Path) -> None:
    read = read_telemetry(planted(tmp_path, NANO))
    assert read.rails_w == pytest.approx(
        {"VDD_IN": 9.250304, "VDD_CPU_GPU_CV": 2.9856, "VDD_SOC": 1.9872}  # no shunt voltages
    )
    assert read.module and read.module.rails == ("VDD_IN",)
    assert read.temperatures_c == {"cpu": 51.25, "gpu": 50.031, "tj": 51.5}  # cv0 is off
    assert read.hottest_c == 51.5
    assert read.gpu == Clock(612, 306, 918, "nvhost_podgov") and read.gpu.locked is False
    assert read.cpus[1] == Clock(960, 729.6, 1344, "schedutil")
    assert read.cpus_offline == (5,)
    assert read.throttling.now is False  # a fan that turns is no throttling
    assert (read.throttling.under_voltage, read.throttling.average_over_current,
            read.throttling.instant_over_current) == (0, 15, 37)  # fmt: skip
    assert read.mode_id == 1 and read.mode and read.mode.name == "25W"
    assert read.mode_is_applied is True


# The same on JetPack 6 (kernel 5.15) and 7 (6.8): small letters, and the GPU has another name
AGX_6 = {name.replace("17000000.ga10b", "17000000.gpu"): text.replace("CPU-therm", "cpu-thermal")
         for name, text in AGX.items()}  # fmt: skip


@pytest.mark.parametrize("files", [AGX, AGX_6], ids=["jetpack 5", "jetpack 6 and 7"])
def test_agx_orin_without_a_rail_for_the_whole(tmp_path: Path, files: dict[str, str]) -> None:
    read = read_telemetry(planted(tmp_path, files))
    assert read.gpu == Clock(1300.5, 1300.5, 1300.5, "nvhost_podgov") and read.hottest_c == 98
    assert read.module
    assert read.module.watts == pytest.approx(19.968 + 10 + 4.5)
    assert "VDDQ_VDD2_1V8AO" not in read.module.rails and "NC" not in read.rails_w
    assert read.gpu and read.gpu.locked is True
    assert read.throttling.now is True
    assert read.throttling.alerts == ("gpu-throttle-alert",)
    assert read.throttling.cooling == ("cpufreq-cpu4",)
    assert read.throttling.under_voltage is None  # no counter, so not "none happened"
    assert read.mode_id == 0 and read.mode is None  # no configuration, so no name is guessed
    assert read.mode_is_applied is None


def test_thor_with_its_gpu_asleep(tmp_path: Path) -> None:
    read = read_telemetry(planted(tmp_path, THOR))
    assert read.rails_w["ina238"] == pytest.approx(26.686)  # the board's input, carrier included
    assert read.module and read.module.watts == pytest.approx(7.7056 + 11.5584 + 8.85312)
    assert read.temperatures_c == {"tj": 55.125, "soc345": 53.7}
    assert read.gpu and read.gpu.max_mhz == 1575  # gpc, not the video engines' nvd


def test_an_ordinary_machine_says_unknown(tmp_path: Path) -> None:
    read = read_telemetry(planted(tmp_path, cpu(0, 2000000, 400000, 3500000)))
    assert read.module is None and read.gpu is None and read.mode is None
    assert read.throttling.now is None and read.hottest_c is None and read.rails_w == {}
    empty = read_telemetry(tmp_path / "absent")
    assert empty.cpus == {}


@pytest.mark.parametrize("files", [NANO, AGX, AGX_6, THOR], ids=["nano", "agx", "agx6", "thor"])
def test_a_bundles_own_reader_says_the_same(tmp_path: Path, files: dict[str, str]) -> None:
    """`build_engine.py` stands alone on the device, with a copy of what is known of it here."""
    read, limits = read_telemetry(planted(tmp_path, files)), engine_device.clock_limits(tmp_path)
    assert read.gpu and limits
    assert (limits["gpu_min"], limits["gpu_max"]) == (read.gpu.min_mhz, read.gpu.max_mhz)
    mode = engine_device.power_mode(tmp_path) or {"id": None, "name": None}
    assert mode == {"id": read.mode_id, "name": read.mode.name if read.mode else None}


def test_a_mode_that_was_set_but_not_applied_is_found(tmp_path: Path) -> None:
    # seen on Orin Nano: after a restart the status says 25 W while the clocks are MAXN_SUPER's
    unapplied = NANO | gpu("17000000.gpu", 1020000000, 306000000, 1020000000)
    assert read_telemetry(planted(tmp_path, unapplied)).mode_is_applied is False
    in_maxn = unapplied | {"var/lib/nvpmodel/status": "pmode:0002\n"}
    assert read_telemetry(planted(tmp_path, in_maxn)).mode_is_applied is None  # it caps nothing


def test_the_same_is_read_over_a_shell(tmp_path: Path) -> None:
    root = planted(tmp_path, NANO)
    command = tree.collect_command(f"{root}{pattern}" for pattern in telemetry.PATTERNS)
    output = subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, check=True
    ).stdout
    brought = tree.parse_collected(output.replace(str(root), ""))
    assert telemetry.parse_telemetry(brought) == read_telemetry(root)


def test_a_reading_is_json(tmp_path: Path) -> None:
    row = json.loads(json.dumps(read_telemetry(planted(tmp_path, NANO)).to_json()))
    assert row["hottest_c"] == 51.5 and row["throttled"] is False
    assert row["module"]["watts"] == pytest.approx(9.250304)


def test_nothing_outside_the_folder_or_too_large_is_read(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "big").write_bytes(b"7" * 10_000_000)
    assert len(tree.read_text(tmp_path / "etc" / "big") or "") <= 256 * 1024
    assert tree.read_text(tmp_path / "etc") is None
    assert tree.read_text(Path("a\0b")) is None


# --- tegrastats ---------------------------------------------------------------------------------

TEGRASTATS = {
    # Orin NX 16 GB, JetPack 5.1 (L4T 35)
    "nx, jetpack 5": "06-14-2023 09:21:33 RAM 3347/15523MB (lfb 896x4MB) SWAP 0/7761MB (cached 0MB)"
    " CPU [21%@1190,19%@1190,off,off] EMC_FREQ 13%@2133 GR3D_FREQ 61%@[612] VIC_FREQ off APE 174"
    " CV0@-256C CPU@49.156C Tboard@36C GPU@48.5C SOC2@47.25C"
    " VDD_IN 5336mW/4970mW VDD_CPU_GPU_CV 2617mW/2336mW VDD_SOC 1478mW/1318mW",
    # Orin Nano 8 GB Super, JetPack 6.2 (L4T 36.4)
    "nano, jetpack 6": "02-03-2025 18:00:01 RAM 2840/7620MB (lfb 2x4MB) SWAP 12/3810MB (cached 1MB)"
    " CPU [25%@1344,0%@729] EMC_FREQ 3%@3199 GR3D_FREQ 99%@[1015] NVDEC off APE 200"
    " cpu@50.1C soc2@49.0C gpu@51.2C tj@51.2C cv1@-256C"
    " VDD_IN 9250mW/9100mW VDD_CPU_GPU_CV 4617mW/4336mW VDD_SOC 1978mW/1918mW",
    # Orin NX 16 GB, JetPack 6.2, not as root: no memory clock, no GPU clock, cores switched off
    "nx, jetpack 6": "07-16-2026 13:03:45 RAM 4120/15656MB (lfb 8x4MB) SWAP 3/7828MB (cached 1MB)"
    " CPU [61%@1984,7%@1984,3%@729,0%@729,off,off,off,off] GR3D_FREQ 37% cv0@47.1C cpu@52.3C"
    " soc2@45.5C soc0@48.2C cv1@47.9C gpu@50C tj@52.4C soc1@46.1C cv2@44.4C"
    " VDD_IN 7956mW/7312mW VDD_CPU_GPU_CV 2363mW/2001mW VDD_SOC 2506mW/2411mW",
    # AGX Orin 64 GB, JetPack 6 (two GPCs)
    "agx, jetpack 6": "RAM 8181/62841MB (lfb 10x4MB) SWAP 0/31421MB CPU [1%@2201,100%@2201]"
    " EMC_FREQ 0%@3199 GR3D_FREQ 0%@[0,0] gpu@-256C tj@45.7C"
    " VDD_GPU_SOC 2375mW/2400mW VDD_CPU_CV 395mW/400mW VIN_SYS_5V0 4022mW/4000mW",
    # Thor T5000, JetPack 7: neither EMC_FREQ nor GR3D_FREQ; three figures a rail also occur
    "thor, jetpack 7": "07-31-2026 14:45:55 RAM 86905/125772MB (lfb 368x4MB)"
    " CPU [12%@972,10%@972,off,33%@1890] cpu@39.812C tj@39.906C soc012@38.812C gpu@39.906C"
    " VDD_GPU 3561mW/3571mW/9000mW VDD_CPU_SOC_MSS 7910mW/7911mW/9000mW VIN_SYS_5V0 7620mW/7620mW"
    " VIN 26686mW/26687mW",
    # Jetson Nano, JetPack 4: no unit, one clock for all cores
    "nano, jetpack 4": "RAM 1903/3964MB (lfb 2x4MB) CPU [18%,off,6%]@1479 GR3D_FREQ 5%"
    " PLL@40C thermal@41.25C POM_5V_IN 5336/4970 POM_5V_GPU 40/36",
}


def said(name: str) -> tegrastats.Sample:
    sample = tegrastats.parse_line(TEGRASTATS[name])
    assert sample is not None
    return sample


def test_tegrastats_of_jetpack_5() -> None:
    line = said("nx, jetpack 5")
    assert line.time == "06-14-2023 09:21:33"
    assert (line.ram_used_mb, line.ram_total_mb, line.swap_used_mb) == (3347, 15523, 0)
    assert [(core.percent, core.mhz) for core in line.cores] == [
        (21, 1190), (19, 1190), (None, None), (None, None),
    ]  # fmt: skip
    assert (line.emc_percent, line.emc_mhz) == (13, 2133)
    assert (line.gpu_percent, line.gpu_mhz) == (61, 612)
    assert line.temperatures_c == {"cpu": 49.156, "tboard": 36, "gpu": 48.5, "soc2": 47.25}
    assert line.rails["VDD_IN"] == tegrastats.Rail(5.336, 4.97)
    assert set(line.rails) == {"VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"}  # APE is a clock


def test_tegrastats_of_jetpack_6() -> None:
    nano, nx, agx = (said(f"{name}, jetpack 6") for name in ("nano", "nx", "agx"))
    assert (nx.gpu_percent, nx.gpu_mhz, nx.emc_percent, nx.emc_mhz) == (37, None, None, None)
    assert [core.mhz for core in nx.cores] == [1984, 1984, 729, 729, None, None, None, None]
    assert nx.rails["VDD_CPU_GPU_CV"] == tegrastats.Rail(2.363, 2.001) and nx.ram_total_mb == 15656
    assert (nx.temperatures_c["tj"], nx.temperatures_c["gpu"], len(nx.temperatures_c)) == (
        52.4, 50, 9,
    )  # fmt: skip
    assert (nano.gpu_percent, nano.gpu_mhz) == (99, 1015) and nano.temperatures_c["tj"] == 51.2
    assert "cv1" not in nano.temperatures_c
    assert agx.time is None and (agx.gpu_percent, agx.gpu_mhz) == (0, None)  # off: no clock
    power = telemetry.module_power({name: rail.watts for name, rail in agx.rails.items()})
    assert power and power.watts == pytest.approx(2.375 + 0.395 + 4.022)


def test_tegrastats_of_jetpack_7_on_thor() -> None:
    thor = said("thor, jetpack 7")
    assert thor.gpu_percent is None and thor.emc_percent is None and len(thor.cores) == 4
    assert thor.rails["VDD_GPU"] == tegrastats.Rail(3.561, 3.571)
    power = telemetry.module_power({name: rail.watts for name, rail in thor.rails.items()})
    assert power and power.watts == pytest.approx(3.561 + 7.91 + 7.62)  # not VIN, the board's


def test_tegrastats_of_jetpack_4() -> None:
    nano = said("nano, jetpack 4")
    assert [(core.percent, core.mhz) for core in nano.cores] == [
        (18, 1479),
        (None, None),
        (6, 1479),
    ]
    assert nano.rails["POM_5V_GPU"] == tegrastats.Rail(0.04, 0.036)


def test_a_log_keeps_its_good_lines() -> None:
    log = "\n".join(["tegrastats: starting", *TEGRASTATS.values(), "", "VDD_IN", "\0\0"])
    assert len(tegrastats.parse_lines(log)) == len(TEGRASTATS)


# --- nvpmodel -----------------------------------------------------------------------------------


def test_modes_are_read_with_their_caps() -> None:
    modes = nvpmodel.parse_config(NANO_CONF)
    assert [(mode.id, mode.name) for mode in modes.modes] == [
        (0, "15W"), (1, "25W"), (2, "MAXN_SUPER"),
    ]  # fmt: skip
    assert modes.default_id == 1
    assert modes.modes[0] == nvpmodel.Mode(0, "15W", 2, 1497.6, 612, 2133, 240)
    maxn = modes.modes[2]
    assert (maxn.cpu_max_mhz, maxn.gpu_max_mhz, maxn.emc_max_mhz) == (None, None, None)


def test_modes_agree_with_the_profile() -> None:
    profile = load_target("jetson-orin-nano-8gb")
    for mode in nvpmodel.parse_config(NANO_CONF).modes:
        known = profile.power_mode(mode.name)
        assert known is not None
        assert (known.gpu_mhz, known.emc_mhz, known.cpu_mhz) == (
            mode.gpu_max_mhz, mode.emc_max_mhz, mode.cpu_max_mhz,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("NV Power Mode: MAXN_SUPER\n2\n", ("MAXN_SUPER", 2)),
        ("NVPM WARN: fan mode is not set!\nNV Power Mode: MODE_30W\n2\n", ("MODE_30W", 2)),
        ("NV Fan Mode:quiet\nNV Power Mode: 15W\n", ("15W", None)),
        ("NV Power Mode: \n", (None, None)),
        ("sh: nvpmodel: command not found\n", (None, None)),
    ],
)
def test_the_query(text: str, expected: tuple[str | None, int | None]) -> None:
    assert nvpmodel.parse_query(text) == expected


def test_the_status() -> None:
    assert nvpmodel.parse_status("pmode:0002 fmode:quiet") == 2
    assert nvpmodel.parse_status("pmode:0000") == 0
    assert nvpmodel.parse_status("fmode:quiet") is None


# --- probe --------------------------------------------------------------------------------------

CPUINFO_A78AE = "".join(
    f"processor\t: {index}\nBogoMIPS\t: 62.50\nFeatures\t: fp asimd evtstrm aes pmull sha1 sha2"
    " crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp uscat ilrcpc flagm paca pacg\n"
    "CPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x0\nCPU part\t: 0xd42\n\n"
    for index in range(6)
)
# Orin Nano Developer Kit Super, JetPack 6.2.2
NANO_FILES = {
    "/proc/device-tree/model":
        "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
    "/proc/device-tree/compatible":
        "nvidia,p3768-0000+p3767-0005-super\0nvidia,p3767-0005\0nvidia,tegra234\0",
    "/etc/nv_tegra_release": "# R36 (release), REVISION: 5.0, GCID: 43688277, BOARD: generic, "
        "EABI: aarch64, DATE: Fri Jan 16 03:50:45 UTC 2026\n# KERNEL_VARIANT: oot\n",
    "/usr/local/cuda/version.json": '{"cuda": {"name": "CUDA SDK", "version": "12.6.11"}}',
    "/var/lib/nvpmodel/status": "pmode:0001",
    "/proc/meminfo": "MemTotal:        7803564 kB\nMemFree:          300000 kB\n"
        "MemAvailable:    5011328 kB\nHugePages_Total:       0\n",
    "/proc/cpuinfo": CPUINFO_A78AE,
}  # fmt: skip
NANO_OUTPUTS = {
    "uname": "aarch64\n",
    "dpkg": """\
Desired=Unknown/Install/Remove/Purge/Hold
||/ Name                     Version                       Architecture Description
+++-========================-=============================-============-===========
ii  cuda-cudart-12-6         12.6.68-1                     arm64        CUDA Runtime
ii  libnvinfer-bin           10.3.0.30-1+cuda12.5          arm64        TensorRT binaries
ii  libnvinfer10             10.3.0.30-1+cuda12.5          arm64        TensorRT runtime
rc  libnvinfer8              8.6.2.3-1+cuda12.2            arm64        TensorRT runtime
hi  nvidia-jetpack           6.2.2+b24                     arm64        NVIDIA Jetpack Meta Package
ii  nvidia-l4t-core          36.5.0-20260115194252         arm64        NVIDIA Core Package
ii  python3-libnvinfer       10.3.0.30-1+cuda12.5          arm64        Python 3 bindings
ii  zlib1g:arm64             1:1.2.11.dfsg-2ubuntu9.2      arm64        compression library
""",
    "nvpmodel": "NV Power Mode: 25W\n1\n",
    "nvidia-smi": "Orin (nvgpu), [N/A], 540.4.0, [N/A], [N/A]\n",
}

# AGX Thor Developer Kit, JetPack 7.2.1
THOR_FILES = {
    "/proc/device-tree/model": "NVIDIA Jetson AGX Thor Developer Kit\0",
    "/proc/device-tree/compatible":
        "nvidia,p4071-0000+p3834-0008\0nvidia,p3834-0008\0nvidia,tegra264",
    "/etc/nv_tegra_release": "# R39 (release), REVISION: 2.1, GCID: 46758480, BOARD: generic, "
        "EABI: aarch64, DATE: Fri Aug 7 05:54:22 AM UTC 2026",
    "/proc/cpuinfo": "processor : 0\nFeatures : fp asimd fphp asimdhp asimddp sve sve2 i8mm bf16\n"
        "CPU implementer : 0x41\nCPU part : 0xd83\n",
}  # fmt: skip


@pytest.mark.parametrize("files", [NANO_FILES, THOR_FILES], ids=["nano", "thor"])
def test_a_bundles_own_reader_knows_the_same_module(tmp_path: Path, files: dict[str, str]) -> None:
    root = planted(tmp_path, {name.removeprefix("/"): text for name, text in files.items()})
    facts = probe.parse_probe(files, {})
    told = (engine_device.jetson_module(root), engine_device.l4t_version(root))
    assert told == (facts.module, facts.l4t)


def test_orin_nano_is_recognised() -> None:
    facts = probe.parse_probe(NANO_FILES, NANO_OUTPUTS)
    assert facts == probe.DeviceFacts(
        arch="aarch64",
        model="NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
        module="p3767-0005",
        super_mode=True,
        l4t="36.5.0",
        jetpack="6.2.2",
        tensorrt="10.3.0.30",  # libnvinfer8 was removed
        tensorrt_python="10.3.0.30",
        cuda="12.6.11",  # not the 12.5 that TensorRT was built against
        power_mode="25W",
        power_mode_id=1,
        memory_total=7803564 * 1024,
        memory_available=5011328 * 1024,
        cpu=probe.CpuFacts("Cortex-A78AE", 6, frozenset({"fp16", "dotprod"})),
        gpus=(probe.GpuFacts("Orin (nvgpu)", None, "540.4.0", None, None),),
    )
    targets = [load_target(name) for name in target_names()]
    target = probe.target_of(facts, targets)
    assert target and target.name == "jetson-orin-nano-8gb"
    assert target.cpu and facts.cpu and set(target.cpu.isa) == facts.cpu.isa


def test_thor_is_recognised_and_what_it_does_not_say_is_unknown() -> None:
    facts = probe.parse_probe(THOR_FILES, {"nvidia-smi": "NVIDIA Thor, 11.0, 595.78, [N/A], [N/A]"})
    assert (facts.module, facts.l4t, facts.super_mode) == ("p3834-0008", "39.2.1", False)
    assert facts.cpu and facts.cpu.name == "Neoverse-V3AE"
    assert facts.cpu.isa == {"fp16", "dotprod", "i8mm", "bf16", "sve", "sve2"}
    assert facts.gpus[0].compute_capability == "11.0"
    assert facts.tensorrt is None and facts.cuda is None and facts.memory_total is None
    target = probe.target_of(facts, [load_target(name) for name in target_names()])
    assert target and target.name == "jetson-thor-t5000"


# Orin NX 16 GB, JetPack 6.2; AGX Orin 64 GB, JetPack 7.2; Orin Nano 8 GB, JetPack 7.2.1
ORINS = {
    "jetson-orin-nx-16gb": (
        "NVIDIA Jetson Orin NX Engineering Reference Developer Kit",
        "nvidia,p3768-0000+p3767-0000\0nvidia,p3767-0000\0nvidia,tegra234",
        "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed "
        "Jan  8 01:49:37 UTC 2025\n# KERNEL_VARIANT: oot",
        ("10.3.0.30-1+cuda12.5", "cuda-cudart-12-6", "12.6.68-1"), "NV Power Mode: 15W\n2\n",
        ("36.4.3", "10.3.0.30", "12.6.68", "15W", 2, False),
    ),
    "jetson-agx-orin-64gb": (
        "NVIDIA Jetson AGX Orin Developer Kit",
        "nvidia,p3737-0000+p3701-0005\0nvidia,p3701-0005\0nvidia,tegra234",
        "# R39 (release), REVISION: 2.0, GCID: 45755727, BOARD: generic, EABI: aarch64, DATE: Mon "
        "Jun  1 09:28:48 PM UTC 2026\n# KERNEL_VARIANT: oot\nTARGET_USERSPACE_LIB_DIR=nvidia",
        ("10.16.1.11-1+cuda13.2", "cuda-cudart-13-2", "13.2.51-1"), "NV Power Mode: MAXN\n0\n",
        ("39.2.0", "10.16.1.11", "13.2.51", "MAXN", 0, False),
    ),
    "jetson-orin-nano-8gb": (
        "NVIDIA Jetson Orin Nano Developer Kit Super",
        "nvidia,p3768-0000+p3767-0005-super\0nvidia,p3767-0005\0nvidia,tegra234",
        "# R39 (release), REVISION: 2.1, GCID: 46758480, BOARD: generic, EABI: aarch64, DATE: Fri "
        "Aug 7 05:54:22 AM UTC 2026",
        ("10.16.1.11-1+cuda13.2", "cuda-cudart-13-2", "13.2.51-1"), "",
        ("39.2.1", "10.16.1.11", "13.2.51", None, None, True),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ORINS)
def test_orins_of_jetpack_6_and_7_are_recognised(name: str) -> None:
    model, compatible, release, (tensorrt, cudart, cuda), mode, wanted = ORINS[name]
    packages = (("libnvinfer10", tensorrt), ("python3-libnvinfer", tensorrt), (cudart, cuda))
    facts = probe.parse_probe(
        {probe.MODEL: model, probe.COMPATIBLE: compatible, probe.RELEASE: release},
        {"uname": "aarch64\n", "nvpmodel": mode,
         "dpkg": "".join(f"ii  {name} {version} arm64 NVIDIA's\n" for name, version in packages)},
    )  # fmt: skip
    assert (facts.l4t, facts.tensorrt, facts.cuda, facts.power_mode, facts.power_mode_id,
            facts.super_mode) == wanted  # fmt: skip
    assert facts.tensorrt_python == facts.tensorrt and facts.model == model
    target = probe.target_of(facts, map(load_target, target_names()))
    assert target is not None and target.name == name
    stack = target.stack(facts.l4t or "")  # 39.2.1 is not in the profile, which says so
    assert (stack is None) == (facts.l4t == "39.2.1")
    assert stack is None or in_series(
        parse_version(facts.tensorrt or "") or (), parse_version(stack.tensorrt) or ()
    )


@pytest.mark.parametrize(
    ("part", "target"),
    [
        ("p3737-0000+p3701-0005", "jetson-agx-orin-64gb"),
        ("p3768-0000+p3767-0000-super", "jetson-orin-nx-16gb"),
        ("p3737-0000+p3701-0004", None),  # AGX Orin 32 GB: another module
        ("p3509-0000+p3668-0000", None),  # Xavier NX
    ],
)
def test_the_module_says_the_target(part: str, target: str | None) -> None:
    facts = probe.parse_probe({probe.COMPATIBLE: f"nvidia,{part}\0nvidia,tegra234\0"}, {})
    found = probe.target_of(facts, [load_target(name) for name in target_names()])
    assert (found and found.name) == target


PC_CPUINFO = """\
processor : 0
model name : AMD EPYC 7763
flags : avx2 fma
processor : 1
model name : AMD EPYC 7763
flags : avx2 avx512f
"""
PC_GPUS = """\
NVIDIA GeForce RTX 4070, 8.9, 555.42, 12282, 11800
NVIDIA RTX A2000, 8.6, 555.42, 6138, 6000.5
"""


def test_a_pc_with_two_gpus() -> None:
    facts = probe.parse_probe({"/proc/cpuinfo": PC_CPUINFO}, {"nvidia-smi": PC_GPUS})
    assert [gpu.compute_capability for gpu in facts.gpus] == ["8.9", "8.6"]
    assert facts.gpus[1].free_mb == 6000.5
    assert facts.cpu == probe.CpuFacts("AMD EPYC 7763", 2, frozenset({"avx2"}))
    assert facts.module is None and facts.super_mode is None and facts.l4t is None
    assert probe.target_of(facts, [load_target(name) for name in target_names()]) is None


def test_two_versions_side_by_side_are_not_guessed_between() -> None:
    line = "ii  {} {} arm64 x\n"
    both = line.format("libnvinfer8", "8.6.2.3-1") + line.format("libnvinfer10", "10.3.0.30-1")
    cudas = line.format("cuda-cudart-12-6", "12.6.68-1") + line.format(
        "cuda-cudart-13-0", "13.0.48"
    )
    facts = probe.parse_probe({}, {"dpkg": both + cudas})
    assert facts.tensorrt is None and facts.cuda is None
    one = probe.parse_probe({}, {"dpkg": line.format("cuda-cudart-13-2", "13.2.5-1")})
    assert one.cuda == "13.2.5"


def test_the_release_may_come_from_the_package() -> None:
    facts = probe.parse_probe({}, {"dpkg": NANO_OUTPUTS["dpkg"]})
    assert facts.l4t == "36.5.0"


def test_errors_of_tools_are_not_read_as_answers() -> None:
    facts = probe.parse_probe({}, {
        "nvidia-smi": "NVIDIA-SMI has failed because it couldn't communicate, with, the, driver",
        "nvpmodel": "NVPM ERROR: failed to read PARAM GPU", "dpkg": "dpkg: error: no packages",
        "uname": "",
    })  # fmt: skip
    assert facts.power_mode is None and facts.arch is None and facts.tensorrt is None
    assert all(gpu.compute_capability is None for gpu in facts.gpus)


# --- whatever comes -----------------------------------------------------------------------------

# bytes first, as from a device; then texts that look like the formats
ANY = st.binary(max_size=80).map(lambda raw: raw.decode("utf-8", "replace")) | st.text(
    alphabet="<>=:@%/[],.-\n\0 0123456789mWCRAMGPUVDDpmodeNVINAE²٣", max_size=80
)
PATHS = st.sampled_from(
    sorted({"/" + name for tree_ in (NANO, AGX, THOR) for name in tree_} | set(NANO_FILES))
)


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(PATHS | ANY, ANY, max_size=40), st.dictionaries(
    st.sampled_from(sorted(probe.COMMANDS)), ANY))  # fmt: skip
def test_no_text_makes_a_reader_fail(files: dict[str, str], outputs: dict[str, str]) -> None:
    read = telemetry.parse_telemetry(files)
    assert read.hottest_c is None or -60 < read.hottest_c < 200
    json.dumps(read.to_json(), allow_nan=False)
    probe.parse_probe(files, outputs)


@settings(deadline=None)
@given(ANY)
def test_no_line_makes_a_reader_fail(text: str) -> None:
    tegrastats.parse_lines(text)
    nvpmodel.parse_config(text)
    nvpmodel.parse_query(text)
    nvpmodel.parse_status(text)
    tree.parse_collected(text)
    tree.number(text)


@settings(deadline=None)
@given(st.sampled_from(sorted(TEGRASTATS)), st.integers(0, 400), ANY)
def test_a_line_cut_and_spoiled_anywhere_is_still_read(name: str, at: int, noise: str) -> None:
    line = TEGRASTATS[name]
    tegrastats.parse_line(line[:at] + noise + line[at:])
    cut = tegrastats.parse_line(line[:at])
    whole = said(name)
    if cut is not None:  # what a cut line says besides its last word, the whole line says too
        words = set(cut.rails) - {line[:at].split()[-2] if len(line[:at].split()) > 1 else ""}
        assert all(whole.rails[word] == cut.rails[word] for word in words)


def test_huge_numbers_and_deep_nesting_are_unknown() -> None:
    assert tree.number("9" * 5000) is None and tree.number("1e999") is None
    assert tree.number("nan") is None and tree.number("٣") is None
    assert probe.parse_cuda("[" * 100_000) is None and probe.parse_cuda('{"cuda": 3}') is None
    assert tegrastats.parse_line("VDD_IN " + "9" * 5000 + "mW/1mW") is None
