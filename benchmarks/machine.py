"""The line above every table: a description of the machine."""

import os
import platform
from pathlib import Path

import torch


def describe() -> str:
    """Return the processor, cores, threads and versions in one line."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    amx = ", AMX" if any("amx_bf16" in line for line in lines) else ""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"{name}, {os.cpu_count()} cores{amx}, {torch.get_num_threads()} torch threads, {gpu}; "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )
