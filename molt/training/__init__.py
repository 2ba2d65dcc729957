"""Training a MOLT on image labels."""
