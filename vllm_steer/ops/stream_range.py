"""How far steering may push the residual stream: what admission lets through, and what the op cuts off.

A stream beyond its dtype's range becomes infinite, then NaN, in the KV cache too; and attention of vLLM takes in what
stale blocks hold, so a NaN there spoils requests that get those blocks later. Two bounds keep steering from ever
writing one:

* Admission refuses entries that could add more than ``LARGEST_ADDITION`` to an element at one layer.
* float16 alone has so small a range that additions at several layers, on top of a large stream, can still leave it.
  There the op stops every element at ``FLOAT16_LIMIT``, and the request ends with the reason.
"""

from __future__ import annotations

LARGEST_ADDITION = {"float16": 2.0**15, "bfloat16": 2.0**48, "float32": 2.0**48}
"""dtype -> the largest Σ|α|·max|d| over the entries at one layer.

Half of float16's range. For the others, so little that the squares of 128 layers' additions, summed over 16,384
elements as a norm does it in float32, stay finite.
"""

FLOAT16_LIMIT = 49152.0
"""Steering pushes no element of a float16 stream, or of what a decoder layer hands on, beyond ± this: three quarters of
the range, so that what later layers add finds room. An element that is beyond it already can only be pulled back."""
