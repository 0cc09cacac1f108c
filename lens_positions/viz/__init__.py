"""Pictures of increments and positions."""
