"""The smallest kernel, which probes whether kernels can be launched."""
