"""What a request may ask for, as typed objects and as JSON, with the checks that need no engine."""
