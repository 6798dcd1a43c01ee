"""Drop-ins for other libraries' names: `compat.liger` and `compat.trl`."""
