"""What a machine and a model have: versions, memory, registers and occupancy of kernels."""
