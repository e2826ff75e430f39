"""The commands, a module each; `main.COMMANDS` lists them."""
