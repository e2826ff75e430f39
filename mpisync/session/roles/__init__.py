"""The roles of a rank in a torch session: worker, root, both at once, or a rank whose session has ended."""
