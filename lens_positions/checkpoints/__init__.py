"""The models shipped in this package, a folder each, as `python -m training ship` wrote them."""
