"""Drop-in replacements for losses of other libraries: `compat.liger` and `compat.trl`."""
