"""What secure aggregation costs: masks, set-up and unmasking through the real state machines, rounds over the plane."""
