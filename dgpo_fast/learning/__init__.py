"""From a gradient to weights: optimizers, rounding and averages."""
