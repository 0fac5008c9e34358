#!/usr/bin/env bash
# vLLM 0.32.0: with data parallelism, AsyncLLM.collective_rpc returns the answers of the first engine's workers only.
#
# What each worker holds of its own (activations, counters) is lost for every engine but one, and the length of the
# list, which equals the workers of one engine, does not tell. Seen, two engines of one worker each:
#     workers: 2
#     answers: 1
source "$(dirname "$0")/common/vllm_server.sh"
install "$VLLM"
make_model
cat >"$WORK/ask.py" <<'EOF'
import asyncio
import sys

import psutil
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM


async def main():
    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=128, kv_cache_memory_bytes=64 << 20,
            data_parallel_size=2,
        )
    )
    try:
        answers = await engine.collective_rpc("check_health")
        names = [" ".join(one.cmdline()) for one in psutil.Process().children(recursive=True)]
        return sum("Worker" in name for name in names), len(answers)
    finally:
        engine.shutdown()


if __name__ == "__main__":
    workers, answers = asyncio.run(main())
    print(f"workers: {workers}\nanswers: {answers}", flush=True)
    sys.exit(0 if (workers, answers) == (2, 1) else "CHANGED")
EOF
cd "$WORK"
VLLM_CPU_OMP_THREADS_BIND="0|1" "$PYTHON" ask.py "$WORK/model" 2>log || { tail -30 log; exit 1; }
echo "as described: $VLLM gives the first engine's answers"
