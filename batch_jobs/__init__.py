"""Studies on top of vllm_steer: find a direction in contrastive texts, check it, steer with it, score what
comes out.

Which module to open, in the order of the work (`pipeline` runs them in it, `cli*` is the command `vllm-steer`):

- config and place: `study` (read by `study_document`), `run_directory`, `provenance`, `config_difference`; `documents`
  reads files for all of them, and `errors` holds what that raises
- texts: `contrastive`; `pair_source`, `text_writer`, `chat_endpoint` (with `chat_dialect`) write pairs, `pair_check`
  looks at them; `prompts` says what a model is asked, `thought` tells its thinking from its answer
- directions: `extract` reads the texts into a `readout_file`; `direction_methods`, `probes`
- validation: `validate`, made of `layer_validation`, `auroc`, `baselines`, `lexical_ablation`; stored by `validation`
- rows: `grid`, `shards`, `store` (Parquet)
- generation: `generate` and `reread` run one batch, `shard_runner` a shard, `local_executor` and `ray_executor` all of
  them, in engines that `engine` starts; `attempts`, `cpu_set`, `progress`, `progress_board` serve them
- scoring: `score` streams `measures` of texts (`paper_metric`, `degeneration`) into `scores` with `effects`;
  `findings`; `behaviour`, `correlation`, `direction_behaviour`; `judge`; `published_generations`
- two runs: `compare`, `completion_agreement`, `cross_model`
- report: `run_results` -> `report`, `headlines`, `report_tables`, `samples`, `figures`, beside `published` values
"""
