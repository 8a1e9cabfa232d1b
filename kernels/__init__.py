"""Triton backends of the operators; imported as `oder_fast.kernels`."""
