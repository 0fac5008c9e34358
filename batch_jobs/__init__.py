"""Studies on top of vllm_steer: extract a direction from contrastive texts, validate it, steer with it, score it.

The packages, in the order of the work; ``pipeline`` runs them in this order, ``cli`` is the command ``vllm-steer``:

- ``config``: studies and servers as YAML; ``files``: reading and writing of files; ``run``: the run directory and its
  provenance
- ``texts``: contrastive pairs, scenarios, prompts; ``pairs`` writes and checks pairs; ``endpoint`` asks chat servers
- ``directions``: extraction, methods, probes, validation, baselines
- ``rows``: the grid of conditions, the Parquet store
- ``engine``, ``generate``: engines, generation on one machine or with Ray, the second reading
- ``scoring``: measures of texts, scores, effects, the judge
- ``compare``: two runs side by side; ``report``: tables, figures and the HTML page
"""
