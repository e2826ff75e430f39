"""The model as it travels: flat memory, gradients, updates, and what guards them."""
