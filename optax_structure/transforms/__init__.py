"""Every strategy is a composable ``optax.GradientTransformation``, one family a module."""
