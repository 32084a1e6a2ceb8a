"""Models that jaxprune's authors did not write, by the package they come from."""
