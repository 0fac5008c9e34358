"""HTTP client for a server with this plugin. It needs neither vLLM nor torch.

    >>> from vllm_steer import Readout, Steering
    >>> from vllm_steer.client import SteerClient
    >>> with SteerClient("http://localhost:8000", "demo") as client:  # doctest: +SKIP
    ...     reply = client.chat("How was your day?", steering=[Steering("kind", 8.0)], readout=Readout([12], "all"))
    ...     reply.choices[0].text, reply.choices[0].readout.mean[12]

``AsyncSteerClient`` has the same methods for an event loop. If a server's error names a class of
``vllm_steer.errors``, that class is raised; any other failure raises ``ServerRefusal`` or ``ServerUnreachable``.
"""

from vllm_steer.client.async_client import AsyncSteerClient
from vllm_steer.client.refusals import ServerRefusal, ServerUnreachable
from vllm_steer.client.replies import Choice, Piece, Reply, ServerSteering, StoredDirection, TracePart
from vllm_steer.client.sync_client import SteerClient

__all__ = [
    "AsyncSteerClient",
    "Choice",
    "Piece",
    "Reply",
    "ServerRefusal",
    "ServerSteering",
    "ServerUnreachable",
    "SteerClient",
    "StoredDirection",
    "TracePart",
]
