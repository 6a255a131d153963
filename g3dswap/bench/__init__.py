"""Measures the chosen kernels against PyTorch's on layers of real models."""
