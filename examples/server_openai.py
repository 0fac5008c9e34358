"""Steer and read over HTTP with the plain `openai` package; a server has to run.

vllm-steer serve --config configs/servers/demo.yaml
python examples/server_openai.py demo-model --direction empathy --alpha 28
"""

from __future__ import annotations

import argparse
import os

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the name that the server serves the model by")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--direction", required=True, help="the name of a direction that the server has")
    parser.add_argument("--alpha", type=float, default=8.0)
    parser.add_argument("--prompt", default="How was your day?")
    parser.add_argument("--max-tokens", type=int, default=40)
    given = parser.parse_args()

    with OpenAI(base_url=given.url, api_key=os.environ.get("VLLM_API_KEY", "none")) as client:
        messages = [{"role": "user", "content": given.prompt}]
        for alpha in (-given.alpha, 0.0, given.alpha):
            reply = client.chat.completions.create(
                model=given.model,
                messages=messages,
                max_tokens=given.max_tokens,
                temperature=0,
                extra_body={
                    "steering": [{"direction": given.direction, "alpha": alpha}],
                    "readout": {"project": [given.direction], "span": "generated"},
                },
            )
            choice = reply.choices[0]
            print(f"alpha {alpha:6.1f}  {choice.message.content!r}")
            print(f"    projection {choice.readout['projections'][given.direction]}")

        stream = client.chat.completions.create(
            model=given.model,
            messages=messages,
            max_tokens=given.max_tokens,
            stream=True,
            extra_body={"readout": {"trace": [given.direction], "span": "generated"}},
        )
        for chunk in stream:
            for choice in chunk.choices:
                trace = (choice.model_extra or {}).get("trace")
                values = [] if trace is None else trace[given.direction]["values"]
                print(repr(choice.delta.content or ""), values)


if __name__ == "__main__":
    main()
