"""Freezing: by label, by phase, by small gradients; what it saves in the backward pass; plans of one program each."""
