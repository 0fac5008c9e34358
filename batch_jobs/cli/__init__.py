"""The command `vllm-steer`."""
