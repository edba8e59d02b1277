"""Print the extra that fits the installed NVIDIA driver: cuda12, cuda13, or nothing."""

import ctypes
import sys


def driver_cuda_version() -> int:
    """The newest CUDA version that the driver runs, as 1000 * major + 10 * minor; 0 without one."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    version = ctypes.c_int(0)
    return version.value if driver.cuDriverGetVersion(ctypes.byref(version)) == 0 else 0


if __name__ == "__main__":
    version = driver_cuda_version()
    if 0 < version < 12000:
        print(f"the driver runs CUDA {version // 1000}, 12 is needed: CPU only", file=sys.stderr)
    print("cuda13" if version >= 13000 else "cuda12" if version >= 12000 else "")
