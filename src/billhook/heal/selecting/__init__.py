"""Which text a training reads."""
