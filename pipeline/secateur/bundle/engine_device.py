"""Facts of this device, and whether an engine was built for it; travels inside other files.

Standard library only, Python 3.8: ``bundle/write.py`` puts this text into the stand-alone files.
"""

import collections
import ctypes
import hashlib
import os
import re
from pathlib import Path

SCHEMA_VERSION = 1
SPEED_ONLY = ("clocks_mhz", "power_mode")  # another one is slower than it could be, not wrong
PORTABLE = ("runtime", "tensorrt")  # all that an engine of tensorrt-rtx is bound to

Difference = collections.namedtuple("Difference", "field built here refuse")


def check_engine(engine, facts, files):
    """Compare engine.json's content with this device before the engine is deserialised.

    ``facts`` is ``device_facts(trt)`` here, ``files`` {name: sha256} of what lies here. Returns
    [Difference(field, built, here, refuse)]; an engine is opened only if none has ``refuse``.
    An engine of tensorrt-rtx is portable, so only its runtime and capabilities are compared.
    """
    if not isinstance(engine, dict) or engine.get("schema_version") != SCHEMA_VERSION:
        version = engine.get("schema_version") if isinstance(engine, dict) else None
        return [Difference("schema_version", version, SCHEMA_VERSION, True)]
    built = {part: engine.get(part) for part in ("device", "files", "options")}
    for part, value in built.items():
        if not isinstance(value, dict):
            return [Difference(part, value, "a table", True)]
    device, here = dict(built["device"]), dict(facts)
    wanted = built["options"].get("compute_capabilities") or []
    wanted = wanted if isinstance(wanted, list) else [wanted]
    if here.get("runtime") == "tensorrt_rtx" == device.get("runtime"):
        device, here = ({key: d.get(key) for key in PORTABLE} for d in (device, here))
        if wanted and facts.get("compute_capability") not in [None, *wanted]:
            device["compute_capability"] = wanted
            here["compute_capability"] = facts["compute_capability"]
    rows = [(name, device.get(name), here.get(name)) for name in sorted({*device, *here})]
    rows += [(name, built["files"].get(name), digest) for name, digest in sorted(files.items())]
    return [Difference(*row, row[0] not in SPEED_ONLY) for row in rows if row[1] != row[2]]


def device_facts(trt, root="/"):
    """What an engine depends on, of this device: {field: value, or None where it cannot be read}.

    ``root`` is where /proc, /sys, /etc and /var lie.
    """
    root, cuda = Path(root), cuda_facts()
    return {
        "runtime": trt.__name__,
        "tensorrt": trt.__version__,
        "cuda": cuda["cuda"],
        "compute_capability": cuda["compute_capability"],
        "gpu": cuda["gpu"],
        "multiprocessors": cuda["multiprocessors"],
        "module": jetson_module(root),
        "l4t": l4t_version(root),
        "power_mode": power_mode(root),
        "clocks_mhz": clock_limits(root),
    }


def cuda_facts():
    """Read the first GPU through the driver's own library; all None without one."""
    facts = dict.fromkeys(("cuda", "compute_capability", "gpu", "multiprocessors", "memory_free"))
    try:
        cuda = ctypes.CDLL("libcuda.so.1" if os.name == "posix" else "nvcuda.dll")
    except OSError:
        return facts
    number, device, context = ctypes.c_int(), ctypes.c_int(), ctypes.c_void_p()
    name, free, total = ctypes.create_string_buffer(256), ctypes.c_size_t(), ctypes.c_size_t()
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0):
        return facts

    def attribute(which):
        failed = cuda.cuDeviceGetAttribute(ctypes.byref(number), which, device)
        return None if failed else number.value

    if not cuda.cuDriverGetVersion(ctypes.byref(number)):
        facts["cuda"] = "%d.%d" % (number.value // 1000, number.value % 1000 // 10)
    if not cuda.cuDeviceGetName(name, len(name), device):
        facts["gpu"] = name.value.decode("utf-8", "replace")
    facts["compute_capability"] = "{}.{}".format(attribute(75), attribute(76))
    facts["multiprocessors"] = attribute(16)
    if attribute(18):  # integrated: the GPU's memory is the system's, and caches are given back
        facts["memory_free"] = available_memory(Path("/"))
    elif not (cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
              or cuda.cuCtxSetCurrent(context)
              or cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))):  # fmt: skip
        facts["memory_free"] = free.value
    return facts


def read_text(path):
    """A small text file without its trailing NUL and newline, or None."""
    try:
        return path.read_bytes().decode("utf-8", "replace").strip("\0\n ")
    except OSError:
        return None


def available_memory(root):
    """Bytes that new programs can have, or None."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", read_text(root / "proc/meminfo") or "")
    return int(found.group(1)) * 1024 if found else None


def jetson_module(root):
    """The module's part number (p3767-0003 …), else the board's name, else None."""
    entries = (read_text(root / "proc/device-tree/compatible") or "").split("\0")
    for entry in entries:
        found = re.search(r"\b(p37(?:01|67)-\d{4}|p3834-\d{4}|p366\d-\d{4}|p2888-\d{4})", entry)
        if found:
            return found.group(1)
    return read_text(root / "proc/device-tree/model")


def l4t_version(root):
    """The version of Jetson Linux (36.4.3 …), or None."""
    text = read_text(root / "etc/nv_tegra_release") or ""
    found = re.search(r"R(\d+) \(release\), REVISION: (\d+(?:\.\d+)*)", text)
    return "{}.{}".format(*found.groups()) if found else None


def power_mode(root):
    """{"id", "name"} of nvpmodel's present mode, named by this device's own table; or None."""
    found = re.search(r"pmode:(\d+)", read_text(root / "var/lib/nvpmodel/status") or "")
    if not found:
        return None
    number, table = int(found.group(1)), read_text(root / "etc/nvpmodel.conf") or ""
    names = dict(re.findall(r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)", table))
    return {"id": number, "name": names.get(str(number))}


def clock_limits(root):
    """{"gpu_min", "gpu_max", "cpu_min", "cpu_max"} in MHz; equal ones are held by jetson_clocks."""
    paths = {"cpu": (root / "sys/devices/system/cpu/cpufreq/policy0", "scaling_{}_freq", 1e3)}
    for folder in sorted((root / "sys/class/devfreq").glob("*")):
        if re.search(r"gpu$|gpu-gpc-0$|ga10b$|gv11b$|gb10b$", folder.name):
            paths["gpu"] = (folder, "{}_freq", 1e6)
    limits = {}
    for part, (folder, name, unit) in paths.items():
        for end in ("min", "max"):
            text = read_text(folder / name.format(end)) or ""
            limits[part + "_" + end] = round(int(text) / unit, 1) if text.isdigit() else None
    return limits if any(limits.values()) else None


def file_digest(path):
    """The SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
