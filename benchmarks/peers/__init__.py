"""Other ways to train the same OPT on one device, each used as its own documentation recommends.

`benchmarks/side_by_side.py` runs them beside ours. All of them keep fp32 master weights and do the same work: weights
drawn from the same seed, the same rows in the same order, AdamW with decay of matrices alone, a learning rate that
falls linearly, one clipping of the global norm. The loss is each peer's own mean over the targets of a batch; rows are
equally long, so this is also the mean over all of them.
"""
