"""Labels of tables and plots for the short names in the records."""

from __future__ import annotations

WAYS = {
    "absent": "plugin absent",
    "absent again": "plugin absent, a second engine: the noise",
    "installed": "installed, not configured",
    "idle": "configured for {layers} layers, idle",
    "idle, all layers": "configured for all layers, idle",
    "steered": "all steered at one layer, every α different",
    "stacked": "all steered, 8 directions at each of {layers} layers",
    "prompt read": "all read at {layers} layers, prompts",
    "read": "all read at {layers} layers, prompts and answers",
    "read, all layers": "all read at all layers, prompts and answers",
}
HOOKS = {
    "ours": "vllm-steer, all at once",
    "paper": "the paper's own way: one at a time, no KV cache",
    "cached": "hooks with KV cache, one at a time",
    "batched": "hooks, batches of the best size",
}
