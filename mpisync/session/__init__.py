"""The two faces of a run: a torch training loop (`Session`) and arrays (`PartialReduce`)."""
