"""What the plugin adds to vLLM's OpenAI-compatible server.

A request passes ``middleware`` (ASGI). ``inbound.bodies`` takes out of its body what it asks of the plugin, and vLLM
answers it. ``outbound.replies`` adds the readouts that ``engine.front.async_generate`` put in its ``Exchange``.
"""
