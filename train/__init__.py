"""Light heads learned on the cache: towers, losses, the loop."""
