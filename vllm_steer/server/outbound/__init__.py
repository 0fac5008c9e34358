"""A reply on its way out: readouts and traces are put beside what vLLM answers; refusals; streams."""
