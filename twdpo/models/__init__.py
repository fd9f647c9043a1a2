"""Models: found, their attention, built, read in shards, as the policy, generation, memory."""
