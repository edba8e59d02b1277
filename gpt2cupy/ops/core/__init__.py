"""What every op stands on: compiling, launching, devices, cuBLAS."""
