"""How good (metrics), at what cost (costs), and on which rows (predictions)."""
