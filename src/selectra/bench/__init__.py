"""Timing of kernels, blocks and models: each is checked against its reference first, and stops there if it is wrong."""
