"""How gradient messages and parameter versions travel."""
