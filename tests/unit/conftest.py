"""How the property tests of these modules draw their examples."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# The same examples on every run, so that a failure can be repeated from its test's name alone; and no verdict on speed,
# which says nothing on a machine that is shared.
settings.register_profile(
    "repeatable", derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repeatable")
