"""Acts that make the weights of what stays out of what goes: averaged, merged, fused, flattened."""
