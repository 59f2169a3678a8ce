"""Kernels, each next to its plain-torch reference. They know tensors only."""
