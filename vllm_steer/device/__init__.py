"""Device tensors that compiled code and CUDA graphs read, and the transfer of a step's tables to them."""
