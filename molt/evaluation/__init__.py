"""How good boxes and maps are, by the metrics of the field."""
