"""The chunk loop that all losses share."""
