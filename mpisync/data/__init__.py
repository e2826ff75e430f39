"""What a worker computes on: batches, the samplers that share them out, and their seeds."""
