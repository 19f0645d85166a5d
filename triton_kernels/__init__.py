"""Triton kernels, one module per op family. Imported on first use: triton is optional."""
