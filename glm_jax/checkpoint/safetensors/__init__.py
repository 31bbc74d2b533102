"""safetensors files: header, memory-mapped reader, and writer."""
