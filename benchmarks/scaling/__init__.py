"""What a chunk costs in each layer, and a simulation of clusters from these figures."""
