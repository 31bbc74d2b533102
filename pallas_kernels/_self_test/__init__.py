"""The smallest kernel, which is launched to see whether kernels can be."""
