"""The data that a worker computes on: batches, the samplers that share them out, and their seeds."""
