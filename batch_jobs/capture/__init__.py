"""`vllm-steer capture`: the residual stream of every token of many texts, in files."""
