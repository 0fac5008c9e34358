"""Limits on how far steering may push the residual stream: one at admission, one in the op.

A stream beyond the range of its dtype becomes infinite and then NaN, also in the KV cache. vLLM's attention reads the
contents of stale KV blocks, so a NaN there corrupts requests that get those blocks later. These bounds keep steering
from ever writing one:

* Admission refuses entries that could add more than ``LARGEST_ADDITION`` to an element at one layer.
* Admission refuses entries of a token that could multiply its stream by more than ``LARGEST_GROWTH``, over all layers,
  and divides the first bound by the growth that it admits.
* float16 has so small a range that additions at several layers, on top of a large stream, can still leave it. For
  float16 only, the op clips every element at ``FLOAT16_LIMIT``, and the request ends with the reason.
"""

from __future__ import annotations

LARGEST_ADDITION = {"float16": 2.0**15, "bfloat16": 2.0**48, "float32": 2.0**48}
"""dtype -> the largest Σ|α|·max|d| over the entries at one layer.

Half of float16's range. For the others, small enough that the squares of 128 layers' additions, summed over 16,384
elements by a norm in float32, stay finite.
"""

LARGEST_GROWTH = 2.0**24
"""The largest product of what the entries of one token multiply its length by: 1 + |α| for ``relative`` ones, |α| for
``scale``. A model's own stream is below 2³¹, so the product is within what ``LARGEST_ADDITION`` allows 128 layers."""

FLOAT16_LIMIT = 49152.0
"""Steering pushes no element of a float16 stream, or of a decoder layer's output, beyond ± this: three quarters of the
range, which leaves the rest for later layers. An element that is already beyond it can only be pulled back."""
