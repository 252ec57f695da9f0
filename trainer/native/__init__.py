"""Kernels in C++, and their compilation on first use."""
