"""The faces: a torch training loop (`Session`) and arrays (`PartialReduce`)."""
