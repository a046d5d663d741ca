"""The NVIDIA GPUs this process may use, asked of the driver's management library.

The host never loads torch, and must not start CUDA either: a process that has done so cannot be forked any
more. NVML changes nothing in this process and creates nothing on the device. It knows neither
`CUDA_VISIBLE_DEVICES`, which is applied here by CUDA's rules, nor what torch was built for, which its
`version.py` tells.
"""

import ctypes
import os
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import msgspec

__all__ = ["GPU", "unusable", "visible", "visible_gpus"]

MIN_CAPABILITY = 80
"""Ampere: the oldest with bfloat16, for which the kernels are compiled and tested."""
CUDA_EXTRA = "pip install 'asyncengine[cuda]'"


class GPU(msgspec.Struct, frozen=True):
    """One device, or one instance of a divided one."""

    uuid: str
    name: str
    capability: int
    """Compute capability, as 90 for 9.0."""
    memory: int
    """Bytes in all."""


def visible_gpus() -> list[GPU]:
    """The devices, in the order of the bus, under `CUDA_VISIBLE_DEVICES`; none where there is no driver."""
    return visible(_all_gpus(), os.environ)


def visible(gpus: Sequence[GPU], environment: Mapping[str, str]) -> list[GPU]:
    """Those that `CUDA_VISIBLE_DEVICES` leaves: numbers or beginnings of UUIDs, up to the first that
    names no device."""
    wanted = environment.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return list(gpus)
    found: list[GPU] = []
    for name in (part.strip() for part in wanted.split(",")):
        if re.fullmatch(r"\d+", name):
            matches = list(gpus[int(name) : int(name) + 1])
        else:
            matches = [gpu for gpu in gpus if name and gpu.uuid.startswith(name)]
        if len(matches) != 1 or matches[0] in found:
            break
        found += matches
    return found


def unusable(gpus: Sequence[GPU]) -> str | None:
    """Why this machine cannot serve from a GPU, as a sentence with a remedy; None where it can."""
    if not gpus:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        if hidden is not None:
            return f"no NVIDIA GPU is visible with CUDA_VISIBLE_DEVICES={hidden!r}"
        return "no NVIDIA GPU was found (NVML, the library of NVIDIA's driver, names none)"
    best = max(gpus, key=lambda gpu: gpu.capability)
    if best.capability < MIN_CAPABILITY:
        major, minor = divmod(best.capability, 10)
        return f"{best.name} has compute capability {major}.{minor}, and 8.0 (Ampere) is the least"
    missing = _missing_packages()
    return None if missing is None else f"{missing}; {CUDA_EXTRA}"


def _missing_packages() -> str | None:
    """What the worker needs of Python packages and is not there; neither is imported."""
    torch = find_spec("torch")
    if torch is None or find_spec("triton") is None:
        return f"{'torch' if torch is None else 'triton'} is not installed"
    for folder in torch.submodule_search_locations or ():
        version = Path(folder) / "version.py"
        if version.exists() and re.search(r"^cuda\b.*= None", version.read_text(), re.MULTILINE):
            return "the installed torch was built without CUDA"
    return None


def _all_gpus() -> list[GPU]:
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return []
    if nvml.nvmlInit_v2():
        return []
    try:
        count = ctypes.c_uint()
        if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
            return []
        return [gpu for index in range(count.value) for gpu in _gpus_of(nvml, index)]
    finally:
        nvml.nvmlShutdown()


class _Memory(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]


def _gpus_of(nvml: ctypes.CDLL, index: int) -> list[GPU]:
    """The device of that number, or the instances it is divided into; nothing if it cannot be asked."""
    device = ctypes.c_void_p()
    if nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(device)):
        return []
    major, minor = ctypes.c_int(), ctypes.c_int()
    if nvml.nvmlDeviceGetCudaComputeCapability(device, ctypes.byref(major), ctypes.byref(minor)):
        return []
    capability = 10 * major.value + minor.value
    divided, pending = ctypes.c_uint(), ctypes.c_uint()
    handles = [device]
    if not nvml.nvmlDeviceGetMigMode(device, ctypes.byref(divided), ctypes.byref(pending)) and divided.value:
        handles = _instances(nvml, device)
    return [gpu for handle in handles if (gpu := _gpu(nvml, handle, capability)) is not None]


def _instances(nvml: ctypes.CDLL, device: ctypes.c_void_p) -> list[ctypes.c_void_p]:
    most = ctypes.c_uint()
    if nvml.nvmlDeviceGetMaxMigDeviceCount(device, ctypes.byref(most)):
        return []
    found = []
    for index in range(most.value):
        handle = ctypes.c_void_p()
        if not nvml.nvmlDeviceGetMigDeviceHandleByIndex(device, ctypes.c_uint(index), ctypes.byref(handle)):
            found.append(handle)
    return found


def _gpu(nvml: ctypes.CDLL, handle: ctypes.c_void_p, capability: int) -> GPU | None:
    uuid, name, memory = ctypes.create_string_buffer(96), ctypes.create_string_buffer(96), _Memory()
    failed = (
        nvml.nvmlDeviceGetUUID(handle, uuid, ctypes.c_uint(96))
        or nvml.nvmlDeviceGetName(handle, name, ctypes.c_uint(96))
        or nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
    )
    return None if failed else GPU(uuid.value.decode(), name.value.decode(), capability, memory.total)
