"""Pages that need no network: of a run, of token weights; the style they share."""
