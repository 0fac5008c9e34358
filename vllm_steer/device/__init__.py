"""The tensors on the device that compiled code and CUDA graphs read, and how a step's tables reach them."""
