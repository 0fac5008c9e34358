"""The plugin's additions to vLLM's OpenAI-compatible server.

Each request passes ``middleware`` (ASGI). ``inbound.bodies`` takes the plugin's fields out of its body, and vLLM
answers the rest. ``outbound.replies`` adds the readouts that ``engine.front.async_generate`` put into its ``Exchange``.
"""
