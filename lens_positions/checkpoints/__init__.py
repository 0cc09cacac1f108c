"""The models shipped in this package, a folder each, as `lens-positions ship` wrote them."""
