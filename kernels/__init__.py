"""Kernels, each beside its plain-torch reference. They know tensors only."""
