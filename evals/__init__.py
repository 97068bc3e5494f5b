"""Studies of the method and the recipe of the bundled model; run from a checkout, not installed."""
