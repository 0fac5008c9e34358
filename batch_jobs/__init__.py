"""Studies on top of vllm_steer: find a direction in contrastive texts, check it, steer with it, score what
comes out.

The data flow, one module a step: `study` (the config) -> `contrastive` (texts) -> `extract` (readouts,
directions) -> `validate` (held-out AUROC) -> `grid` (rows to generate) -> `generate` (completions) -> `store`
(Parquet) -> `score` -> `report`. `pipeline` runs them in that order, `cli` is the command `vllm-steer`.
"""
