"""Rate and momentum steered by the loss: the rules, a rate for any optimizer, SGD and Adam, accumulated gradients."""
